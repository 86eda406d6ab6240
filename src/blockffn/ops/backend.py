"""Choosing a backend: one table per op, one function for all ops.

A table maps names to `Backend`s in the order in which `auto` tries them. An explicit name that cannot take the
arguments is an error with the reason, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _never_refuses(*args: Any, **kwargs: Any) -> str | None:
    return None


def _always_pays(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. All three functions take the op's arguments.

    Attributes:
        run: computes the op.
        refuses: the reason why `run` cannot take these arguments, or `None` when it can.
        pays: whether `auto` should prefer it for these arguments to the backends after it in the table.
        batch_invariant: whether a token's result is bit-equal however many other tokens share the call.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _never_refuses
    pays: Callable[..., bool] = _always_pays
    batch_invariant: bool = False

    def reason_against(self, batch_invariant: bool, *args: Any, **kwargs: Any) -> str | None:
        """Why this backend cannot serve the call, or `None`."""
        if batch_invariant and not self.batch_invariant:
            return "it rounds differently for different numbers of tokens (batch_invariant=True)"
        return self.refuses(*args, **kwargs)


def choose_backend(
    op: str, backends: Mapping[str, Backend], name: str, *args: Any, batch_invariant: bool = False, **kwargs: Any
) -> str:
    """The name of the backend that computes `op` on these arguments.

    Raises:
        ValueError: `name` is unknown or cannot take the arguments, or `auto` finds no backend that can.
    """
    if name != "auto":
        if name not in backends:
            raise ValueError(f"unknown backend {name!r} for {op}; choose one of {sorted(backends)} or 'auto'")
        reason = backends[name].reason_against(batch_invariant, *args, **kwargs)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot compute this {op}: {reason}")
        return name
    last = None
    for key, backend in backends.items():  # ends at the first that pays: a decode step asks for every layer
        if backend.reason_against(batch_invariant, *args, **kwargs) is None:
            if backend.pays(*args, **kwargs):
                return key
            last = key
    if last is None:
        reasons = {key: b.reason_against(batch_invariant, *args, **kwargs) for key, b in backends.items()}
        raise ValueError(f"no backend can compute this {op}: " + "; ".join(f"{k}: {r}" for k, r in reasons.items()))
    return last
