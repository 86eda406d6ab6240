"""The published draft's network behind the drafter: cached and in trees it says what it says run over a whole path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters.eagle import eagle_drafter
from blockffn.inference.speculative.growth import BestNodes, Budget
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from tests.inference.speculative.stub_targets import RecomputingTarget, decode_losslessly

PROMPT = torch.tensor([3, 1, 4, 1, 5])
GROWTH = BestNodes(top_k=3, depth=3, size=12)


def random_draft(model: BlockFFNForCausalLM, token_ids: Tensor | None) -> DraftModel:
    draft = DraftModel(model.config, token_ids=token_ids).eval()
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return draft


@torch.no_grad()
def draft_log_probs(model: BlockFFNForCausalLM, draft: DraftModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """`[V']` behind `tokens`, feeding the draft's own output back where the target's states end; no cache."""
    embeddings = model.model.embed_tokens(tokens[1:]) * model.config.scale_emb
    while True:
        out = draft(embeddings[None, : len(hidden)], hidden[None])[0]
        if len(hidden) == len(embeddings):
            return draft.logits(out[-1], model.lm_head.weight).log_softmax(dim=-1)
        hidden = torch.cat((hidden, out[-1:]))


@pytest.mark.parametrize("token_ids", [None, torch.arange(0, 61, 2)], ids=["all tokens", "reduced vocabulary"])
def test_a_tree_has_the_drafts_own_probabilities(token_ids: Tensor | None, tiny: BlockFFNForCausalLM) -> None:
    draft = random_draft(tiny, token_ids)
    hidden = RecomputingTarget(tiny).extend(PROMPT).hidden
    drafter = eagle_drafter(draft, tiny, growth=GROWTH)
    drafter.start(PROMPT)
    drafter.observe(PROMPT, hidden)
    context = torch.cat((PROMPT, torch.tensor([9])))
    tree = drafter.propose(context, Budget(nodes=99, depth=9))
    assert len(tree) == 12
    ids = torch.arange(61) if token_ids is None else token_ids
    for node in range(len(tree)):
        path = tree.tokens[tree.path(node)]
        expected = draft_log_probs(tiny, draft, hidden, torch.cat((context, path[:-1])))[ids == path[-1]]
        assert tree.log_probs[node].item() == pytest.approx(expected.item(), abs=1e-3)


def test_decoding_with_it_is_lossless(tiny: BlockFFNForCausalLM) -> None:
    drafter = eagle_drafter(random_draft(tiny, None), tiny, growth=GROWTH)
    statistics = decode_losslessly(RecomputingTarget(tiny), Speculation(drafter), PROMPT.tolist(), 12)
    assert statistics.largest_tree == 12
