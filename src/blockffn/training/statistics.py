"""Numbers of each step, kept on the device and brought to the host many steps at a time.

Reading a number from a GPU stalls it; a step therefore only appends small tensors, and `flush` moves all of them in one
transfer (and one all-reduce over ranks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockffn.metrics.units import complete_windows, window_unions
from blockffn.training.distributed import World

CLS_WINDOW = 8


def layer_counts(weights: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of one layer and micro-batch from which CLS8, TLS and expert load follow, without a host synchronisation.

    Args:
        weights: routing weights `[B, T, E]`. document_ids: `[B, T]`, -1 for padding.

    Returns:
        0-d int64: experts active in some token of a window of 8, summed over windows.
        int64 `[E]`: tokens that use each expert. Padding and windows that cross documents do not count.
    """
    one_document = complete_windows(document_ids, CLS_WINDOW)
    active = (weights != 0) & (document_ids >= 0)[..., None]
    in_windows = window_unions(active, CLS_WINDOW) & one_document[..., None]
    return in_windows.sum(), active.sum(dim=(0, 1))


class StepStatistics:
    """Per-step numbers by name, and expert loads since the last log line.

    `history` holds host records of recent steps (the coefficients' observations are means over it); it and the loads
    are saved with a checkpoint, so that a resumed run logs and decides as an uninterrupted one.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        keep: int,
        num_layers: int,
        num_experts: int,
        world: World,
        num_shared_experts: int = 0,
    ) -> None:
        self.names = list(names)
        self.keep, self.num_layers, self.num_experts, self.world = keep, num_layers, num_experts, world
        self.num_shared_experts = num_shared_experts
        self.history: list[dict[str, float]] = []
        self._pending: list[Tensor] = []
        self._loads = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=world.device)

    def append(self, values: dict[str, Tensor], loads: Tensor | None) -> None:
        """One step's numbers, each the sum over this rank's micro-batches; ranks are added up later."""
        self._pending.append(torch.stack([values[name].detach().double() for name in self.names]))
        if loads is not None:
            self._loads += loads

    def flush(self) -> None:
        """Bring pending steps to the host. All ranks call this at the same steps."""
        if not self._pending:
            return
        table = self.world.sum(torch.stack(self._pending)).tolist()
        self._pending.clear()
        self.history += [self._with_sparsity(dict(zip(self.names, row))) for row in table]
        del self.history[: -self.keep]

    def _with_sparsity(self, record: dict[str, float]) -> dict[str, float]:
        if self.num_experts:
            tokens, windows = record["num_tokens"], record["num_windows"]
            record["tls"] = 100 * (1 - record["active"] / max(tokens * self.num_layers * self.num_experts, 1))
            if windows:
                record["cls8"] = 100 * (
                    1 - record["active_in_windows"] / (windows * self.num_layers * self.num_experts)
                )
        return record

    def mean(self, steps: int) -> dict[str, float]:
        """Means over the last `steps` flushed steps."""
        recent = self.history[-steps:]
        return {name: sum(r[name] for r in recent if name in r) / len(recent) for name in recent[-1]}

    def take_loads(self) -> list[list[int]]:
        """Tokens per layer and expert that is routed to (shared experts have every token) since the last call."""
        loads = self.world.sum(self._loads[:, self.num_shared_experts :].clone()).tolist()
        self._loads.zero_()
        return loads

    def state_dict(self) -> dict[str, object]:
        self.flush()
        return {"history": self.history, "loads": self.world.sum(self._loads.clone()).tolist()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.history = list(state["history"])  # type: ignore[call-overload]
        loads = torch.tensor(state["loads"], dtype=torch.int64, device=self.world.device).view_as(self._loads)
        self._loads = loads if self.world.is_main else torch.zeros_like(loads)
