"""Drafts by name, and the engine with them: the text is that of plain decoding, wherever it ends."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import pack_model
from blockffn.data.tokenizer import train_tokenizer
from blockffn.inference.drafts import (
    BRANCHES,
    LARGEST_BY_COST,
    LEVELS,
    LEVELS_BY_COST,
    find_draft,
    make_speculation,
    resolve_draft,
    tree_shape,
)
from blockffn.inference.engine import Engine
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.drafters.eagle import EagleDrafter, eagle_drafter
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.drafters.native_eagle import NativeEagleDrafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.growth import DrawnNodes
from blockffn.inference.speculative.shaping import CostAwareShaper
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.ops import native
from tests.inference.speculative.stub_targets import OracleDrafter
from tests.models.conftest import tiny_model

PROMPT = "naïve words ☕"
HEAD_DRAFTER = EagleDrafter if native.unavailable() else NativeEagleDrafter


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["naïve café — ☕ numbers 1 2 3 and words, many words"] * 20, vocab_size=300)


@pytest.fixture(scope="module")
def model() -> BlockFFNForCausalLM:
    torch.manual_seed(2)
    return tiny_model(vocab_size=300, initializer_range=0.5)


@pytest.fixture(scope="module")
def draft(model: BlockFFNForCausalLM) -> DraftModel:
    torch.manual_seed(3)
    draft = DraftModel(model.config).eval()
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return draft


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast,
    draft: DraftModel,
) -> Path:  # fmt: skip
    """A model's folder with a draft in it."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "draft").mkdir()
    save_file(draft.state_dict(), folder / "draft" / "model.safetensors")
    names = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: getattr(draft.config, name) for name in names}
    (folder / "draft" / "config.json").write_text(json.dumps(sizes))
    return folder


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "top_p": 1.0, "seed": 3},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5},
]


