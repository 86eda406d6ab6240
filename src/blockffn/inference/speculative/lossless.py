"""Where speculative and plain decoding part, and whether rounding can explain it.

A target that computes a token differently alone and among others (another order of sums) may choose differently where
two logits nearly tie, or where a draw falls near the boundary between two tokens. The distance to the tie or to the
boundary tells such a case from a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockffn.inference.decode import Generation, GenerationSettings, Request, decode
from blockffn.inference.sampling import probabilities
from blockffn.inference.target import Target

NEAR_TIE = 0.02  # of the scale of the logits; int8 activations move them by half as much
NEAR_BOUNDARY = 0.02  # of probability; int8 activations move the running sums by as much


@dataclass(frozen=True)
class Difference:
    """The first position at which two decodings differ.

    Attributes:
        position: counted in new tokens.
        speculative, plain: tokens there; `None` where that text had ended.
        margin: plain logit of the plain token minus that of the speculative one.
        scale: largest plain logit minus the mean; the margin's measure.
        shift: of a draw: how much probability has to move for the same random number to give the speculative token.
    """

    position: int
    speculative: int | None
    plain: int | None
    margin: float | None = None
    scale: float | None = None
    shift: float | None = None

    @property
    def may_be_rounding(self) -> bool:
        """Whether two logits nearly tied, or a draw fell near a boundary."""
        if self.shift is not None:
            return self.shift <= NEAR_BOUNDARY
        return self.margin is not None and self.scale is not None and self.margin <= NEAR_TIE * self.scale

    def __str__(self) -> str:
        text = (
            f"speculative and plain decoding differ first at new token {self.position}: "
            f"{self.speculative} instead of {self.plain}"
        )
        if self.shift is not None:
            text += f"; the draw is {self.shift:.2g} of probability away from that token"
        elif self.margin is not None and self.scale is not None:
            text += f"; the plain logits are {self.margin:.3g} apart, at a scale of {self.scale:.3g}"
        return text + (": so near that rounding can decide" if self.may_be_rounding else "")


def first_difference(
    target: Target, prompt_ids: Sequence[int], settings: GenerationSettings, generation: Generation
) -> Difference | None:
    """Decode a request plainly as well, up to the first token that `generation` lacks; `None`: it lacks none."""
    if generation.finish_reason == "stop":  # by who received the text, which is not asked again
        settings = replace(settings, max_new_tokens=len(generation.token_ids))
    kept: list[Tensor] = []
    request = Request(prompt_ids, settings)
    for position, [plain] in enumerate(decode(target, request, on_logits=kept.append)):
        logits = kept.pop()
        if position == len(generation.token_ids):
            return Difference(position, None, plain)
        ours = generation.token_ids[position]
        if ours != plain:
            return _difference(position, ours, plain, logits.float(), request)
    count = len(request.new)
    return Difference(count, generation.token_ids[count], None) if count < len(generation.token_ids) else None


def _difference(position: int, ours: int, plain: int, logits: Tensor, request: Request) -> Difference:
    """Two tokens that were chosen after plain logits `[V]`, the second of which is the request's last."""
    margin, scale = float(logits[plain] - logits[ours]), float(logits.max() - logits.mean())
    if request.settings.temperature == 0:
        return Difference(position, ours, plain, margin, scale)
    history = torch.tensor(request.tokens[:-1], device=logits.device)
    total = probabilities(logits, history, request.settings).double().cumsum(dim=-1)
    # The draw of this position: every token before it took one number of the same generator.
    generator = torch.Generator(logits.device).manual_seed(request.settings.seed)
    for _ in range(position + 1):
        uniform = torch.rand(1, dtype=torch.float64, device=logits.device, generator=generator)
    return Difference(position, ours, plain, margin, scale, _outside(total, ours, float(uniform * total[-1])))


def _outside(total: Tensor, token: int, draw: float) -> float:
    """How far a draw lies outside a token's stretch of running sums `[V]`."""
    begin = float(total[token - 1]) if token else 0.0
    return max(begin - draw, draw - float(total[token]), 0.0)
