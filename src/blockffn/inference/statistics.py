"""What one request took and used."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockffn.configuration import BlockFFNConfig
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.target import Step
from blockffn.metrics.cost import parameter_counts, weight_bytes_per_token

PARTS = ("prefill", "draft", "decode", "sampling")


@dataclass(frozen=True)
class GenerationStatistics:
    """Times in seconds; on a GPU the wait for a step falls into `sampling`, where its token is read, or into `decode`
    where the next step is launched before (`GraphTarget`).

    Attributes:
        steps: runs of the model after the prompt.
        draft_seconds: of proposing tokens. decode_seconds: of the model. sampling_seconds: of choosing tokens, and of
            accepting drafts.
        sequences: how many shared a step, on average.
        speculation: what became of the drafts; `None` for plain decoding.
        active_experts: experts per token and layer, mean over the tokens of these steps, drafts included; `None` for
            dense models.
        union_experts: experts per step and layer that its tokens activate together, mean over the steps.
        tls: token-level sparsity of these tokens in percent. With the two below known where the model is.
        union_share: `union_experts` in percent of the experts.
        weight_bytes_per_token: bytes of weights that the steps read, for each new token that came of them; without a
            draft's own, and as if the head were read whole.
        head_share: share of the head that a step read as it is stored, mean over the steps; `None` where it is not
            screened. whole_heads: steps that read all of it.
    """

    prompt_tokens: int
    new_tokens: int
    steps: int
    prefill_seconds: float
    decode_seconds: float
    sampling_seconds: float
    draft_seconds: float = 0.0
    sequences: float = 1.0
    speculation: SpeculationStatistics | None = None
    active_experts: float | None = None
    union_experts: float | None = None
    tls: float | None = None
    union_share: float | None = None
    weight_bytes_per_token: float | None = None
    head_share: float | None = None
    whole_heads: int = 0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self._later_seconds

    @property
    def _later_seconds(self) -> float:
        return self.draft_seconds + self.decode_seconds + self.sampling_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens but the first, which is the prompt's, by the time after the prompt; `None` for one token."""
        later = self.new_tokens - 1
        return later / self._later_seconds if later else None

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time of the whole request."""
        return self.new_tokens / self.seconds

    def of_model(self, config: BlockFFNConfig, *, bits_per_weight: float) -> GenerationStatistics:
        """With what follows from the model's sizes."""
        if not self.steps:
            return self
        tokens_per_step = self.sequences * (self.new_tokens - 1) / self.steps
        tls = union = unused = None
        if self.active_experts is not None and self.union_experts is not None:
            tls = 100 * (1 - self.active_experts / config.num_experts)
            union = 100 * self.union_experts / config.num_experts
            unused = 100 - union
        per_step = weight_bytes_per_token(config, bits_per_weight=bits_per_weight, tls_percent=unused)
        return replace(self, tls=tls, union_share=union, weight_bytes_per_token=per_step / tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rates included."""
        rates = ("seconds", "tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second")
        values = asdict(self) | {name: getattr(self, name) for name in rates}
        return values | {"speculation": None if self.speculation is None else self.speculation.to_dict()}


@dataclass
class Recorder:
    """Collects the times and steps of one request. What steps used stays on their device until the end."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    steps: int = 0
    served: int = 0
    speculation: SpeculationStatistics | None = None
    _active: list[Tensor] = field(default_factory=list)
    _union: list[Tensor] = field(default_factory=list)
    _head_shares: list[float] = field(default_factory=list)
    _since: float = 0.0

    def start(self) -> None:
        """The first part of a round begins."""
        self._since = time.perf_counter()

    def lap(self, part: str) -> float:
        """A part of `PARTS` ends, to which the seconds since the last call of `start` or `lap` are added: these."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds[part] += seconds
        return seconds

    def add(self, step: Step, *, sequences: int = 1) -> None:
        """Count a run of the model after the prompt, which served so many sequences."""
        self.steps += 1
        self.served += sequences
        if step.active is not None and step.union is not None:
            self._active.append(step.active)
            self._union.append(step.union)
        if step.head_share is not None:
            self._head_shares.append(step.head_share)

    def statistics(self, *, prompt_tokens: int, new_tokens: int) -> GenerationStatistics:
        shares = self._head_shares
        return GenerationStatistics(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            steps=self.steps,
            sequences=self.served / self.steps if self.steps else 1.0,
            speculation=self.speculation,
            **{f"{part}_seconds": self.seconds[part] for part in PARTS},
            active_experts=float(torch.cat(self._active, dim=1).double().mean()) if self._active else None,
            union_experts=float(torch.stack(self._union).double().mean()) if self._union else None,
            head_share=sum(shares) / len(shares) if shares else None,
            whole_heads=sum(share >= 1 for share in shares),
        )


def stored_bits_per_weight(model: nn.Module, config: BlockFFNConfig) -> float:
    """Bits that a parameter takes in memory, on average over the model: 16 in bfloat16, fewer where it is packed."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return 8 * sum(tensors.values()) / parameter_counts(config).total


def bits_per_weight(model: nn.Module, config: BlockFFNConfig, target: object) -> float:
    """Bits that a weight takes where a target reads it: one that packs weights of its own says how many."""
    own: float | None = getattr(target, "bits_per_weight", None)
    return own or stored_bits_per_weight(model, config)
