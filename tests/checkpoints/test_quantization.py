from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import blockffn
from blockffn.checkpoints.convert import convert
from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.experts import RoutedExperts
from blockffn.models.packed import PackedEmbedding, PackedLinear, PackedModule
from blockffn.ops.quantization import MatrixLayout, pack_matrix, unpack_matrix, unpack_rows
from blockffn.presets import METHODS, preset_config
from tests.models.conftest import tiny_model

IDS = torch.arange(24).view(2, 12) % 61


def saved(folder: Path, attention: str = "gqa", method: str = "blockffn", **overrides: Any) -> Path:
    tiny_model(attention, method, **overrides).save_pretrained(folder)
    return folder


def quantised(folder: Path, format: str = "int8", **parts: Any) -> BlockFFNForCausalLM:
    config = BlockFFNQuantizationConfig.preset(format, **parts)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(61, 32), (64, 96), (7, 200)])
def test_unpacked_rows_are_the_rows_of_the_unpacked_matrix(format: str, shape: tuple[int, int]) -> None:
    layout = MatrixLayout.choose(format, *shape)
    packed = pack_matrix(torch.randn(shape), layout)
    rows = torch.randint(shape[0], (2, 5))
    assert torch.equal(unpack_rows(packed, layout, rows), unpack_matrix(packed, layout)[rows])


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_saving_loading_and_saving_again_writes_identical_files(
    tmp_path: Path, attention: str, tied: bool, format: str
) -> None:
    model = quantised(saved(tmp_path / "plain", attention, tie_word_embeddings=tied), format)
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    names = file_names(tmp_path / "first")
    assert names == file_names(tmp_path / "second")
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", names, shallow=False)[0] == names
    assert torch.equal(model(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_packed_model_computes_what_its_unpacked_weights_compute(tmp_path: Path, attention: str) -> None:
    model = quantised(saved(tmp_path, attention))
    # The kernels round activations to int8, too. They refuse inputs that need a gradient, so this takes the reference.
    packed = model(inputs_embeds=model.model.embed_tokens(IDS).requires_grad_()).logits
    plain = model.dequantize()
    assert not any(isinstance(module, PackedModule) for module in plain.modules())
    torch.testing.assert_close(packed, plain(IDS).logits, rtol=1e-4, atol=1e-5)


def test_int8_changes_the_logits_little(tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    logits = plain(IDS).logits
    assert (quantised(tmp_path)(IDS).logits - logits).norm() < 0.06 * logits.norm()


def test_router_and_norms_stay_and_everything_else_is_packed(tmp_path: Path) -> None:
    names = [name for name, p in quantised(saved(tmp_path)).named_parameters() if p.dtype != torch.uint8]
    assert names
    assert all("router" in name or "norm" in name for name in names)


def test_the_dense_control_is_packed_too(tmp_path: Path) -> None:
    assert isinstance(quantised(saved(tmp_path, method="dense")).model.layers[0].mlp.up_proj, PackedLinear)


def test_each_part_has_its_own_format(tmp_path: Path) -> None:
    model = quantised(saved(tmp_path), "int4", attention="int8", embeddings=None, lm_head="int4")
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert model.lm_head.format == "int4"
    assert model.model.layers[0].self_attn.q_proj.format == "int8"
    assert model.model.layers[0].mlp.routed_experts.format == "int4"


def test_a_tied_head_shares_the_packed_table(tmp_path: Path) -> None:
    model = quantised(saved(tmp_path / "plain", tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "packed")
    again = blockffn.load(tmp_path / "packed")
    assert isinstance(again.model.embed_tokens, PackedEmbedding)
    assert again.lm_head.packed is again.model.embed_tokens.packed
    assert again.dequantize().lm_head.weight is again.model.embed_tokens.weight


def test_packed_weights_need_no_gradient_so_that_the_kernels_run(tmp_path: Path) -> None:
    model = quantised(saved(tmp_path))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(IDS).logits.requires_grad


def test_a_packed_model_generates(tmp_path: Path) -> None:
    model: Any = quantised(saved(tmp_path))
    out = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 17)


def test_embeddings_follow_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = quantised(saved(tmp_path)).to(torch.bfloat16)
    assert model.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ffn": "int3"}, "ffn must be"), ({"group_size": 48}, "group_size"), ({"packing": 2}, "this version reads 1")],
)
def test_a_wrong_setting_is_an_error_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockFFNQuantizationConfig(**change)


def test_a_nan_is_reported_with_the_module_that_holds_it(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.routed_experts.up_proj[3, 2, 1] = float("nan")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.routed_experts"):
        convert(tmp_path / "plain", tmp_path / "out", quantization=BlockFFNQuantizationConfig())
    assert file_names(tmp_path) == ["plain"]


def test_converting_reports_every_tensor_and_its_bytes(tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    rows = convert(tmp_path / "plain", tmp_path / "out", quantization=BlockFFNQuantizationConfig.preset("int4"))
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    stored = sum(row.num_bytes for row in rows)
    assert stored < files < stored + 10_000  # the rest are headers
    errors = {row.format: row.error for row in rows}
    assert errors["f32"] == 0 < errors["int8"] < 0.02 < errors["int4"] < 0.2
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "blockffn"
    assert (settings["ffn"], settings["embeddings"]) == ("int4", "int8")


def test_quantising_twice_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "once", quantization=BlockFFNQuantizationConfig())
    with pytest.raises(ValueError, match="quantised already"):
        convert(tmp_path / "once", tmp_path / "twice", quantization=BlockFFNQuantizationConfig())


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        convert(tmp_path / "plain", tmp_path / "out")
    assert file_names(tmp_path / "out") == ["notes.txt"]


@pytest.mark.slow
def test_a_tied_mini_model_in_int8_fits_in_files_of_16_megabytes(tmp_path: Path) -> None:
    model = BlockFFNForCausalLM(preset_config("mini", tie_word_embeddings=True))
    assert 37e6 < model.num_parameters() < 39e6
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", quantization=BlockFFNQuantizationConfig(), max_shard_size="15MB")
    sizes = [file.stat().st_size for file in (tmp_path / "out").iterdir()]
    assert max(sizes) <= 16e6
    assert sum(sizes) <= 40e6
    assert blockffn.load(tmp_path / "out")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_survives_packing(tmp_path: Path, method: str) -> None:
    model = quantised(saved(tmp_path / "plain", method=method))
    model.save_pretrained(tmp_path / "packed")
    again = blockffn.load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    kept = [m for m in again.modules() if isinstance(m, RoutedExperts)]
    assert bool(kept) == (model.config.expert_activation == "norm_silu")  # which no kernel computes packed


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gated_experts_survive_packing(tmp_path: Path, format: str) -> None:
    plain = saved(tmp_path / "plain", expert_gated=True)
    model = quantised(plain, format)
    model.save_pretrained(tmp_path / "packed")
    again = blockffn.load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(isinstance(module, RoutedExperts) for module in again.modules())
    wanted, unpacked = blockffn.load(plain), again.dequantize()
    for name in ("gate_proj", "up_proj", "down_proj"):
        of = [getattr(m.model.layers[0].mlp.routed_experts, name) for m in (wanted, unpacked)]
        assert 0 < (of[0] - of[1]).norm() < {"int8": 0.01, "int4": 0.15}[format] * of[0].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(61, 32), (64, 96), (7, 200)])
def test_unpacking_on_the_gpu_gives_the_values_of_the_cpu(format: str, shape: tuple[int, int]) -> None:
    layout = MatrixLayout.choose(format, *shape)
    packed = pack_matrix(torch.randn(shape), layout)
    rows = torch.randint(shape[0], (2, 5))
    assert torch.equal(unpack_matrix(packed.cuda(), layout).cpu(), unpack_matrix(packed, layout))
    assert torch.equal(unpack_rows(packed.cuda(), layout, rows.cuda()).cpu(), unpack_rows(packed, layout, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_quantised_folder_is_unpacked_on_the_gpu(tmp_path: Path, attention: str, tied: bool, format: str) -> None:
    quantised(saved(tmp_path / "plain", attention, tie_word_embeddings=tied), format).save_pretrained(tmp_path / "q")
    expected = blockffn.load(tmp_path / "q").dequantize()
    _assert_is_plain_and_equal(blockffn.load(tmp_path / "q", device="cuda"), expected)
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    with pytest.warns(UserWarning, match="no kernels for packed weights on cuda"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cuda")
    assert model.device.type == "cuda"
    _assert_is_plain_and_equal(model, expected)


def _assert_is_plain_and_equal(model: BlockFFNForCausalLM, expected: BlockFFNForCausalLM) -> None:
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert sorted(found) == sorted(wanted)
    for name, parameter in found.items():
        assert parameter.device == model.device, name
        assert torch.equal(parameter.cpu(), wanted[name]), name
    with torch.no_grad():
        logits = model(IDS.to(model.device)).logits.cpu()
        torch.testing.assert_close(logits, expected(IDS).logits, rtol=1e-3, atol=1e-4)


def test_hugging_faces_loader_unpacks_to_what_ours_does(tmp_path: Path) -> None:
    quantised(saved(tmp_path / "plain"), "int4").save_pretrained(tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q").dequantize()
    _assert_is_plain_and_equal(model, blockffn.load(tmp_path / "q").dequantize())
