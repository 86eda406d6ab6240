"""Numbers and their nouns."""

from __future__ import annotations

from blockffn.wording import counted


def test_one_is_singular_and_large_numbers_have_separators() -> None:
    assert [counted(number, "token") for number in (0, 1, 2, 12345)] == [
        "0 tokens",
        "1 token",
        "2 tokens",
        "12,345 tokens",
    ]
