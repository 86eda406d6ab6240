"""What drafts for a model, chosen by name: n-grams of the text, a trained draft, a smaller model."""

from __future__ import annotations

import time
from pathlib import Path

from blockffn.checkpoints.draft import load_draft, read_calibration
from blockffn.checkpoints.files import open_tensors
from blockffn.checkpoints.layouts import is_draft
from blockffn.checkpoints.load import load, model_folder
from blockffn.inference.backends import make_target
from blockffn.inference.native_draft import NativeDraft
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.speculative.cost import DraftingCost, calibrate, calibrate_drafter
from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.drafters.eagle import EagleDrafter, eagle_drafter
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.drafters.native_eagle import NativeEagleDrafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.growth import BestNodes, Budget, Growth
from blockffn.inference.speculative.shaping import CostAwareShaper
from blockffn.inference.target import Target
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel

Draft = str | Path | DraftModel | Drafter
LARGEST, DEEPEST = 63, 16  # draft tokens of a tree, and levels
LEVELS = 5  # of a trained draft's tree with branches: each is a run of it
BRANCHES = 8  # of a node
CHAIN = "chain:"
LARGEST_BY_COST = 31  # what `auto` drafts, to cut it: with the token before them a power of two
LEVELS_BY_COST = 8


def find_draft(path: Path) -> Path | None:
    """The draft in a model's folder or its run's, `path/draft`: a draft's own folder, or that of its training run."""
    folders = [folder / "draft" for folder in (model_folder(path), path)]
    files = ("config.json", "model/config.json")
    return next((folder for folder in folders if any((folder / file).is_file() for file in files)), None)


def resolve_draft(path: Path, draft: str) -> str | Path:
    """`auto` is the draft beside the model, or else `ngram`; other names stay what they are."""
    return (find_draft(path) or "ngram") if draft == "auto" else draft


def check_draft(draft: str | Path) -> None:
    """Look at what `draft` names without reading weights, so that a wrong name fails before any work.

    Raises:
        ValueError: it is neither `ngram` nor the folder of a draft or a model.
    """
    if draft == "ngram":
        return
    folder = Path(draft)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no draft: give 'ngram', or the folder of a trained draft or of a smaller model")
    open_tensors(model_folder(folder))


def make_speculation(
    model: BlockFFNForCausalLM, target: Target, draft: Draft, *, tree: str | int = "auto"
) -> Speculation:
    """How to draft for `model`, which `target` runs.

    Args:
        draft: `ngram`; the folder of a trained draft or of a smaller model with the same tokens; or what they hold.
        tree: draft tokens per step; `chain:N`: so many without branches, which a native draft runs in one call; or
            `auto`: as many as pay, by a short measurement of the target now and by what is accepted later.

    Raises:
        ValueError: there is no draft in the folder, it is another model's, or `tree` is none of these.
    """
    size, branches, levels = tree_shape(tree)
    drafter = make_drafter(model, draft, size=size, branches=branches, levels=levels, target=target)
    if tree != "auto":
        return Speculation(drafter, most=Budget(nodes=size, depth=DEEPEST))
    most = Budget(nodes=size, depth=DEEPEST)
    config = model.config
    sparse_layers = 0 if config.ffn_type == "dense" else config.num_hidden_layers - config.first_k_dense_replace
    tree_cost, chain_cost = DraftingCost(), None  # of n-grams a tree takes no longer than a chain
    if not isinstance(drafter, NgramDrafter):
        tree_cost = calibrate_drafter(target, drafter, most)
        chain_cost = calibrate_drafter(target, drafter, most._replace(chain=True))
    folder = Path(draft) if isinstance(draft, (str, Path)) and draft != "ngram" else None
    shaper = CostAwareShaper(
        calibrate(target, seconds=3.0),
        num_experts=max(sparse_layers * config.num_experts, 1),
        clock=time.perf_counter,
        tree=tree_cost,
        chain=chain_cost,
        calibration=None if folder is None else read_calibration(folder),
    )
    return Speculation(drafter, shaper, most)


def tree_shape(tree: str | int) -> tuple[int, int, int]:
    """What `tree` asks for: `auto`, a number, also as text, or `chain:N`.

    Returns:
        Draft tokens; branches of a node; levels of a trained draft's tree.

    Raises:
        ValueError: it is neither `auto`, nor 1 to 63, nor `chain:1` to `chain:16`.
    """
    if tree == "auto":
        return LARGEST_BY_COST, BRANCHES, LEVELS_BY_COST
    is_chain = isinstance(tree, str) and tree.startswith(CHAIN)
    number = str(tree).removeprefix(CHAIN)  # no digits where it is neither a number nor text, such as True
    most = DEEPEST if is_chain else LARGEST
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= most:
        raise ValueError(
            f"tree must be 'auto' or a number of draft tokens from 1 to {LARGEST}, got {tree!r}; or 'chain:N' for 1 to "
            f"{DEEPEST} without branches"
        )
    size, branches = int(number), 1 if is_chain else BRANCHES
    return size, branches, _levels(size, branches)


def _levels(size: int, branches: int) -> int:
    """Of a trained draft's tree of a fixed size."""
    return size if branches == 1 else min(size, LEVELS)


def make_drafter(
    model: BlockFFNForCausalLM, draft: Draft, *, size: int, branches: int = BRANCHES, levels: int | None = None,
    target: Target | None = None,
) -> Drafter:  # fmt: skip
    """The drafter behind `draft`, with trees of `size` nodes; one branch makes chains. Errors as above.

    Args:
        levels: of a trained draft's tree; `None`: those of a chain, or `LEVELS`. N-grams need no runs and go deeper.

    Beside a `NativeTarget` a trained draft runs natively too, in the same precision.
    """
    if draft == "ngram":
        return NgramDrafter(depth=min(size, DEEPEST), size=size, branches=min(branches, 4))
    depth = _levels(size, branches) if levels is None else levels
    growth = BestNodes(top_k=min(size, branches), depth=depth, size=size)
    if isinstance(draft, DraftModel):
        return trained_drafter(draft, model, target, growth=growth)
    if not isinstance(draft, (str, Path)):
        return draft
    check_draft(draft)
    folder, weights = model_folder(Path(draft)), model.model.norm.weight
    if is_draft(open_tensors(folder)):
        trained = load_draft(folder, model.config, dtype=weights.dtype).to(weights.device)
        return trained_drafter(trained, model, target, growth=growth)
    small = make_target(load(folder, device=weights.device))
    return ModelDrafter(small, vocab_size=model.config.vocab_size, growth=growth)


def trained_drafter(
    draft: DraftModel, model: BlockFFNForCausalLM, target: Target | None, *, growth: Growth | None = None
) -> EagleDrafter | NativeEagleDrafter:
    """The drafter of an EAGLE draft: native where its target is, else by PyTorch."""
    if not isinstance(target, NativeTarget):
        return eagle_drafter(draft, model, growth=growth)
    native = NativeDraft(draft, model, target.weights, capacity=target.capacity)
    return NativeEagleDrafter(native, growth=growth)