def right_engine(
    model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast, *, wrong_every: int = 0, **settings: Any
) -> tuple[Engine, Any]:
    """An engine whose drafts are the plain text, every so many tokens wrong, and the plain completion."""
    plain = Engine(model, tokenizer).generate(PROMPT, max_new_tokens=30, **settings)
    oracle = OracleDrafter(plain.prompt_ids + plain.token_ids, 300, wrong_every=wrong_every, length=4)
    return Engine(model, tokenizer, draft=oracle, tree=8), plain


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("wrong_every", [0, 3])
def test_the_text_is_the_plain_one_in_blocks(
    wrong_every: int, settings: dict[str, Any], model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, plain = right_engine(model, tokenizer, wrong_every=wrong_every, **settings)
    stream = engine.stream(PROMPT, max_new_tokens=30, check_lossless=True, **settings)
    pieces = list(stream)
    completion = stream.completion
    assert completion.checked
    assert completion.difference is None
    assert "".join(pieces) == completion.text == plain.text
    assert (completion.token_ids, completion.finish_reason) == (plain.token_ids, "length")
    statistics = completion.statistics
    assert statistics.speculation is not None
    assert statistics.speculation.acceptance_length is not None
    assert statistics.speculation.acceptance_length > (4.5 if wrong_every == 0 else 2)
    assert len(pieces) <= statistics.steps + 2
    assert statistics.weight_bytes_per_token is not None
    assert plain.statistics.weight_bytes_per_token > statistics.weight_bytes_per_token


@pytest.mark.parametrize("settings", SETTINGS[::3], ids=str)
def test_stop_strings_and_end_tokens_are_found_inside_a_block(
    settings: dict[str, Any], model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, plain = right_engine(model, tokenizer, **settings)
    for place in range(0, len(plain.text) - 2, 3):
        asked = {"max_new_tokens": 30, "stop": plain.text[place : place + 2], **settings}
        stopped, expected = engine.generate(PROMPT, **asked), engine.generate(PROMPT, speculative=False, **asked)
        assert stopped.text == expected.text
        assert (stopped.token_ids, stopped.finish_reason) == (expected.token_ids, "stop")
    for token in dict.fromkeys(plain.token_ids):
        asked = {"max_new_tokens": 30, "eos_token_ids": (token,), **settings}
        ended, expected = engine.generate(PROMPT, **asked), engine.generate(PROMPT, speculative=False, **asked)
        assert ended.text == expected.text
        assert (ended.token_ids, ended.finish_reason) == (expected.token_ids, "eos")
        assert ended.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_as_many_tokens_as_asked_up_to_the_last_that_fits(
    new: int, model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    length = len(Engine(model, tokenizer).encode(PROMPT))
    engine = Engine(model, tokenizer, draft="ngram", tree=6, capacity=length + new - 1)
    for speculative in (True, False):
        assert len(engine.generate(PROMPT, max_new_tokens=new, speculative=speculative).token_ids) == new
        with pytest.raises(ValueError, match=f"ask for at most {new} new token"):
            engine.generate(PROMPT, max_new_tokens=new + 1, speculative=speculative)


@pytest.mark.parametrize("tree", ["auto", 5])
@pytest.mark.parametrize("name", ["ngram", "auto", "folder of a draft", "folder of a model"])
def test_every_draft_is_lossless(name: str, tree: str | int, folder: Path) -> None:
    named = {"folder of a draft": folder / "draft", "folder of a model": folder}
    engine = Engine.load(folder, device="cpu", draft=named.get(name, name), tree=tree)
    assert engine.speculation is not None
    assert isinstance(engine.speculation.shaper, CostAwareShaper) == (tree == "auto")
    expected = {"ngram": NgramDrafter, "folder of a model": ModelDrafter}.get(name, HEAD_DRAFTER)
    assert type(engine.speculation.drafter) is expected
    for settings in SETTINGS[::2]:
        completion = engine.generate("words words words", max_new_tokens=20, check_lossless=True, **settings)
        assert completion.difference is None
        speculation = completion.statistics.speculation
        assert speculation is not None
        assert speculation.largest_tree <= (5 if tree == 5 else 31)
        if name == "folder of a model" and tree == 5 and settings["temperature"] == 0:
            assert speculation.acceptance_by_depth == [1.0] * 5


@pytest.mark.parametrize("packed", [False, True])
def test_a_reduced_draft_vocabulary_is_lossless(
    packed: bool, model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast, draft: DraftModel
) -> None:
    reduced = DraftModel(draft.config, token_ids=torch.arange(3, 300, 2)).eval()
    reduced.load_state_dict(draft.state_dict())
    model = deepcopy(model)
    rows = model.lm_head.weight[reduced.token_ids]
    if packed:
        pack_model(model, BlockFFNQuantizationConfig())
    drafter = eagle_drafter(reduced, model)
    output = torch.randn(2, 32)
    expected = model.head_input(output) @ rows.T
    torch.testing.assert_close(drafter.logits(output), expected, rtol=0, atol=0.02 * float(expected.detach().std()))
    completion = Engine(model, tokenizer, draft=drafter, tree=6).generate(
        PROMPT, max_new_tokens=12, temperature=0.0, check_lossless=True
    )
    assert completion.difference is None
    assert completion.statistics.speculation is not None
    assert completion.statistics.speculation.largest_tree == 6


def test_the_draft_beside_the_model_is_found(folder: Path, tmp_path: Path) -> None:
    assert find_draft(folder) == folder / "draft"
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder)
    assert find_draft(run) == run / "model" / "draft"
    assert resolve_draft(run, "auto") == run / "model" / "draft"
    assert resolve_draft(run, "ngram") == "ngram"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert resolve_draft(bare, "auto") == "ngram"
    # Trained into the run of its target, a draft is the run `draft` in it.
    (tmp_path / "other" / "draft").mkdir(parents=True)
    (tmp_path / "other" / "model").symlink_to(bare)
    (tmp_path / "other" / "draft" / "model").symlink_to(folder / "draft")
    assert find_draft(tmp_path / "other") == tmp_path / "other" / "draft"
    engine = Engine.load(folder, device="cpu", draft=tmp_path / "other" / "draft", tree=4)
    assert engine.speculation is not None
    assert type(engine.speculation.drafter) is HEAD_DRAFTER


def test_a_batch_has_no_drafts(model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine, plain = right_engine(model, tokenizer, temperature=0.0)
    batch = engine.generate_batch([PROMPT, "words"], max_new_tokens=30, temperature=0.0)
    assert batch[0].token_ids == plain.token_ids
    assert batch[0].statistics.speculation is None
    for asked in ({"speculative": True}, {"check_lossless": True, "speculative": True}):
        with pytest.raises(ValueError, match="a batch is decoded without drafts"):
            engine.generate_batch([PROMPT, "words"], **asked)


def test_mistakes_are_named(
    model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast, draft: DraftModel, tmp_path: Path
) -> None:
    target = ModelTarget(model)
    with pytest.raises(ValueError, match="is no draft: give 'ngram', or the folder"):
        make_speculation(model, target, "ngramm")
    with pytest.raises(ValueError, match="holds no model"):
        make_speculation(model, target, tmp_path)
    for tree in (0, 64, "64", "many", "chain:", "²", 7.0, True):
        with pytest.raises(
            ValueError, match=f"tree must be 'auto' or a number of draft tokens from 1 to 63, got {tree!r}"
        ):
            make_speculation(model, target, "ngram", tree=tree)
    other = tiny_model(vocab_size=61)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the draft model has 61 tokens, the target 300"):
        make_speculation(model, target, tmp_path / "other")
    engine = Engine(model, tokenizer)
    with pytest.raises(ValueError, match="the engine has no drafts"):
        engine.generate(PROMPT, speculative=True)
    with pytest.raises(ValueError, match="give the engine a draft"):
        engine.generate(PROMPT, check_lossless=True)
    drawing = ModelDrafter(ModelTarget(model), vocab_size=300, growth=DrawnNodes())
    with pytest.raises(ValueError, match="does not promise"):
        Engine(model, tokenizer, draft=drawing, tree=4).generate(PROMPT, check_lossless=True)
    with pytest.raises(ValueError, match="leave out capacity=9"):
        Engine(model, tokenizer, target=target, capacity=9)


def test_a_tree_is_read_alike_from_a_number_and_from_text() -> None:
    assert tree_shape(7) == tree_shape("7") == (7, BRANCHES, LEVELS)
    assert tree_shape("chain:16") == (16, 1, 16)
    assert tree_shape("auto") == (LARGEST_BY_COST, BRANCHES, LEVELS_BY_COST)


def test_a_difference_is_reported(model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    class Careless(ModelTarget):
        """Rounds very differently where it gets more than one token."""

        def extend(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> Any:
            step = super().extend(tokens, parents)
            if len(tokens) > 1:
                step.logits.neg_()
            return step

    engine = Engine(model, tokenizer, target=Careless(model), tree=4)
    plain = engine.generate(PROMPT, max_new_tokens=9, temperature=0.0)
    engine.speculation = make_speculation(
        model, engine.target, OracleDrafter(plain.prompt_ids + plain.token_ids, 300, wrong_every=0), tree=4
    )
    completion = engine.generate(PROMPT, max_new_tokens=9, temperature=0.0, check_lossless=True)
    assert completion.difference is not None
    assert completion.difference.position == 1
