"""Our drafts inside Hugging Face's `generate`: `model.generate(…, assistant_model=Assistant(model, draft))`.

Its assisted decoding verifies chains, not trees; `Engine` does both.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator

from blockffn.inference.drafts import Draft, make_drafter
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import ROOT, DraftTree, chain
from blockffn.inference.speculative.verify import Verdict
from blockffn.models.causal_lm import BlockFFNForCausalLM


class Assistant:
    """What `generate` takes as `assistant_model`. Batch 1, as all assisted decoding.

    Args:
        model: that generates.
        draft: see `drafts.make_speculation`.
        length: draft tokens a step, at most.

    Attributes:
        statistics: what became of the drafts of the last call.

    Raises:
        ValueError: the draft is not there, another model's, or draws at random; or the length is below 1.

    Example::

        assistant = Assistant(model, "ngram")
        model.generate(**inputs, assistant_model=assistant, max_new_tokens=40)
        print(assistant.statistics.acceptance_length)
    """

    def __init__(self, model: BlockFFNForCausalLM, draft: Draft, *, length: int = 5) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.config, self.generation_config = model.config, GenerationConfig()
        self.statistics = SpeculationStatistics()
        self._drafter, self._length = make_drafter(model, draft, size=length, branches=1), length
        if not self._drafter.deterministic:
            raise ValueError("generate cannot verify drafts drawn at random; use growth BestNodes")

    def make_candidates(self, generation_config: GenerationConfig, cache: Cache | None) -> CandidateGenerator:
        """Drafts for one call of `generate`.

        Raises:
            ValueError: the cache holds tokens; assisted decoding would run them once more.
        """
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"assisted decoding begins with an empty cache; leave out this one of {cache.get_seq_length()} tokens"
            )
        self.statistics = SpeculationStatistics()
        return _Candidates(self._drafter, self._length, self.statistics, generation_config)


class _Candidates(CandidateGenerator):
    """Chains of a drafter, which learns the target's final hidden states after each verification."""

    requires_model_outputs = True
    model_kwargs_overrides = {"output_hidden_states": True}  # noqa: RUF012

    def __init__(
        self, drafter: Drafter, length: int, statistics: SpeculationStatistics, generation_config: GenerationConfig
    ) -> None:
        self._drafter, self._length, self._statistics = drafter, length, statistics
        self._max_length: int = generation_config.max_length
        ends = getattr(generation_config, "_eos_token_tensor", None)
        self._ends = set() if ends is None else set(ends.flatten().tolist())
        self._seen = 0
        self._chain: DraftTree | None = None

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        """`input_ids [1, T]` with draft tokens behind; none in the first iteration, which runs the prompt."""
        context = input_ids[0].tolist()
        if kwargs["is_first_iteration"]:
            self._drafter.start(context)
            return input_ids, None
        new = context[self._seen : -1]
        self._drafter.observe(new, kwargs["model_outputs"].hidden_states[-1][0, : len(new)])
        self._seen = len(context) - 1
        # The target adds a token of its own.
        most = min(self._length, self._max_length - len(context) - 1)
        self._chain = chain(
            self._tokens(self._drafter.propose(context, Budget(nodes=most, depth=most))) if most else []
        )
        return torch.cat((input_ids, self._chain.tokens.to(input_ids.device)[None]), dim=1), None

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: Any) -> None:
        if self._chain is not None:
            self._statistics.count(self._chain, Verdict(list(range(int(num_matches))), int(input_ids[0, -1])))

    def _tokens(self, tree: DraftTree) -> list[int]:
        """The likeliest path, before the first end token: `generate` looks for one behind accepted drafts only."""
        tokens: list[int] = []
        node = ROOT
        while children := tree.children(node):
            node = max(children, key=lambda child: tree.log_prob_list[child])
            token = tree.token_list[node]
            if token in self._ends:
                break
            tokens.append(token)
        return tokens
