"""The peer's model is as large as ours, and llama.cpp reads what we write."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockffn.evaluation.decoding import llama
from blockffn.metrics.cost import parameter_counts
from blockffn.presets import preset_config


@pytest.mark.parametrize("size", ["0.1b", "0.5b", "0.8b", "1.2b", "3b"])
@pytest.mark.parametrize("method", ["blockffn", "dense"])
def test_a_peer_has_as_many_parameters_and_nearly_as_large_attention(size: str, method: str) -> None:
    config = preset_config(size, method)
    shape = llama.llama_like(config, context=512)
    counts = parameter_counts(config)
    embeddings = 2 * config.vocab_size * config.hidden_size  # the peer's head is never tied
    assert shape.parameters - embeddings == pytest.approx(counts.non_embedding, rel=0.01)
    attention = 2 * shape.hidden_size * llama.HEAD_DIM * (shape.heads + shape.key_value_heads)
    assert attention == pytest.approx(counts.attention / config.num_hidden_layers, rel=0.15)
    assert shape.heads % shape.key_value_heads == 0
    matrices = [size for size in shape.tensors.values() if len(size) == 2]
    assert shape.parameters == sum(rows * columns for rows, columns in matrices) + shape.hidden_size * (
        2 * shape.layers + 1
    )


def test_a_width_that_no_peer_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        llama.llama_like(preset_config("nano", hidden_size=96), context=512)


def test_what_is_not_installed_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert "gguf" in (llama.missing() or "")
    assert "blockffn[bench]" in (llama.missing() or "")


@pytest.mark.parametrize(("kind", "head"), [("BF16", "BF16"), ("Q4_0", "Q8_0"), ("Q5_1", "Q4_1")])
def test_the_file_has_every_tensor_in_its_format(kind: str, head: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    shape = llama.LlamaShape(100, 256, 2, 2, 1, 320, 128)
    llama.write_gguf(tmp_path / "m.gguf", shape, kind, head=head)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: tuple(reversed(t.shape.tolist())) for name, t in tensors.items()} == shape.tensors
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert tensors["output.weight"].tensor_type.name == head
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_llama_cpp_continues_prompts_of_any_length_alike_every_time(precision: str) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    config = preset_config("nano", "dense", vocab_size=300)
    peer = llama.LlamaCpp.like(config, formats=llama.formats_of(precision), capacity=200)
    runs = [peer.run(prompt, 6) for prompt in ([1, 2, 3], list(range(150)), [1, 2, 3])]
    assert runs[0].token_ids == runs[2].token_ids
    assert all(0 <= token < 300 for run in runs for token in run.token_ids)
    assert all(len(run.token_ids) == 6 and run.seconds > 0 for run in runs)


def test_formats_are_those_of_a_precision_or_named() -> None:
    assert llama.formats_of("int4") == llama.formats_named("Q4_0/Q8_0") == ("Q4_0", "Q8_0")
    assert llama.formats_named("Q4_0") == ("Q4_0", "Q4_0")
    with pytest.raises(ValueError, match="no format for precision 'int3'"):
        llama.formats_of("int3")
    for name in ("Q3", "Q4_0/Q3"):
        with pytest.raises(ValueError, match="not written in 'Q3'; choose from F32"):
            llama.formats_named(name)


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "ended by SIGILL; where the processor has AMX",
        ),
        ("raise RuntimeError('no context')", "RuntimeError: no context"),
    ],
)
def test_a_peer_that_takes_its_process_down_is_left_out_with_the_reason(
    trial: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(llama, "TRIAL", trial)
    assert said in (llama.why_not_running(("Q4_0", "Q8_0")) or "")


def test_a_peer_that_runs_is_not_left_out() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    reason = llama.why_not_running(("BF16", "BF16"))
    assert reason is None or "SIGILL" in reason
