from __future__ import annotations

import math
from typing import Any

import pytest
from rich.console import Console

from blockffn.reporting import format_value, markdown_table, summary_table
from blockffn.reporting.tables import difference, label


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("heldout_loss", 2.32749, "2.327"),
        ("dense_heldout_loss", 2.3, "2.300"),
        ("perplexity", 10.2469, "10.25"),
        ("tls", 78.66, "78.7 %"),
        ("cls8", 61.94, "61.9 %"),
        ("cls64", 45.0, "45.0 %"),
        ("tokens_per_second", 19214.2, "19,214"),
        ("tokens_per_second", 7.84, "7.8"),
        ("parameters", 2790912, "2,790,912"),
        ("seconds", 12.34, "12.3 s"),
        ("seconds", 231.4, "3 min 51 s"),
        ("seconds", 3 * 3600 + 125, "3 h 2 min"),
        ("seconds", 59.99, "60.0 s"),
        ("heldout_loss", None, "–"),
        ("heldout_loss", math.nan, "–"),
        ("perplexity", math.inf, "∞"),
        ("anything", 0.123456, "0.1235"),
        ("anything", 12345, "12,345"),
        ("anything", True, "yes"),
        ("preset", "nano", "nano"),
    ],
)
def test_a_quantity_is_written_by_its_name(name: str, value: Any, text: str) -> None:
    assert format_value(name, value) == text


@pytest.mark.parametrize(
    ("name", "value", "other", "text"),
    [
        ("heldout_loss", 2.327, 2.284, "+1.9 %"),
        ("tokens_per_second", 80.0, 100.0, "−20.0 %"),
        ("tls", 80.0, 78.5, "+1.5 points"),
        ("heldout_loss", 2.3, None, "–"),
        ("heldout_loss", 2.3, 0.0, "–"),
        ("heldout_loss", math.nan, 2.0, "–"),
    ],
)
def test_a_difference_is_in_percent_or_in_points(name: str, value: Any, other: Any, text: str) -> None:
    assert difference(name, value, other) == text


def test_labels_are_words() -> None:
    assert [label(name) for name in ("heldout_loss", "cls32", "activation_locality")] == [
        "Held-out loss", "CLS32", "Activation locality",
    ]  # fmt: skip


def printed(summary: dict[str, Any]) -> list[list[str]]:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(summary))
    return [line.replace("│", " ").split() for line in console.export_text().splitlines()]


def test_the_summary_sets_the_dense_twin_beside_what_it_compares_with() -> None:
    lines = printed({"tls": 78.7, "dense_heldout_loss": 2.284, "heldout_loss": 2.327})
    assert ["Held-out", "loss", "2.327", "2.284", "+1.9", "%"] in lines
    assert ["TLS", "78.7", "%"] in lines


def test_a_summary_without_twin_has_no_columns_for_one() -> None:
    assert "twin" not in str(printed({"heldout_loss": 2.327}))


def test_the_summary_keeps_the_usual_order_and_puts_unknown_numbers_last() -> None:
    lines = printed({"other_number": 3, "seconds": 1.0, "cls8": 50.0, "tls": 70.0, "heldout_loss": 2.0})
    assert [line[0] for line in lines[2:] if line] == ["Held-out", "TLS", "CLS8", "Time", "Other"]


def test_markdown_rows_are_formatted_aligned_and_escaped() -> None:
    text = markdown_table([{"method": "a|b\n", "tls": 80.04}, {"method": "dense", "tls": None, "tokens": 1000}])
    assert text.splitlines() == [
        "| Method | TLS | Tokens |",
        "| :-- | --: | --: |",
        "| a\\|b  | 80.0 % | – |",
        "| dense | – | 1,000 |",
    ]


def test_a_markdown_table_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        markdown_table([])
