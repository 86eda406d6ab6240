"""Training: one loop on plain PyTorch that reads top to bottom (`loop.py`), and what it calls."""
