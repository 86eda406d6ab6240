"""What transformers calls the key-value cache: `past_key_values` before 5.24, `cache` from then on.

Its `generate` passes and reads the name of its own version; the model accepts either.
"""

from __future__ import annotations

import inspect

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that was given by either name. Raises `ValueError` if both were."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    return past_key_values if cache is None else cache
