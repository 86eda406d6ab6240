"""Words beside numbers."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`, `1,024 tokens`: a number and its noun, which takes an s in the plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
