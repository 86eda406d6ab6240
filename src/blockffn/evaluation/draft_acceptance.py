"""How many tokens a drafter gets accepted where it counts: when the target writes, greedily, behind held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockffn.inference.decode import GenerationSettings
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.decode import UNSHAPED, Shaper, Speculation, speculative_generate
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.drafters.eagle import eagle_drafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.estimates import AcceptanceEstimate
from blockffn.inference.speculative.growth import BestNodes
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.training.draft.settings import AcceptanceSettings


def decoding_report(
    model: BlockFFNForCausalLM, draft: DraftModel, prompts: Sequence[Tensor], settings: AcceptanceSettings
) -> dict[str, Any]:
    """`decoding_acceptance` of the draft's chains and trees, and of n-grams for comparison; `None` without prompts.

    `calibration`: how often the draft's tokens were accepted by its own probability, in chains and trees together.
    """
    if not prompts:
        return dict.fromkeys(("chain", "tree", "ngram", "calibration"))
    chain = BestNodes(top_k=1, depth=settings.chain, size=settings.chain)
    tree = BestNodes(top_k=settings.top_k, depth=settings.depth, size=settings.nodes)
    drafters: dict[str, Drafter] = {
        "chain": eagle_drafter(draft, model, growth=chain),
        "tree": eagle_drafter(draft, model, growth=tree),
        "ngram": NgramDrafter(),
    }
    of_draft = AcceptanceEstimate(forget=1.0)
    with torch.compiler.set_stance("force_eager"):  # shapes change with every call
        report: dict[str, Any] = {
            name: decoding_acceptance(
                model, drafter, prompts, new_tokens=settings.new_tokens, estimate=None if name == "ngram" else of_draft
            )
            for name, drafter in drafters.items()
        }
    return report | {"calibration": of_draft.calibration()}


def decoding_acceptance(
    model: BlockFFNForCausalLM,
    drafter: Drafter,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    estimate: AcceptanceEstimate | None = None,
) -> dict[str, Any]:
    """Greedy speculative decoding of `new_tokens` behind each prompt `[T]` (int64, on the CPU), all texts together.

    Args:
        estimate: learns from every verification.

    Returns:
        `acceptance_length` (tokens per verification, the target's own included), `acceptance_by_depth` (rate at which a
        token is accepted where one is offered and those before it were), `verifications`, `new_tokens`, `tree_size`.

    Raises:
        ValueError: there is no prompt.
    """
    if not prompts:
        raise ValueError("no held-out text is long enough to continue; ask for shorter prompts")
    target = ModelTarget(model, capacity=max(map(len, prompts)) + new_tokens)
    settings = GenerationSettings(max_new_tokens=new_tokens, temperature=0.0)
    speculation = Speculation(drafter, UNSHAPED if estimate is None else _Listener(estimate))
    total = SpeculationStatistics()
    for prompt in prompts:
        generation = speculative_generate(target, speculation, prompt.tolist(), settings)
        assert generation.statistics.speculation is not None
        total.add(generation.statistics.speculation)
    return {
        "acceptance_length": total.acceptance_length,
        "acceptance_by_depth": total.acceptance_by_depth,
        "verifications": total.verifications,
        "new_tokens": new_tokens * len(prompts),
        "tree_size": total.tree_size,
    }


class _Listener(Shaper):
    """A shaper that leaves trees as they are and lets an estimate learn from them."""

    def __init__(self, estimate: AcceptanceEstimate) -> None:
        self._estimate = estimate

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        self._estimate.observe(tree, verdict)
