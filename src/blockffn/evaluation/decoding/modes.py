"""The modes of `blockffn bench decode`: dense and sparse models, plain, with a fixed tree, with one cut by cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockffn.evaluation.decoding.oracle import OracleDrafter, PricedDrafter, random_eagle_head
from blockffn.evaluation.decoding.prompts import EncodedPrompt
from blockffn.evaluation.decoding.ways import Decoder, greedy
from blockffn.inference.decode import generate
from blockffn.inference.drafts import (
    Draft,
    check_draft,
    find_draft,
    make_speculation,
    resolve_draft,
    trained_drafter,
    tree_shape,
)
from blockffn.inference.speculative.growth import BestNodes
from blockffn.inference.target import Target
from blockffn.models.causal_lm import BlockFFNForCausalLM

ORACLE = "oracle:"
PLAIN, FIXED, BY_COST = "plain", "fixed tree", "tree by cost"


@dataclass
class Subject:
    """A model with its target and, once they are known, what it says behind the prompts.

    Attributes:
        label: `dense` or `sparse`, in names of modes.
        draft: `ngram`, a folder, or `oracle:RATE`; `None`: only the plain mode.
        price: for simulated drafts, whether a real head of random weights runs beside them for its time.
    """

    label: str
    model: BlockFFNForCausalLM
    target: Target
    draft: str | None = None
    price: bool = True
    seed: int = 0
    continuations: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def learn(self, prompts: Sequence[EncodedPrompt], max_new_tokens: int) -> None:
        """Decode the prompts plainly, for a draft that is to know what comes."""
        for prompt in prompts:
            self.continuations[prompt.ids] = generate(self.target, prompt.ids, greedy(max_new_tokens)).token_ids

    def plain(self) -> Decoder:
        return Decoder(f"{self.label}, {PLAIN}", self.target)

    def speculating(self, *, tree: str | int) -> Decoder:
        """With a tree of so many draft tokens, `chain:N`, or `auto`: as many as pay."""
        assert self.draft is not None
        draft = self._oracle(*tree_shape(tree)) if self.draft.startswith(ORACLE) else _name(self.draft)
        speculation = make_speculation(self.model, self.target, draft, tree=tree)
        kind = BY_COST if tree == "auto" else f"{FIXED} {tree}"
        return Decoder(f"{self.label}, {kind}", self.target, speculation)

    def _oracle(self, size: int, branches: int, levels: int) -> Draft:
        assert self.draft is not None
        growth = BestNodes(top_k=min(size, branches), depth=levels, size=size)
        oracle = OracleDrafter(
            *oracle_rates(self.draft), vocab_size=self.model.config.vocab_size, growth=growth, seed=self.seed
        )
        for prompt, continuation in self.continuations.items():
            oracle.learn(prompt, continuation)
        if not self.price:
            return oracle
        dtype = self.model.model.norm.weight.dtype
        head = random_eagle_head(self.model.config, dtype=dtype).to(self.model.model.norm.weight.device)
        return PricedDrafter(oracle, lambda levels: trained_drafter(head, self.model, self.target, growth=levels))


def oracle_rates(draft: str) -> list[float]:
    """The numbers of `oracle:RATE` or `oracle:RATE,RATE`. Raises `ValueError` unless they lie between 0 and 1."""
    try:
        rates = [float(rate) for rate in draft.removeprefix(ORACLE).split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise ValueError(f"a simulated draft is written oracle:RATE with a rate between 0 and 1, got {draft!r}")
    return rates


def choose_draft(path: Path, draft: str | None) -> str | None:
    """The draft that a name asks for beside the model of `path`, looked at without reading weights.

    Args:
        draft: `ngram`, a folder, `oracle:RATE`; `auto`: the folder `draft` beside the model, or else `ngram`; `none`;
            `None`: the folder beside the model, or else none.

    Raises:
        ValueError: it is none of these.
    """
    if draft == "none":
        return None
    chosen = find_draft(path) if draft is None else resolve_draft(path, draft)
    if chosen is None:
        return None
    name = str(chosen)
    if name.startswith(ORACLE):
        oracle_rates(name)
    else:
        check_draft(chosen)
    return name


def _name(draft: str) -> str | Path:
    return draft if draft == "ngram" else Path(draft)
