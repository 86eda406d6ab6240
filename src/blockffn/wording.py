"""Words beside numbers."""

from __future__ import annotations

# Formats of progress bars over bytes (`unit="B", unit_scale=True`), with and without a known end.
BYTES_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"
BYTES_COUNT = "{desc} {n_fmt}B, {rate_fmt}, {elapsed}"
BATCHES_COUNT = "{desc}: batch {n_fmt}, {elapsed}"  # how many there will be is not known


def counting_bar(nouns: str) -> str:
    """Format of a progress bar over so many things of a kind."""
    return "{desc} |{bar}| {n_fmt} of {total_fmt} " + nouns + ", {remaining} left"


def counted(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`, `1,024 tokens`: a number and its noun, which takes an s in the plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
