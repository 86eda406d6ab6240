"""Numerical operations on plain tensors. Each op is a folder; its `__init__` is its contract.

    active_experts  which experts a chunk activates, and for which tokens
    sparse_ffn      the feed-forward network that reads only active experts

Every op takes `backend="auto"` or the name of an entry in its `BACKENDS` table.
"""
