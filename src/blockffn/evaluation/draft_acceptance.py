"""How many tokens a drafter gets accepted where it counts: when the target writes, greedily, behind held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.decode import Settings, speculative_generate
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.drafters.eagle import eagle_drafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.growth import BestNodes
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.training.draft.settings import AcceptanceSettings


def decoding_report(
    model: BlockFFNForCausalLM, draft: DraftModel, prompts: Sequence[Tensor], settings: AcceptanceSettings
) -> dict[str, Any]:
    """`decoding_acceptance` of the draft's chains and trees, and of n-grams for comparison; `None` without prompts."""
    if not prompts:
        return dict.fromkeys(("chain", "tree", "ngram"))
    chain = BestNodes(top_k=1, depth=settings.chain, size=settings.chain)
    tree = BestNodes(top_k=settings.top_k, depth=settings.depth, size=settings.nodes)
    drafters: dict[str, Drafter] = {
        "chain": eagle_drafter(draft, model, growth=chain),
        "tree": eagle_drafter(draft, model, growth=tree),
        "ngram": NgramDrafter(),
    }
    with torch.compiler.set_stance("force_eager"):  # shapes change with every call
        return {
            name: decoding_acceptance(model, drafter, prompts, new_tokens=settings.new_tokens)
            for name, drafter in drafters.items()
        }


def decoding_acceptance(
    model: BlockFFNForCausalLM,
    drafter: Drafter,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
) -> dict[str, Any]:
    """Greedy speculative decoding of `new_tokens` behind each prompt `[T]` (int64, on the CPU), all texts together.

    Returns:
        `acceptance_length` (tokens per verification, the target's own included), `acceptance_by_depth` (rate at which a
        token is accepted where one is offered and those before it were), `verifications`, `new_tokens`, `tree_size`.

    Raises:
        ValueError: there is no prompt.
    """
    if not prompts:
        raise ValueError("no held-out text is long enough to continue; ask for shorter prompts")
    target = ModelTarget(model, capacity=max(map(len, prompts)) + new_tokens)
    settings = Settings(max_new_tokens=new_tokens)
    tried, accepted = [0] * settings.max_depth, [0] * settings.max_depth
    tokens = verifications = drafted = 0
    for prompt in prompts:
        statistics = speculative_generate(target, drafter, prompt, settings).statistics
        tokens += statistics.verified_tokens
        verifications += statistics.verifications
        drafted += statistics.nodes
        for i, (t, a) in enumerate(zip(statistics.tried, statistics.accepted)):
            tried[i] += t
            accepted[i] += a
    return {
        "acceptance_length": tokens / max(verifications, 1),
        "acceptance_by_depth": [a / t for a, t in zip(accepted, tried) if t],
        "verifications": verifications,
        "new_tokens": new_tokens * len(prompts),
        "tree_size": drafted / max(verifications, 1),
    }
