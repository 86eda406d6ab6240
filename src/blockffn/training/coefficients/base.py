"""What every coefficient is, and what all of them share: warm-up, saved state, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from blockffn.presets import did_you_mean


class Coefficient(Protocol):
    """What the trainer needs. `interval` is None for a coefficient that wants no observations."""

    @property
    def interval(self) -> int | None: ...

    def value(self, step: int) -> float: ...

    def observe(self, step: int, measured: Mapping[str, float]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateful:
    """Linear warm-up, and saving and loading of the attributes that a subclass names in `_STATE`."""

    _STATE: tuple[str, ...] = ()

    def __init__(self, warmup_steps: int) -> None:
        require(warmup_steps >= 0, f"warmup_steps must not be negative, got {warmup_steps}")
        self.warmup_steps = warmup_steps

    def _warmup(self, step: int) -> float:
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._STATE):
            raise ValueError(
                f"saved state of another kind of coefficient: {type(self).__name__} keeps {sorted(self._STATE)}, "
                f"got {sorted(state)}; resume with the settings of the run that wrote it"
            )
        for name in self._STATE:
            setattr(self, name, state[name])


def observed(measured: Mapping[str, float], name: str) -> float:
    if name not in measured:
        raise ValueError(f"the coefficient observes {name!r}, which is not measured{did_you_mean(name, measured)}")
    return measured[name]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
