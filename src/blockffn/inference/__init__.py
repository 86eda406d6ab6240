"""Decoding: models with a cache, and speculation over them."""
