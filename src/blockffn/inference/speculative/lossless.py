"""Where speculative and plain decoding part, and whether rounding can explain it.

A target that computes a token differently alone and among others (another order of sums) may choose differently where
two logits nearly tie. The margin tells such a case from a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from blockffn.inference.decode import Generation, GenerationSettings, Request, decode
from blockffn.inference.target import Target


@dataclass(frozen=True)
class Difference:
    """The first position at which two decodings differ.

    Attributes:
        position: counted in new tokens.
        speculative, plain: tokens there; `None` where that text had ended.
        margin: plain logit of the plain token minus that of the speculative one.
        scale: largest plain logit minus the mean; the margin's measure.
    """

    position: int
    speculative: int | None
    plain: int | None
    margin: float | None = None
    scale: float | None = None

    def __str__(self) -> str:
        text = (
            f"speculative and plain decoding differ first at new token {self.position}: "
            f"{self.speculative} instead of {self.plain}"
        )
        if self.margin is not None and self.scale is not None:
            text += f"; the plain logits are {self.margin:.3g} apart, at a scale of {self.scale:.3g}"
        return text


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
            logits = logits.float()
            return Difference(
                position, ours, plain, float(logits[plain] - logits[ours]), float(logits.max() - logits.mean())
            )
    count = len(request.new)
    return Difference(count, generation.token_ids[count], None) if count < len(generation.token_ids) else None
