"""Numerical operations on plain tensors. Each op is a folder; its `__init__` is its contract.

    active_experts  which experts a chunk activates, and for which tokens
    sparse_ffn      the feed-forward network that reads only active experts, plain or packed
    linear          a packed matrix times a few tokens

`quantization` packs weights (bf16, int8, int4) for the CPU; `native` loads the CPU kernels. Every op takes
`backend="auto"` or the name of an entry in its `BACKENDS` table.
"""
