"""The receipt, alone and as `blockffn convert --from-dense` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from blockffn.checkpoints.convert import convert as quantise
from blockffn.checkpoints.load import load
from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.cli.from_dense import convert_dense, receipt_table
from blockffn.data.prepare import prepare
from blockffn.inference.backends import make_target
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.target import prefill
from blockffn.ops import native
from blockffn.sparsify.dense import from_llama
from blockffn.sparsify.passages import read_passages
from blockffn.sparsify.receipt import compare
from tests.sparsify.conftest import MakeLlama


def convert(path: Path, out: Path, data: Path | None, **changes: Any) -> dict[str, Any]:
    options = {"experts": "gated", "num_experts": 6, "sparsity": 50.0, "calibration_tokens": 512, "dtype": "auto",
               "max_shard_size": "5GB", "device": "cpu", "console": Console()}  # fmt: skip
    return convert_dense(path, out, data=data, **{**options, **changes})


@torch.no_grad()
def test_divergence_and_perplexity_are_those_of_a_direct_computation(make_llama: MakeLlama, text: Path) -> None:
    original, other = from_llama(make_llama()), from_llama(make_llama())
    other.lm_head.weight.mul_(0.5)
    passages = read_passages(text, "valid", length=64, num_tokens=256)
    stage = compare("halved", original, other, passages)
    wanted = [original(p).logits[0] for p in passages]
    found = [other(p).logits[0] for p in passages]
    divergences = [torch.nn.functional.kl_div(f.log_softmax(-1), w.log_softmax(-1), log_target=True, reduction="none")
                   for f, w in zip(found, wanted)]  # fmt: skip
    losses = [torch.nn.functional.cross_entropy(f[:-1], p[0, 1:], reduction="none") for f, p in zip(found, passages)]
    assert stage.difference == pytest.approx(0.5, rel=1e-4)
    assert stage.divergence == pytest.approx(float(torch.cat(divergences).sum(-1).mean()), rel=1e-4)
    assert stage.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert stage.tls is None


def test_a_folder_becomes_a_sparse_folder_with_a_receipt(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    receipt = convert(llama_folder, tmp_path / "sparse", text)
    loaded, regrouped, routed = receipt["stages"]
    assert receipt["load_difference"] < 1e-5
    assert loaded["difference"] == 0
    assert regrouped["difference"] < 1e-5
    assert routed["tls"] == pytest.approx(50, abs=6)
    assert receipt_table(receipt).row_count == 3
    model = load(tmp_path / "sparse")
    assert (model.config.ffn_type, model.config.num_experts, model.config.moe_intermediate_size) == ("moe", 6, 8)
    again = compare(
        "routed", load(_dense(llama_folder, tmp_path)), model, read_passages(text, "valid", length=128, num_tokens=128)
    )
    assert again.divergence == pytest.approx(routed["divergence"], rel=1e-3)


@pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("experts", ["gated", "plain", "none"])
def test_what_was_converted_decodes_natively(
    llama_folder: Path, text: Path, tmp_path: Path, experts: str, format: str | None
) -> None:
    convert(llama_folder, tmp_path / "new", text, experts=experts)
    folder = tmp_path / "new"
    if format is not None:
        folder = tmp_path / "packed"
        quantise(tmp_path / "new", folder, quantization=BlockFFNQuantizationConfig.preset(format))
    model = load(folder)
    prompt = read_passages(text, "valid", length=64, num_tokens=64)[0][0, :20]
    steps = [prefill(target, prompt) for target in (make_target(model, backend="native"), ModelTarget(model))]
    error = (steps[0].logits - steps[1].logits).norm() / steps[1].logits.norm()
    assert error < (5e-5 if format is None else 5e-2)


def _dense(llama_folder: Path, tmp_path: Path) -> Path:
    convert(llama_folder, tmp_path / "dense", None, experts="none")
    return tmp_path / "dense"


def test_our_dense_folder_converts_like_the_model_it_was_made_from(
    llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    first = convert(llama_folder, tmp_path / "one", text)["stages"]
    second = convert(_dense(llama_folder, tmp_path), tmp_path / "two", text)["stages"]
    assert first == second


def test_text_of_another_tokenizer_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text with other words entirely " * 50)
    prepare([tmp_path / "other.txt"], tmp_path / "other", vocab_size=270, valid_fraction=0.2)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        convert(llama_folder, tmp_path / "sparse", tmp_path / "other")
    assert not (tmp_path / "sparse").exists()
