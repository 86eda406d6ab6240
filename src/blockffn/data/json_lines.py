"""JSON lines: one object a line, one of its fields the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blockffn.data.compressed import open_compressed

BLOCK_BYTES = 1 << 20


def read_json_lines(
    path: Path, *, text_field: str = "text", source_field: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """Text and source name (`None` without `source_field`) of each line of a file, compressed or not.

    Blank lines are passed over.

    Raises:
        ValueError: a line is not UTF-8, not a JSON object or lacks a field; the message names file and line.
    """
    for where, record in read_records(path):
        yield record_text(record, where, text_field=text_field, source_field=source_field)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, after `file:line` for messages. Blank lines are passed over.

    Raises:
        ValueError: a line is not UTF-8 or not a JSON object; the message names file and line.
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where}: not JSON ({error}); every line must hold one object") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON {type(record).__name__}; every line must hold one object")
        yield where, record


def record_text(
    record: Mapping[str, Any], where: str, *, text_field: str, source_field: str | None
) -> tuple[str, str | None]:
    """Text and source name of a record. Lone surrogates, which UTF-8 cannot express, become U+FFFD.

    Raises:
        ValueError: the record has no such field, or the field is not a string; the message begins with `where`.
    """
    text = _string_field(record, text_field, where, "text_field")
    return text, None if source_field is None else _string_field(record, source_field, where, "source_field")


def _string_field(record: Mapping[str, Any], field: str, where: str, setting: str) -> str:
    if field not in record:
        raise ValueError(
            f"{where}: no field {field!r}; the fields there are {sorted(record)}; set {setting} to one of them"
        )
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field {field!r} holds a {type(value).__name__}, not text; set {setting} to another one"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends. Our decompressed streams have only `read`, so the splitting is here."""
    with open_compressed(path) as stream:
        carry: list[bytes] = []
        while block := stream.read(BLOCK_BYTES):
            first, *rest = block.split(b"\n")
            carry.append(first)
            if rest:
                yield b"".join(carry)
                yield from rest[:-1]
                carry = [rest[-1]]
        yield b"".join(carry)
