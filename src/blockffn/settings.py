"""Settings as frozen dataclasses: read from YAML, changed by dotted overrides, checked, and saved with every run.

An unknown key is an error that names the nearest valid one. Fields typed `dict` are open below their first level.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from blockffn.presets import did_you_mean

T = TypeVar("T")


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["a.b=3", "c=[1, 2]"]` to a nested dict; values are YAML.

    Raises:
        ValueError: an item without `=`, or one that contradicts another (`a=1` and `a.b=2`).
    """
    tree: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ValueError(
                f"override {item!r} is not of the form key=value, for example optimizer.learning_rate=0.01"
            )
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {item!r} sets a part of {parent!r}, which another override sets as a whole")
        node[leaf] = _parse_value(text)
    return tree


def _parse_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, nested dicts merged."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build a settings dataclass from nested plain data.

    Raises:
        ValueError: an unknown key (with the nearest valid one) or a value of the wrong type (with both).
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in fields:
            raise ValueError(f"unknown setting {path!r}{did_you_mean(key, fields)}")
        arguments[key] = _convert(hints[key], value, path)
    return cls(**arguments)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"setting {path!r} is a group of settings, got {value!r}; set one of its fields, {path}.…")
        return from_dict(hint, value, where=f"{path}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"setting {path!r} must be {names}, got {value!r}")


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested plain data, ready for YAML."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()} | {
        f.name: to_dict(getattr(settings, f.name))
        for f in dataclasses.fields(settings)
        if dataclasses.is_dataclass(getattr(settings, f.name))
    }


def save_yaml(settings: Any, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False), encoding="utf-8")


def load_yaml(cls: type[T], path: Path) -> T:
    """Read what `save_yaml` wrote. Raises `ValueError` naming the file if it is not valid."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected a mapping of settings")
    return from_dict(cls, values)
