"""Coefficients of the objectives: constant, adaptive, or steered to a sparsity target in one of two ways.

A coefficient owns its state and knows nothing of the trainer. Steps count from 1. The trainer asks for `value(step)` in
optimisation step `step` and, after each step that is a multiple of `interval`, calls `observe(step, measured)` with the
means over the last `interval` steps. Saving and loading the state continues to the same bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from blockffn.presets import did_you_mean
from blockffn.training.coefficients.adaptive import AdaptiveFactor
from blockffn.training.coefficients.base import Coefficient
from blockffn.training.coefficients.constant import ConstantCoefficient
from blockffn.training.coefficients.multiplicative import MultiplicativeController
from blockffn.training.coefficients.set_point import SetPointController

__all__ = [
    "COEFFICIENTS",
    "AdaptiveFactor",
    "Coefficient",
    "ConstantCoefficient",
    "MultiplicativeController",
    "SetPointController",
    "make_coefficient",
]

COEFFICIENTS: dict[
    str,
    type[ConstantCoefficient] | type[AdaptiveFactor] | type[SetPointController] | type[MultiplicativeController],
] = {
    "constant": ConstantCoefficient,
    "adaptive": AdaptiveFactor,
    "set_point": SetPointController,
    "multiplicative": MultiplicativeController,
}


def make_coefficient(spec: Mapping[str, Any]) -> Coefficient:
    """A coefficient from plain data: `{"kind": "set_point", "initial": 0.05, "target": 80}`.

    `kind` is a key of `COEFFICIENTS`, the rest are the arguments of that class.

    Raises:
        ValueError: no kind, an unknown kind or key (the message names the nearest), a missing key, a bad setting.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"a coefficient is a group of settings such as {{kind: constant, value: 0.1}}, got {spec!r}")
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind not in COEFFICIENTS:
        raise ValueError(f"unknown kind of coefficient {kind!r}{did_you_mean(str(kind), COEFFICIENTS)}")
    parameters = inspect.signature(COEFFICIENTS[kind]).parameters
    for key in settings:
        if key not in parameters:
            raise ValueError(f"unknown setting {key!r} of a {kind} coefficient{did_you_mean(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ValueError(f"a {kind} coefficient needs {key!r}")
    for key, value in settings.items():
        if isinstance(value, str) != (key in ("rule", "observes")) and value is not None:
            raise ValueError(f"{key!r} of a {kind} coefficient must not be {value!r}")
    return COEFFICIENTS[kind](**settings)
