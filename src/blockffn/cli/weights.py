"""What formats do to a model's weights, as tables of 80 columns: of `blockffn convert` and `blockffn formats`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from blockffn.evaluation.formats import FormatError
    from blockffn.ops.quantization import StoredWeight

NOTABLE_PADDING = 0.005  # of the bytes


def weights_table(rows: Sequence[StoredWeight]) -> Table:
    """Tensors of the same name in all layers share a line, with the largest of their errors.

    Bits are those of a weight with its share of the scales; megabytes are as stored, with padding, which the caption
    names where there is much.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_padding(rows))
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "layers", "format", "bits", "MB", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[StoredWeight]] = {}
    for row in rows:
        name = re.sub(r"\.\d+\.", ".*.", row.name).removeprefix("model.").removeprefix("layers.*.")
        name = name.removesuffix(".weight")
        groups.setdefault((name, row.format), []).append(row)
    for (name, format), group in groups.items():
        size = sum(row.num_bytes for row in group)
        error = max(row.error for row in group)
        table.add_row(
            name, "×".join(map(str, group[0].shape)), str(len(group)) if len(group) > 1 else "", format,
            f"{_bits(group):.2f}", f"{size / 1e6:.2f}", f"{error:.2%}" if error else "",
        )  # fmt: skip
    return table


def share_lines(rows: Sequence[StoredWeight]) -> list[str]:
    """How many of the weights each format has."""
    total = _count(rows)
    lines = []
    for format in sorted({row.format for row in rows}):
        count = _count([row for row in rows if row.format == format])
        lines.append(f"{format}: {count / 1e6:.2f} M weights, {count / total:.1%} of all")
    return lines


def errors_table(errors: Sequence[FormatError]) -> Table:
    """The error of every format on outputs of the sparse FFN."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="The sparse FFN's output in each format"
    )
    table.add_column("format")
    table.add_column("bits", justify="right")
    table.add_column("relative error", justify="right")
    for row in errors:
        table.add_row(row.format, f"{row.bits_per_weight:.2f}", f"{row.output_error:.3%}")
    return table


def _padding(rows: Sequence[StoredWeight]) -> str | None:
    padding, total = sum(row.padding_bytes for row in rows), sum(row.num_bytes for row in rows)
    if padding < NOTABLE_PADDING * total:
        return None
    return (
        f"{padding / 1e6:.2f} of the {total / 1e6:.2f} MB are padding: packed matrices have whole strips of 32 rows "
        "and whole groups of columns. Bits are without it."
    )


def _bits(rows: Sequence[StoredWeight]) -> float:
    """Of a weight: its scales included, padding not."""
    return 8 * sum(row.num_bytes - row.padding_bytes for row in rows) / _count(rows)


def _count(rows: Sequence[StoredWeight]) -> int:
    return sum(math.prod(row.shape) for row in rows)
