"""The section "evidence from a checkpoint": whatever `blockffn analyze MODEL --json` left in `records/evidence`.

A JSON object becomes a heading (its `title`, or the file's name), a line of its plain values, a table for each list of
rows in it (to any depth), and the pictures whose names begin with the file's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blockffn.reporting.tables import format_value, label, markdown_table

MOST_ROWS = 40


def evidence_section(folder: Path, base: Path) -> list[str]:
    """Paragraphs of the section; none if the folder holds no JSON.

    Raises:
        ValueError: a file is not a JSON object (named).
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        return []
    found = ["## Evidence from a checkpoint"]
    for path in files:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); make it again with blockffn analyze") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, expected an object; make it again")
        relative = Path(os.path.relpath(folder, base)).as_posix()
        found.append(f"### {values.get('title') or label(path.stem.replace('-', '_'))}")
        found += [str(values[key]) for key in ("description", "text") if isinstance(values.get(key), str)]
        plain = {k: v for k, v in values.items() if isinstance(v, int | float | bool) and not k.startswith("_")}
        if plain:
            found.append(", ".join(f"{label(k)} {format_value(k, v)}" for k, v in plain.items()) + ".")
        for name, rows in _tables(values):
            cut = f" (the first {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
            found += [f"**{name}**{cut}", markdown_table(rows[:MOST_ROWS])]
        found += [
            f"![{label(image.stem.replace('-', '_'))}]({relative}/{image.name})"
            for image in sorted(folder.glob(f"{path.stem}*"))
            if image.suffix in (".png", ".svg")
        ]
        found.append(f"Data: [{path.name}]({relative}/{path.name}).")
    return found


def _tables(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Lists of flat rows, and mappings of names to numbers, with what they are called."""
    for key, value in values.items():
        name = f"{prefix}{label(key)}"
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            rows = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in value]
            if any(rows):
                yield name, rows
        elif isinstance(value, dict) and value:
            if all(isinstance(item, int | float | None) for item in value.values()):
                yield name, [{str(k): v for k, v in value.items()}]
            else:
                yield from _tables(value, f"{name}, ")
