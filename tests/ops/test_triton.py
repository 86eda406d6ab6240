"""The Triton kernels against the float32 reference: in the interpreter on any machine, in bfloat16 on a real GPU.

The interpreter is slow and multiplies bfloat16 wrongly, so shapes are tiny there and values float32 or float16. Experts
that nobody activates hold NaN, and so do fresh buffers: reading either shows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blockffn.ops.active_experts import active_experts
from blockffn.ops.sparse_ffn import sparse_ffn

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 earlier"
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh buffers hold NaN, or the largest integer: a kernel that reads what nothing wrote fails."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_fresh_buffers_are_poisoned_in_these_tests() -> None:
    assert torch.empty(4, device=DEVICE).isnan().all()
    assert torch.ones(2, device=DEVICE).new_empty(4).isnan().all()


def layer(
    T: int, E: int, F: int, D: int, *, share: float = 0.4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x, up, down, weights`; about `share` of the pairs active, weights of either sign, unused experts all NaN."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(T, E, generator=g) * (torch.rand(T, E, generator=g) < share)
    up, down = torch.randn(E, F, D, generator=g) / D**0.5, torch.randn(E, F, D, generator=g) / F**0.5
    unused = (weights == 0).all(dim=0)
    up[unused] = down[unused] = float("nan")
    return tuple(t.to(DEVICE, dtype) for t in (torch.randn(T, D, generator=g), up, down, weights))  # type: ignore[return-value]


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert difference <= TOLERANCE[dtype], f"{name}: relative error {difference:.1e}"


def assert_equals_reference(x: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> None:
    y = sparse_ffn(x, up, down, weights, backend="triton")
    expected = sparse_ffn(x.float(), up.float(), down.float(), weights.float(), backend="reference")
    assert y.dtype == x.dtype
    assert_close("y", y, expected, x.dtype)


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 33, 64, 65, 70])
def test_any_number_of_tokens_equals_the_reference(T: int) -> None:
    assert_equals_reference(*layer(T, 5, 16, 48))


@pytest.mark.parametrize("T", [1, 3, 66])
@pytest.mark.parametrize(("E", "F", "D"), [(1, 16, 16), (3, 48, 80), (6, 32, 144)])
def test_odd_shapes_equal_the_reference(T: int, E: int, F: int, D: int) -> None:
    assert_equals_reference(*layer(T, E, F, D, share=0.6))


@pytest.mark.parametrize("T", [1, 4, 66])
def test_half_precision_equals_the_reference(T: int) -> None:
    assert_equals_reference(*layer(T, 4, 16, 32, dtype=torch.float16))


@pytest.mark.parametrize("T", [1, 3, 17, 66])
def test_all_experts_active_equals_the_reference(T: int) -> None:
    assert_equals_reference(*layer(T, 4, 16, 32, share=1.1))


@pytest.mark.parametrize("T", [0, 1, 3, 66])
def test_no_expert_active_gives_zero(T: int) -> None:
    y = sparse_ffn(*layer(T, 4, 16, 32, share=0.0), backend="triton")
    assert y.shape == (T, 32)
    assert (y == 0).all()


def gate_beside(up: Tensor, seed: int = 1) -> Tensor:
    """A gate for these experts, with their NaN."""
    gate = torch.randn(up.shape, generator=torch.Generator().manual_seed(seed)) / up.shape[-1] ** 0.5
    return torch.where(up.isnan(), up, gate.to(up))


@pytest.mark.parametrize("backend", ["triton", "triton_invariant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "share"), [(1, 0.4), (2, 0.4), (9, 1.1), (33, 0.4), (64, 1.1), (70, 0.4)])
def test_gated_experts_equal_the_reference(T: int, share: float, dtype: torch.dtype, backend: str) -> None:
    if T > 64 and backend == "triton":
        pytest.skip("refused, see below")
    x, up, down, weights = layer(T, 5, 64, 80, share=share, dtype=dtype)
    gate = gate_beside(up)
    y = sparse_ffn(x, up, down, weights, gate_proj_EFD=gate, backend=backend)
    arguments = (tensor.float() for tensor in (x, up, down, weights))
    expected = sparse_ffn(*arguments, gate_proj_EFD=gate.float(), backend="reference")
    assert_close("y", y, expected, dtype)


@pytest.mark.parametrize("T", [1, 3, 66])
def test_transposed_tokens_and_weights_equal_the_reference(T: int) -> None:
    x, up, down, weights = layer(T, 4, 16, 32)
    assert_equals_reference(x.T.contiguous().T, up, down, weights.T.contiguous().T)


@pytest.mark.parametrize("T", [1, 5])
def test_routing_weights_may_be_float32_beside_half_experts(T: int) -> None:
    x, up, down, weights = layer(T, 4, 16, 32, dtype=torch.float16)
    assert_equals_reference(x, up, down, weights.float())


def test_a_token_is_not_touched_by_experts_of_its_neighbours() -> None:
    x, up, down, weights = layer(3, 4, 16, 32, share=1.1)
    weights[0] = 0
    x[:2] = float("nan")  # that of token 1 poisons its hidden values, which share tiles with those of tokens 0 and 2
    y = sparse_ffn(x, up, down, weights, backend="triton")
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("T", [1, 6])
def test_repeated_calls_are_bit_equal(T: int) -> None:
    inputs = layer(T, 5, 32, 64)
    assert torch.equal(sparse_ffn(*inputs, backend="triton"), sparse_ffn(*inputs, backend="triton"))


@pytest.mark.parametrize(("T", "E", "F", "D"), [(2, 3, 64, 144), (9, 5, 96, 80), (17, 4, 32, 16), (33, 3, 128, 48)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.1])
def test_wide_blocks_equal_the_reference_however_large_the_union(T: int, E: int, F: int, D: int, share: float) -> None:
    from blockffn.ops.sparse_ffn.triton_union import choose_config, ffn_over_union

    inputs = layer(T, E, F, D, share=share, dtype=torch.float16)  # float32 has no wide blocks
    expected = sparse_ffn(*(t.float() for t in inputs), backend="reference")
    for wide_blocks in (0.0, 1.0, 100.0):  # every union takes them, large ones, none
        config = replace(choose_config(T, E), up_rows=16, wide_rows=64, wide_blocks=wide_blocks, splits=2)
        y = ffn_over_union(*inputs, config=config)
        assert_close(f"y with wide blocks from {wide_blocks} a processor", y, expected, torch.float16)


@pytest.mark.skipif(HAS_GPU, reason="a GPU's kernel is compiled with both")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("wide_blocks", "least"), [(0.3, 2), (0.5, 2), (0.6, 3), (1.0, 4)])
def test_a_union_with_enough_wide_blocks_takes_them(
    wide_blocks: float, least: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockffn.ops.sparse_ffn import triton_union

    # The interpreter has 4 processors, and an expert is one wide block.
    config = replace(triton_union.choose_config(17, 6), wide_rows=64, wide_blocks=wide_blocks)
    x, up, down, weights = layer(17, 6, 64, 16, share=1.1, dtype=torch.float16)
    gate = gate_beside(up) if gated else None
    for union, other in ((least - 1, "_wide_blocks"), (least, "_narrow_blocks")):
        active = torch.where(torch.arange(6) >= 6 - union, weights, 0)
        with monkeypatch.context() as patch:
            patch.delattr(triton_union, other)
            y = triton_union.ffn_over_union(x, up, down, active, gate_proj_EFD=gate, config=config)
        arguments = (tensor.float() for tensor in (x, up, down, active))
        expected = sparse_ffn(*arguments, gate_proj_EFD=None if gate is None else gate.float(), backend="reference")
        assert_close(f"y of a union of {union}", y, expected, torch.float16)


@pytest.mark.parametrize("E", [128, 300])
def test_a_chunk_finds_its_experts_however_many_there_are(E: int) -> None:
    x, up, down, weights = layer(3, E, 16, 16, share=1.1)
    for active in ([0], [E - 1], [0, 1, 127, E - 1]):
        chosen = torch.zeros_like(weights)
        chosen[:, active] = weights[:, active]
        chosen[1, active[0]] = 0
        for backend in ("triton", "triton_invariant"):
            y = sparse_ffn(x, up, down, chosen, backend=backend)
            assert_close(backend, y, sparse_ffn(x, up, down, chosen, backend="reference"), torch.float32)


@pytest.mark.parametrize("E", [31, 32, 33, 70])
def test_a_token_finds_its_experts_however_many_there_are(E: int) -> None:
    x, up, down, weights = layer(1, E, 16, 16, share=1.1)
    for active in ([0], [E - 1], [0, 30, E - 1]):
        chosen = torch.zeros_like(weights)
        chosen[0, active] = weights[0, active]
        assert_equals_reference(x, up, down, chosen)


@pytest.mark.parametrize("T", [0, 5, 33])
def test_batch_invariant_kernels_equal_the_reference(T: int) -> None:
    x, up, down, weights = layer(T, 4, 16, 48)
    y = sparse_ffn(x, up, down, weights, backend="triton_invariant")
    assert y.shape == x.shape
    assert_close("y", y, sparse_ffn(x, up, down, weights, backend="reference"), torch.float32)


def assert_every_token_as_if_alone(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, num_tokens: list[int]) -> None:
    def run(start: int, stop: int) -> Tensor:
        return sparse_ffn(x[start:stop], up, down, weights[start:stop], backend="triton_invariant")

    alone = torch.cat([run(t, t + 1) for t in range(x.shape[0])])
    for k in num_tokens:
        together = torch.cat([run(start, start + k) for start in range(0, x.shape[0], k)])
        assert torch.equal(together, alone), f"{k} tokens at once"


def test_batch_invariant_tokens_are_bit_equal_alone_and_together() -> None:
    # More experts than splits: by its rank in the union, an expert would change its split.
    assert_every_token_as_if_alone(*layer(4, 24, 16, 16, share=0.5), num_tokens=[3, 4])


def test_batch_invariance_is_refused_where_a_gradient_is_needed() -> None:
    x, up, down, weights = layer(2, 3, 16, 32)
    with pytest.raises(ValueError, match="no gradient"):
        sparse_ffn(x.requires_grad_(), up, down, weights, backend="triton_invariant")


@pytest.mark.parametrize(("T", "share"), [(1, 0.5), (6, 0.5), (70, 0.3), (70, 1.1), (6, 0.0)])
def test_every_gradient_equals_the_reference(T: int, share: float) -> None:
    x, up, down, weights = layer(T, 3, 48, 80, share=share)
    inputs = [t.nan_to_num().requires_grad_() for t in (x, up, down, weights)]
    dy = torch.randn(T, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    actual = torch.autograd.grad(sparse_ffn(*inputs, backend="triton"), inputs, dy)
    expected = torch.autograd.grad(sparse_ffn(*inputs, backend="reference"), inputs, dy)
    for name, a, e in zip(("x", "up_proj", "down_proj", "weights"), actual, expected, strict=True):
        assert_close(f"gradient of {name}", a, e, torch.float32)
    assert (actual[3][weights == 0] == 0).all()


@pytest.mark.parametrize(("T", "threshold"), [(0, 0.0), (1, 0.0), (9, 0.5), (1500, 1.0)])
def test_index_of_active_experts_equals_the_reference(T: int, threshold: float) -> None:
    weights = layer(T, 7, 16, 16)[3]
    if T > 1:
        weights[1, 2] = float("nan")
    actual = active_experts(weights, threshold=threshold, backend="triton")
    expected = active_experts(weights, threshold=threshold, backend="reference")
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        assert torch.equal(a, e), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"up": lambda t: t.double()}, "one dtype"),
        ({"down": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous"),
        ({"tokens": 65, "gate": lambda t: t}, "up to 64 tokens of gated experts, got 65"),
        ({"gate": lambda t: t.requires_grad_()}, "no gradient for gated experts"),
        ({"gate": lambda t: t.double()}, "one dtype"),
        ({"gate": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous"),
    ],
)
def test_what_it_cannot_take_is_refused_with_the_reason(change: dict, reason: str) -> None:
    x, up, down, weights = layer(change.get("tokens", 2), 3, 16, 32)
    gate = change["gate"](up.clone()) if "gate" in change else None
    up, down = change.get("up", lambda t: t)(up), change.get("down", lambda t: t)(down)
    with pytest.raises(ValueError, match=reason):
        sparse_ffn(x, up, down, weights, gate_proj_EFD=gate, backend="triton")


def test_widths_that_are_not_multiples_of_16_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16, got 40 and 16"):
        sparse_ffn(*layer(2, 3, 16, 40), backend="triton")


def test_ops_satisfy_the_contract_of_torch_library() -> None:
    inputs = layer(3, 3, 16, 32)
    torch.library.opcheck(torch.ops.blockffn.sparse_ffn_triton, inputs, test_utils=("test_schema", "test_faketensor"))
    invariant = torch.ops.blockffn.sparse_ffn_triton_invariant
    torch.library.opcheck(invariant, inputs, test_utils=("test_schema", "test_faketensor"))
    gated = (*inputs, gate_beside(inputs[1]))
    torch.library.opcheck(torch.ops.blockffn.sparse_ffn_triton, gated, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.blockffn.sparse_ffn_grouped, inputs, test_utils=("test_schema",))


@gpu
@needs_gpu
@pytest.mark.parametrize("T", [1, 2, 8, 16, 17, 32, 40, 64, 65, 500])
@pytest.mark.parametrize(
    ("E", "F", "D"), [(64, 128, 2048), (128, 128, 2048), (48, 64, 768), (48, 128, 1536), (512, 32, 256), (7, 48, 80)]
)
def test_bfloat16_equals_the_reference(T: int, E: int, F: int, D: int) -> None:
    assert_equals_reference(*layer(T, E, F, D, share=0.1 if E > 7 else 0.5, dtype=torch.bfloat16))


@gpu
@needs_gpu
@pytest.mark.parametrize("T", [1, 8, 32, 64, 100])
def test_float32_equals_the_reference_at_a_real_width(T: int) -> None:
    assert_equals_reference(*layer(T, 64, 128, 2048, share=0.1))


@gpu
@needs_gpu
@pytest.mark.parametrize("T", [8, 300, 2000])
def test_bfloat16_gradients_equal_the_reference(T: int) -> None:
    inputs = [t.nan_to_num().requires_grad_() for t in layer(T, 16, 128, 768, share=0.2, dtype=torch.bfloat16)]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    dy = torch.randn(T, 768, device=DEVICE, dtype=torch.bfloat16)
    actual = torch.autograd.grad(sparse_ffn(*inputs, backend="triton"), inputs, dy)
    expected = torch.autograd.grad(sparse_ffn(*wide, backend="reference"), wide, dy.float())
    for name, a, e in zip(("x", "up_proj", "down_proj", "weights"), actual, expected, strict=True):
        assert_close(f"gradient of {name}", a, e, torch.bfloat16)


@gpu
@needs_gpu
@pytest.mark.parametrize("T", [1, 8, 16, 32, 64, 200])
def test_a_cuda_graph_replays_with_new_routing(T: int) -> None:
    x, up, down, weights = (t.nan_to_num() for t in layer(T, 128, 64, 512, dtype=torch.bfloat16))
    sparse_ffn(x, up, down, weights, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_ffn(x, up, down, weights, backend="triton")
    for seed in range(3):
        x.copy_(layer(T, 128, 64, 512, seed=seed + 1)[0])
        weights.copy_(layer(T, 128, 64, 512, seed=seed + 1, share=0.1 + 0.4 * seed)[3])
        graph.replay()
        wide = (t.float() for t in (x, up, down, weights))
        assert_close("y", y, sparse_ffn(*wide, backend="reference"), torch.bfloat16)


@gpu
@needs_gpu
@pytest.mark.parametrize("T", [16, 24, 32, 48, 64])
@pytest.mark.parametrize(("E", "F", "D"), [(64, 128, 2048), (128, 128, 2048), (48, 64, 768), (40, 32, 256)])
@pytest.mark.parametrize("num_union", [1, 13, 0])
def test_bfloat16_equals_the_reference_at_either_block_size(T: int, E: int, F: int, D: int, num_union: int) -> None:
    x, up, down, weights = layer(T, E, F, D, share=1.1, dtype=torch.bfloat16)
    weights[:, num_union or E :] = 0
    assert_equals_reference(x, up, down, weights)


@gpu
@needs_gpu
@pytest.mark.parametrize("T", [1, 8, 32, 64])
def test_auto_takes_the_kernels_for_inference_on_the_gpu(T: int) -> None:
    inputs = layer(T, 8, 32, 64, dtype=torch.bfloat16)
    assert torch.equal(sparse_ffn(*inputs), sparse_ffn(*inputs, backend="triton"))


@gpu
@needs_gpu
@pytest.mark.parametrize(("E", "F", "D"), [(64, 128, 2048), (128, 128, 2048), (48, 64, 768)])
def test_bfloat16_tokens_are_bit_equal_alone_and_together(E: int, F: int, D: int) -> None:
    inputs = [t.nan_to_num() for t in layer(64, E, F, D, share=0.15, dtype=torch.bfloat16)]
    assert_every_token_as_if_alone(*inputs, num_tokens=[2, 3, 8, 17, 20, 32, 33, 64])


@gpu
@needs_gpu
def test_auto_takes_the_invariant_kernels_when_asked_for_batch_invariance() -> None:
    inputs = layer(3, 8, 32, 64, dtype=torch.bfloat16)
    expected = sparse_ffn(*inputs, backend="triton_invariant")
    assert torch.equal(sparse_ffn(*inputs, batch_invariant=True), expected)


@pytest.mark.parametrize("T", [3, 70])
def test_torch_compile_traces_forward_and_backward_whole(T: int) -> None:
    inputs = [t.nan_to_num().requires_grad_() for t in layer(T, 4, 16, 32)]

    def loss(*tensors: Tensor, backend: str) -> Tensor:
        return sparse_ffn(*tensors, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    actual = torch.autograd.grad(compiled(*inputs, backend="triton"), inputs)
    expected = torch.autograd.grad(loss(*inputs, backend="reference"), inputs)
    for name, a, e in zip(("x", "up_proj", "down_proj", "weights"), actual, expected, strict=True):
        assert_close(f"gradient of {name}", a, e, torch.float32)
