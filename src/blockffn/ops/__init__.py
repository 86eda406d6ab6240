"""Numerical operations on plain tensors. Each op is a folder; its `__init__` is its contract."""
