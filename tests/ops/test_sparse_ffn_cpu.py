"""The native CPU kernels agree with the definition on odd shapes, whatever they find in memory and who else is calling.

`BLOCKFFN_CPU_ISA` chooses the kernels; `test_native.py` runs this file once for each instruction set.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockffn.ops import native
from blockffn.ops.native import FORMATS
from blockffn.ops.quantization import PackedExperts, pack_experts
from blockffn.ops.sparse_ffn import sparse_ffn, sparse_ffn_packed
from blockffn.ops.sparse_ffn.cpu import PackedStep

from .layers import TOLERANCE, Layer, assert_close

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")

# (T, E, F, D): odd numbers of tokens and experts, widths below, at and beside multiples of 32 and of the groups.
SHAPES = [
    (1, 1, 8, 16),
    (1, 6, 64, 96),
    (2, 5, 40, 72),
    (3, 4, 128, 160),
    (7, 3, 32, 33),
    (33, 9, 24, 64),
    (70, 4, 16, 40),
]


def pack(layer: Layer, format: str, gated: bool) -> PackedExperts:
    gate = layer.gate_proj_EFD if gated else None
    return pack_experts(layer.up_proj_EFD, layer.down_proj_EFD, gate_proj_EFD=gate, format=format)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_experts_agree_with_reference(shape: tuple[int, ...], dtype: torch.dtype, gated: bool) -> None:
    layer = Layer.random(*shape)
    x, up, down = layer.x_TD.to(dtype), layer.up_proj_EFD.to(dtype), layer.down_proj_EFD.to(dtype)
    gate = layer.gate_proj_EFD.to(dtype) if gated else None
    arguments = (x, up, down, layer.weights_TE)
    y = sparse_ffn(*arguments, gate_proj_EFD=gate, backend="cpu")
    assert y.dtype == dtype
    expected = sparse_ffn(x.float(), up, down, layer.weights_TE, gate_proj_EFD=gate, backend="reference")
    assert_close("y", y, expected, 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_experts_agree_with_reference(shape: tuple[int, ...], format: str, gated: bool) -> None:
    layer = Layer.random(*shape)
    experts = pack(layer, format, gated)
    y = sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="cpu")
    expected = sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="reference")
    assert_close("y", y, expected, TOLERANCE[format])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 20),
    E=st.integers(1, 9),
    F=st.integers(1, 9).map(lambda n: 8 * n),
    D=st.integers(1, 100),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    format=st.sampled_from(sorted(FORMATS)),
    gated=st.booleans(),
)
def test_any_shape_agrees_with_reference(
    T: int, E: int, F: int, D: int, share: float, format: str, gated: bool
) -> None:
    assume(D >= 24 or format in ("f32", "bf16"))  # the rounding of activations averages out over many outputs only
    layer = Layer.random(T, E, F, D, active_share=share, seed=T + E)
    experts = pack(layer, format, gated)
    y = sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="cpu")
    expected = sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="reference")
    assert_close("y", y, expected, 2 * TOLERANCE[format])  # a single group has fewer roundings to average over


@pytest.mark.parametrize("format", FORMATS)
def test_no_active_expert_gives_zero(format: str) -> None:
    layer = Layer.random(3, 4, 32, 48)
    experts = pack_experts(layer.up_proj_EFD, layer.down_proj_EFD, format=format)
    weights = torch.zeros(3, 4)
    assert sparse_ffn_packed(layer.x_TD, experts, weights, backend="cpu").eq(0).all()
    assert sparse_ffn(layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, weights, backend="cpu").eq(0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_inactive_experts_are_never_read(gated: bool) -> None:
    """An expert of weight 0 contributes exactly nothing even if its weights are NaN."""
    layer = Layer.random(5, 6, 32, 48, active_share=1.0)
    layer.weights_TE[:, 2] = 0
    for poisoned in (layer.up_proj_EFD, layer.down_proj_EFD, layer.gate_proj_EFD):
        poisoned[2] = float("nan")
    experts = pack(layer, "bf16", gated)
    assert sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="cpu").isfinite().all()
    arguments = (layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE)
    gate = layer.gate_proj_EFD if gated else None
    assert sparse_ffn(*arguments, gate_proj_EFD=gate, backend="cpu").isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_nan_in_one_token_stays_in_that_token(format: str, gated: bool) -> None:
    layer = Layer.random(9, 4, 32, 64, active_share=0.7)
    layer.x_TD[4, 7] = float("nan")
    experts = pack(layer, format, gated)
    is_nan = sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="cpu").isnan()
    assert is_nan[4].all()
    assert is_nan.sum() == 64


def test_nan_routing_weight_is_seen_and_not_dropped() -> None:
    layer = Layer.random(2, 3, 32, 64, active_share=1.0)
    layer.weights_TE[1, 0] = float("nan")
    y = sparse_ffn(layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE, backend="cpu")
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("gated", [False, True])
def test_large_hidden_values_do_not_overflow(gated: bool) -> None:
    layer = Layer.random(2, 3, 32, 64, active_share=1.0)
    arguments = (layer.x_TD, layer.up_proj_EFD * 1e4, layer.down_proj_EFD, layer.weights_TE)
    gate = layer.gate_proj_EFD * 1e4 if gated else None
    y = sparse_ffn(*arguments, gate_proj_EFD=gate, backend="cpu")
    expected = sparse_ffn(*arguments, gate_proj_EFD=gate, backend="reference")
    assert_close("y", y, expected, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend_of", ["plain", *FORMATS])
def test_one_token_and_many_tokens_round_alike(backend_of: str, gated: bool) -> None:
    """Batch-invariant: bit-equal whatever other tokens share the call, so speculation can be lossless."""
    layer = Layer.random(19, 6, 48, 96, active_share=0.5)
    experts = pack(layer, "bf16" if backend_of == "plain" else backend_of, gated)
    projections, gate = (layer.up_proj_EFD, layer.down_proj_EFD), layer.gate_proj_EFD if gated else None

    def run(tokens: slice) -> torch.Tensor:
        x, weights = layer.x_TD[tokens], layer.weights_TE[tokens]
        if backend_of == "plain":
            return sparse_ffn(x, *projections, weights, gate_proj_EFD=gate, batch_invariant=True)
        return sparse_ffn_packed(x, experts, weights, batch_invariant=True)

    together = run(slice(None))
    for token in range(19):
        assert torch.equal(run(slice(token, token + 1))[0], together[token]), f"token {token} rounds differently"
    assert torch.equal(torch.cat([run(slice(0, 8)), run(slice(8, 19))]), together)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_number_of_threads_does_not_change_a_bit(format: str, gated: bool) -> None:
    layer = Layer.random(6, 8, 128, 512)
    experts = pack(layer, format, gated)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_concurrent_callers_do_not_disturb_each_other() -> None:
    layers = [Layer.random(T, 6, 64, 256, seed=T) for T in range(1, 9)]
    packed = [pack_experts(layer.up_proj_EFD, layer.down_proj_EFD, format="int8") for layer in layers]

    def run(index: int) -> torch.Tensor:
        return sparse_ffn_packed(layers[index].x_TD, packed[index], layers[index].weights_TE, backend="cpu")

    expected = [run(index) for index in range(len(layers))]
    with ThreadPoolExecutor(4) as pool:
        for index, result in enumerate(pool.map(run, list(range(len(layers))) * 20)):
            assert torch.equal(result, expected[index % len(layers)])


def test_rows_apart_in_memory_are_read_where_they_are() -> None:
    layer = Layer.random(4, 5, 32, 64)
    x = torch.full((4, 200), float("nan"))
    x[:, 10:74] = layer.x_TD
    weights = torch.full((4, 9), float("nan"))
    weights[:, 2:7] = layer.weights_TE
    up, down = layer.up_proj_EFD, layer.down_proj_EFD
    y = sparse_ffn(x[:, 10:74], up, down, weights[:, 2:7], backend="cpu")
    assert torch.equal(y, sparse_ffn(layer.x_TD, up, down, layer.weights_TE, backend="cpu"))
    assert torch.equal(y, sparse_ffn(layer.x_TD.T.contiguous().T, up, down, layer.weights_TE, backend="cpu"))


def test_threshold_skips_small_weights_of_either_sign() -> None:
    layer = Layer.random(4, 5, 32, 64, active_share=1.0)
    experts = pack_experts(layer.up_proj_EFD, layer.down_proj_EFD, format="f32")
    kept = torch.where(layer.weights_TE.abs() <= 0.7, 0, layer.weights_TE)
    assert 0 < kept.count_nonzero() < kept.numel()
    expected = sparse_ffn_packed(layer.x_TD, experts, kept, backend="cpu")
    assert torch.equal(sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, threshold=0.7, backend="cpu"), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_bound_step_equals_the_op(gated: bool) -> None:
    layer = Layer.random(3, 5, 64, 96)
    experts = pack(layer, "int4", gated)
    step = PackedStep(experts, 3, dtype=torch.float32)
    for scale in (1.0, 2.0):
        step.x.copy_(layer.x_TD * scale)
        step.weights.copy_(layer.weights_TE)
        step()
        assert torch.equal(step.y, sparse_ffn_packed(layer.x_TD * scale, experts, layer.weights_TE, backend="cpu"))
    with pytest.raises(ValueError, match="float64"):
        PackedStep(experts, 3, dtype=torch.float64)


@pytest.mark.parametrize("gated", [False, True])
def test_ops_pass_opcheck(gated: bool) -> None:
    layer = Layer.random(3, 5, 32, 64)
    experts = pack(layer, "int8", gated)
    plain = (layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE)
    torch.library.opcheck(torch.ops.blockffn.sparse_ffn_plain, (*plain, layer.gate_proj_EFD if gated else None))
    torch.library.opcheck(
        torch.ops.blockffn.sparse_ffn_packed,
        (layer.x_TD, experts.data, layer.weights_TE, 2, 32, gated, experts.up.group_size, experts.down.group_size, 0.0),
    )


def test_gradients_are_refused_with_the_remedy() -> None:
    layer = Layer.random(2, 3, 32, 64)
    x = layer.x_TD.requires_grad_()
    with pytest.raises(ValueError, match="no gradient; use backend='dense'"):
        sparse_ffn(x, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE, backend="cpu")
    assert sparse_ffn(x, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE).requires_grad
    with torch.no_grad():
        sparse_ffn(x, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE, backend="cpu")


def test_mixed_dtypes_are_refused_with_both_names() -> None:
    layer = Layer.random(2, 3, 32, 64)
    with pytest.raises(ValueError, match=r"torch\.float32 and torch\.bfloat16"):
        sparse_ffn(layer.x_TD, layer.up_proj_EFD.bfloat16(), layer.down_proj_EFD, layer.weights_TE, backend="cpu")


def test_wrong_shapes_of_packed_calls_name_the_tensor() -> None:
    layer = Layer.random(2, 3, 32, 64)
    experts = pack_experts(layer.up_proj_EFD, layer.down_proj_EFD)
    with pytest.raises(ValueError, match=r"x has shape \(2, 63\)"):
        sparse_ffn_packed(layer.x_TD[:, :63], experts, layer.weights_TE)
    with pytest.raises(ValueError, match=r"weights has shape \(1, 3\)"):
        sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE[:1])
    with pytest.raises(ValueError, match="-1"):
        sparse_ffn_packed(layer.x_TD, experts, layer.weights_TE, threshold=-1.0)
