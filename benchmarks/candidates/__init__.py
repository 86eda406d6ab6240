"""Triton kernels that are right in the interpreter and not yet measured; `tune_triton.py` times them on a GPU."""
