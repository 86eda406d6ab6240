"""The operations of a decode step: Triton kernels against their definitions, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from blockffn.ops.decode import kernels, reference
from blockffn.ops.decode.inputs import Router, StepInputs, visible_bits
from blockffn.ops.sparse_ffn import sparse_ffn

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def triton() -> ModuleType:
    return kernels(DEVICE, "triton")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh buffers hold NaN: a kernel that reads what nothing wrote fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def among_nan(tensor: Tensor) -> Tensor:
    """The same numbers in memory that holds NaN before and behind them."""
    whole = torch.full((tensor.numel() + (1 << 15),), float("nan"), dtype=tensor.dtype, device=tensor.device)
    part = whole[1 << 14 : -1 << 14].view(tensor.shape)
    return part.copy_(tensor)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers with NaN behind each row."""
    whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 6), float("nan"), dtype=tensor.dtype, device=DEVICE)
    return whole[..., :-6].copy_(tensor)


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert difference <= TOLERANCE.get(expected.dtype, 0.0), f"{name}: relative error {difference:.1e}"


def step_inputs(T: int, *, length: int, count: int | None = None, tree: bool = False) -> StepInputs:
    """A chain, or a tree in which token t hangs on token t // 2 - 1."""
    inputs, count = StepInputs(T, DEVICE), count or T
    inputs.fill(length, list(range(count)), [t // 2 - 1 for t in range(count)] if tree else None)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_branch", [False, True])
@pytest.mark.parametrize(("T", "D", "N"), [(1, 32, 7), (1, 48, 100), (1, 9000, 3), (2, 32, 700), (3, 20, 9)])
def test_norm_and_product(triton: ModuleType, T: int, D: int, N: int, has_branch: bool, dtype: torch.dtype) -> None:
    shapes = (T, D), (D,), (N, D), (N, D)
    x, norm, weight, up = (among_nan(randn(*shape, dtype=dtype) / D**0.25) for shape in shapes)
    residual = {"norm": norm, "eps": 1e-5, "branch": randn(T, D, dtype=dtype) if has_branch else None, "scale": 0.3}
    for name in ("add_norm", "norm_linear", "gated"):
        arguments = {"add_norm": (x,)}.get(name, (x, weight))
        given = residual | ({"up": up} if name == "gated" else {})
        function = "add_norm" if name == "add_norm" else "norm_linear"
        actual, expected = (getattr(ops, function)(*arguments, **given) for ops in (triton, reference))
        for i in range(2):
            assert_close(f"{name} {i}", actual[i], expected[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "N"), [(1, 30, 5), (1, 4500, 9), (2, 32, 8), (3, 4500, 9), (8, 17, 150), (9, 32, 8)]
)
def test_product(triton: ModuleType, T: int, D: int, N: int, dtype: torch.dtype) -> None:
    x, weight = among_nan(randn(T, D, dtype=dtype)), among_nan(randn(N, D, dtype=dtype))
    assert_close("product", triton.linear(x, weight), reference.linear(x, weight))
    wide = triton.linear(x, weight, float_output=True)
    assert wide.dtype == torch.float32
    tolerance = 1e-5 if T <= 8 else TOLERANCE[dtype]  # more tokens are rounded first
    assert (wide - reference.linear(x.float(), weight.float())).norm() <= tolerance * wide.norm()


def test_a_product_with_a_part_of_each_row(triton: ModuleType) -> None:
    rows = randn(5, 48, dtype=torch.float16)
    weight = randn(20, 32, dtype=torch.float16)
    assert_close("product", triton.linear(rows[:, 16:], weight), reference.linear(rows[:, 16:], weight))


def test_sums_and_norms_of_parts_of_rows(triton: ModuleType) -> None:
    x, branch, norm, weight = randn(3, 48)[:, 8:40], randn(3, 64)[:, :32], randn(32), randn(9, 32)
    residual = {"norm": norm, "eps": 1e-5, "branch": branch, "scale": 0.3}
    router = Router(weight, randn(9), eps=1e-6, float32=True, threshold=0.0)
    inputs, results = step_inputs(3, length=5), []
    for ops in (triton, reference):
        out = torch.empty(3, 9, device=DEVICE)
        routed = ops.norm_route(x, router, **residual, inputs=inputs, out=out)
        results.append((*ops.add_norm(x, **residual), *ops.norm_linear(x, weight, **residual), *routed, out))
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {i}", actual, expected)


def test_a_long_gated_product_takes_several_rounds(triton: ModuleType) -> None:
    x, norm, gate, up = randn(1, 32), randn(32), randn(3001, 32), randn(3001, 32)
    actual, expected = (ops.norm_linear(x, gate, norm=norm, eps=1e-5, up=up)[0] for ops in (triton, reference))
    assert_close("gated product", actual, expected)


half = pytest.mark.parametrize("dtype", DTYPES[1:])


def assert_rounded_alike(name: str, actual: Tensor, expected: Tensor) -> None:
    """Rounding more, less or elsewhere changes a tenth of the numbers and more; an order of sums hardly any."""
    assert actual.dtype == expected.dtype, name
    # Numbers that are not rounded at last differ by what float32 loses.
    limit = 1e-6 * expected.abs() if expected.dtype == torch.float32 else 0
    off = ((actual - expected).abs() > limit) | actual.isnan()
    assert torch.equal(actual == 0, expected == 0), name
    assert off.sum() <= 0.05 * (expected != 0).sum(), f"{name}: {int(off.sum())} of {off.numel()} numbers differ"


@half
@pytest.mark.parametrize("T", [1, 3])
def test_norms_are_rounded_where_the_definition_rounds(triton: ModuleType, T: int, dtype: torch.dtype) -> None:
    x, branch, norm = (randn(*shape, dtype=dtype) for shape in ((T, 48), (T, 48), (48,)))
    residual = {"norm": norm, "eps": 1e-5, "branch": branch, "scale": 0.5}
    total, normed = reference.add_norm(x, **residual)
    results = [*triton.add_norm(x, **residual), *triton.norm_linear(x, torch.eye(48).to(x), **residual)]
    for i, expected in enumerate((total, normed, normed, total)):
        assert_rounded_alike(f"result {i}", results[i], expected)


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize(("T", "count", "E"), [(1, 1, 6), (1, 1, 130), (4, 3, 9), (27, 27, 130)])
def test_routing(triton: ModuleType, T: int, count: int, E: int, threshold: float, float32: bool) -> None:
    x, branch, norm, weight, router_norm = randn(T, 32), randn(T, 32), randn(32), randn(E, 32), randn(E)
    inputs = step_inputs(T, length=5, count=count)
    results = []
    for ops in (triton, reference):
        out = torch.full((T, E), float("nan"), device=DEVICE)
        router = Router(weight, router_norm, 1e-6, float32, threshold)
        residual = ops.norm_route(x, router, norm=norm, eps=1e-5, branch=branch, scale=0.3, inputs=inputs, out=out)
        results.append((*residual, out, ops.count_active(out[None])))
    for name, actual, expected in zip(("sum", "normed", "weights", "counts"), *results, strict=True):
        assert_close(name, actual, expected)
    assert (results[0][2][count:] == 0).all()
    assert ((results[0][2][:count] == 0) == (results[1][2][:count] == 0)).all()


def exact_logits(T: int, E: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for a router whose logits are one product each: no order of sums can change them."""
    x, branch = (randn(T, 32, dtype=dtype) for _ in range(2))
    weight = torch.zeros(E, 32)
    weight[torch.arange(E), torch.randperm(32)[:E]] = torch.randn(E)
    given = {"norm": randn(32, dtype=dtype), "eps": 1e-5, "branch": branch, "scale": 0.5}
    return {"x": x, "weight": weight.to(DEVICE, dtype), "router_norm": randn(E, dtype=dtype), "given": given}


def routing_weights(
    ops: ModuleType, *, x: Tensor, weight: Tensor, router_norm: Tensor, given: dict[str, Any], float32: bool,
    out_dtype: torch.dtype, threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    out = torch.full((len(x), len(weight)), float("nan"), device=DEVICE, dtype=out_dtype)
    router = Router(weight, router_norm, 1e-6, float32, threshold)
    ops.norm_route(x, router, **given, inputs=step_inputs(len(x), length=5), out=out)
    return out


@half
@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("T", [1, 5])
def test_routing_is_rounded_where_the_definition_rounds(
    triton: ModuleType, T: int, float32: bool, dtype: torch.dtype
) -> None:
    router = exact_logits(T, 20, dtype)
    for out_dtype in (dtype, torch.float32):
        actual, expected = (
            routing_weights(ops, **router, float32=float32, out_dtype=out_dtype) for ops in (triton, reference)
        )
        assert_rounded_alike(f"weights in {out_dtype}", actual, expected)


@half
@pytest.mark.parametrize("rounds_up", [False, True])
def test_a_weight_meets_the_threshold_before_it_is_rounded(
    triton: ModuleType, rounds_up: bool, dtype: torch.dtype
) -> None:
    router = exact_logits(5, 20, dtype) | {"float32": True}
    exact = routing_weights(reference, **router, out_dtype=torch.float32)
    error = (exact.to(dtype).float().abs() - exact.abs()) * (1 if rounds_up else -1)
    found = int((error / exact.abs().clamp_min(1e-3)).argmax())
    threshold = float((exact.abs() + exact.to(dtype).float().abs()).flatten()[found]) / 2
    actual = routing_weights(triton, **router, out_dtype=dtype, threshold=threshold)
    assert (actual.flatten()[found] == 0) == rounds_up
    expected = routing_weights(reference, **router, out_dtype=dtype, threshold=threshold)
    assert torch.equal(actual == 0, expected == 0)


@pytest.mark.parametrize("T", [1, 3])
def test_a_weight_as_large_as_the_threshold_is_inactive(triton: ModuleType, T: int) -> None:
    x, weight = torch.full((T, 32), 2.0, device=DEVICE), torch.eye(4, 32, device=DEVICE)
    router = Router(weight, torch.tensor([0.5, 0.75, -0.5, 0.25], device=DEVICE), 0.0, False, threshold=0.5)
    out, norm = torch.empty(T, 4, device=DEVICE), torch.ones(32, device=DEVICE)
    triton.norm_route(x, router, norm=norm, eps=0.0, inputs=step_inputs(T, length=5), out=out)
    assert out.tolist() == [[0.0, 0.75, 0.0, 0.0]] * T


@dataclass
class Routed:
    """A router and its experts, on `x [T, D]`."""

    x: Tensor
    router: Router
    up_proj: Tensor
    down_proj: Tensor
    given: dict[str, Any]

    @classmethod
    def random(
        cls, T: int, E: int, *, count: int | None = None, dtype: torch.dtype = torch.float32, branch: bool = True,
        **changes: Any,
    ) -> Self:  # fmt: skip
        x, weight, up, down = (randn(*s, dtype=dtype) for s in ((T, 48), (E, 48), (E, 32, 48), (E, 32, 48)))
        router = Router(weight, randn(E, dtype=dtype), eps=1e-6, float32=True, threshold=0.0)
        given = {
            "norm": randn(48, dtype=dtype), "eps": 1e-5, "branch": randn(T, 48, dtype=dtype) if branch else None,
            "scale": 0.3, "inputs": step_inputs(T, length=5, count=count),
        }  # fmt: skip
        return cls(x, replace(router, **changes), up, down, given)

    def route(self, ops: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
        """The residual sum, the routing weights and the norm."""
        out = torch.full((len(self.x), len(self.router.weight)), float("nan"), device=DEVICE, dtype=self.x.dtype)
        total, normed = ops.norm_route(self.x, self.router, **self.given, out=out)
        return total, out, normed

    def run(self, ops: ModuleType, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """The residual sum, the routing weights and the experts' output."""
        out = torch.full((len(self.x), len(self.router.weight)), float("nan"), device=DEVICE, dtype=self.x.dtype)
        experts = {"up_proj": self.up_proj, "down_proj": self.down_proj, "backend": backend}
        total, y = ops.norm_route_experts(self.x, self.router, **self.given, out=out, **experts)
        return total, out, y

    def check(self, triton: ModuleType) -> Tensor:
        """Compare with the definition while experts that no token activates hold NaN; the routing weights."""
        idle = (self.route(reference)[1] == 0).all(dim=0)
        self.up_proj[idle] = self.down_proj[idle] = float("nan")
        actual, expected = self.run(triton, "triton"), self.run(reference, "reference")
        for name, a, e in zip(("sum", "weights", "output"), actual, expected, strict=True):
            assert_close(name, a, e)
        assert torch.equal(actual[1] == 0, expected[1] == 0)
        return actual[1]


@pytest.fixture
def only_one_token_kernels(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that norms logits apart, which other numbers of tokens take, fails."""
    from blockffn.ops.decode import triton_route

    monkeypatch.delattr(triton_route, "_route_kernel")


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("E", [1, 5, 40, 128])
@pytest.mark.usefixtures("only_one_token_kernels")
def test_routing_and_experts_of_one_token(triton: ModuleType, E: int, threshold: float, float32: bool) -> None:
    weights = Routed.random(1, E, threshold=threshold, float32=float32).check(triton)
    assert (weights[weights != 0].abs() > threshold).all()


@pytest.mark.usefixtures("only_one_token_kernels")
def test_experts_of_one_token_under_a_norm_of_either_sign(triton: ModuleType) -> None:
    assert (Routed.random(1, 5, norm=-torch.ones(5, device=DEVICE), branch=False).check(triton) <= 0).all()


@pytest.mark.usefixtures("only_one_token_kernels")
def test_a_token_without_an_active_expert_gets_zero(triton: ModuleType) -> None:
    routed = Routed.random(1, 5, threshold=1e3)
    assert (routed.check(triton) == 0).all()
    assert (routed.run(triton, "triton")[2] == 0).all()


@pytest.mark.usefixtures("only_one_token_kernels")
def test_a_damaged_router_is_not_hidden_by_the_experts(triton: ModuleType) -> None:
    routed = Routed.random(1, 5)
    routed.router.weight[2, 3] = float("nan")
    _, weights, y = routed.run(triton, "triton")
    assert weights.isnan().all()
    assert y.isnan().all()


@pytest.mark.parametrize("E", [5, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float32", [False, True])
def test_experts_of_one_token_get_the_bits_that_routing_apart_gives_them(
    triton: ModuleType, float32: bool, dtype: torch.dtype, E: int
) -> None:
    routed = Routed.random(1, E, dtype=dtype, float32=float32)
    total, weights, y = routed.run(triton, "triton")
    expected, expected_weights, normed = routed.route(triton)
    assert torch.equal(total, expected)
    if not HAS_GPU:  # there the two sum in another order
        assert torch.equal(weights, expected_weights)
    assert torch.equal(y, sparse_ffn(normed, routed.up_proj, routed.down_proj, weights, backend="triton"))


@pytest.mark.parametrize("count", [3, 4])
def test_routing_and_experts_of_several_tokens(triton: ModuleType, count: int) -> None:
    assert (Routed.random(4, 5, count=count).check(triton)[count:] == 0).all()


@pytest.mark.parametrize("backend", ["dense", "reference", "triton_invariant"])
def test_experts_of_one_token_obey_their_backend(triton: ModuleType, backend: str) -> None:
    routed = Routed.random(1, 5)
    _, weights, y = routed.run(triton, backend)
    normed = routed.route(triton)[2]
    assert torch.equal(y, sparse_ffn(normed, routed.up_proj, routed.down_proj, weights, backend=backend))


def test_experts_that_ask_for_gradients_get_them(triton: ModuleType) -> None:
    routed = Routed.random(1, 5)
    routed.up_proj.requires_grad_()
    routed.run(triton, "triton")[2].sum().backward()
    assert routed.up_proj.grad is not None


def test_experts_of_a_wrong_shape_are_an_error(triton: ModuleType) -> None:
    routed = Routed.random(1, 5)
    routed.up_proj = routed.up_proj[:4]
    for ops in (triton, reference):
        with pytest.raises(ValueError, match="down_proj has shape"):
            routed.run(ops, "triton")


def test_counts_of_several_layers(triton: ModuleType) -> None:
    weights = randn(3, 5, 11) * (randn(3, 5, 11) > 0.8)
    assert torch.equal(triton.count_active(weights), reference.count_active(weights))


@pytest.mark.parametrize("V", [1, 61, 1024, 5000])
def test_the_best_token_goes_to_the_next_step(triton: ModuleType, V: int) -> None:
    for ops in (triton, reference):
        inputs, chosen = step_inputs(1, length=6), torch.full((2,), -1, device=DEVICE)
        for length in (7, 8):
            logits = randn(1, V)
            ops.advance(logits, inputs, chosen)
            expected = StepInputs(1, DEVICE)
            expected.fill(length, [int(logits.argmax())])
            assert torch.equal(inputs.data, expected.data)
            assert chosen[(length - 1) % 2] == inputs.tokens
        assert (chosen >= 0).all()  # that of the first step is still there
        assert inputs.counter == 0


@pytest.mark.parametrize("values", [
    [(0, -1.0), (3, 2.0), (2000, 2.0)], [(5, -0.0), (9, 0.0)], [(1, 7.0), (1500, float("nan")), (1600, float("nan"))],
    [(4, float("inf")), (7, 3e38)], [], [(1999, -3e38)],
])  # fmt: skip
def test_the_best_token_is_that_of_argmax(triton: ModuleType, values: list[tuple[int, float]]) -> None:
    logits = torch.full((1, 2001), float("-inf"), device=DEVICE)
    for index, value in values:
        logits[0, index] = value
    chosen = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    triton.advance(logits, step_inputs(1, length=1), chosen)
    assert chosen[1] == logits.cpu().argmax()


def test_a_damaged_router_is_not_hidden(triton: ModuleType) -> None:
    weight = randn(6, 32)
    weight[2, 3] = float("nan")
    out = torch.zeros(1, 6, device=DEVICE)
    router = Router(weight, randn(6), eps=1e-6, float32=True, threshold=0.0)
    triton.norm_route(randn(1, 32), router, norm=randn(32), eps=1e-5, inputs=step_inputs(1, length=0), out=out)
    assert out.isnan().any()


# The last but one fills the cache to its last row.
CASES = [(1, 1, 0), (1, 1, 1), (1, 1, 63), (1, 1, 130), (4, 3, 64), (8, 7, 200), (16, 16, 3), (8, 7, 249), (64, 50, 40)]


def check_grouped(
    triton: ModuleType, inputs: StepInputs, length: int, sizes: tuple[int, int, int], rows: int, dtype: torch.dtype,
    laid_out: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:  # fmt: skip
    (heads, kv_heads, width), count = sizes, int(inputs.count)
    qkv = laid_out(randn(inputs.num_tokens, (heads + 2 * kv_heads) * width, dtype=dtype))
    caches = tuple(map(laid_out, committed_cache(length, rows, 2 * kv_heads * width, dtype)))
    tables = tables_of(rows, width, dtype)
    results = [
        ops.grouped_attention(qkv, cache, *tables, inputs, heads=heads, scaling=width**-0.5)[:count]
        for ops, cache in zip((triton, reference), caches, strict=True)
    ]
    check_results(results, caches, inputs, length + count)


def check_latent(
    triton: ModuleType, inputs: StepInputs, length: int, sizes: tuple[int, int, int], rows: int, dtype: torch.dtype,
    laid_out: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:  # fmt: skip
    (heads, rank, rope), count, T, nope = sizes, int(inputs.count), inputs.num_tokens, 6
    wide = randn(T, 8 + rank + rope, dtype=dtype)  # latents are a slice of a wider product
    shapes = ((heads, T, rank), (T, heads, nope + rope), (rank,))
    q_latent, q, norm = (laid_out(randn(*shape, dtype=dtype)) for shape in shapes)
    caches = tuple(map(laid_out, committed_cache(length, rows, rank + rope, dtype)))
    given = {"norm": norm, "eps": 1e-6, "scaling": (rank + rope) ** -0.5}
    results = [
        ops.latent_attention(q_latent, q, wide[:, 8:], cache, *tables_of(rows, rope, dtype), inputs, **given)[:count]
        for ops, cache in zip((triton, reference), caches, strict=True)
    ]
    check_results(results, caches, inputs, length + count)
    if dtype != torch.float32:
        assert_rounded_alike("latents", *(cache[length : length + count, :rank] for cache in caches))


def check_results(results: list[Tensor], caches: tuple[Tensor, ...], inputs: StepInputs, end: int) -> None:
    assert_close("attention", *results)
    assert_close("cache", *(cache[:end] for cache in caches))
    assert caches[0][end:].isnan().all()  # neither padding nor a guess is written


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(("T", "count", "length"), CASES)
def test_grouped_attention(triton: ModuleType, T: int, count: int, length: int, tree: bool) -> None:
    check_grouped(triton, step_inputs(T, length=length, count=count, tree=tree), length, (4, 2, 10), 256, torch.float32)


def test_attention_of_a_token_whose_scores_are_far_below_zero_is_a_mean(triton: ModuleType) -> None:
    qkv = randn(1, 3 * 16)
    qkv[:, 16:32] = -qkv[:, :16]
    (cache, _), tables = committed_cache(0, 4, 32, torch.float32), tables_of(4, 16, torch.float32)
    out = triton.grouped_attention(qkv, cache, *tables, step_inputs(1, length=0), heads=1, scaling=1e3)
    assert_close("output", out, qkv[:, 32:])


@pytest.mark.parametrize(("T", "count", "length"), CASES)
def test_latent_attention(triton: ModuleType, T: int, count: int, length: int) -> None:
    check_latent(triton, step_inputs(T, length=length, count=count, tree=True), length, (3, 10, 4), 256, torch.float32)


@half
@pytest.mark.parametrize(("T", "count", "length"), [(1, 1, 130), (5, 4, 64), (64, 50, 3)])
def test_attention_in_half_precision(triton: ModuleType, T: int, count: int, length: int, dtype: torch.dtype) -> None:
    inputs = step_inputs(T, length=length, count=count, tree=True)
    check_grouped(triton, inputs, length, (4, 2, 10), 256, dtype)
    check_latent(triton, inputs, length, (3, 10, 4), 256, dtype)


def test_attention_over_parts_of_rows(triton: ModuleType) -> None:
    inputs = step_inputs(4, length=40, tree=True)
    check_grouped(triton, inputs, 40, (4, 2, 10), 64, torch.float32, with_gaps)
    check_latent(triton, inputs, 40, (3, 10, 4), 64, torch.float32, with_gaps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 500, 3000])
@pytest.mark.parametrize(("T", "count"), [(1, 1), (8, 7), (32, 32), (64, 40)])
def test_attention_at_real_widths(triton: ModuleType, T: int, count: int, length: int, dtype: torch.dtype) -> None:
    inputs = step_inputs(T, length=length, count=count, tree=True)
    check_grouped(triton, inputs, length, (16, 4, 128), 4096, dtype)
    check_latent(triton, inputs, length, (12, 256, 64), 4096, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 8, 16])
def test_products_at_real_widths(triton: ModuleType, T: int, dtype: torch.dtype) -> None:
    norm = randn(2048, dtype=dtype)
    for N, D in ((3072, 2048), (10960, 2048), (2048, 10960)):
        x, weight, up = (randn(*shape, dtype=dtype) / D**0.25 for shape in ((T, D), (N, D), (N, D)))
        assert_close(f"{N} x {D}", triton.linear(x, weight), reference.linear(x, weight))
        if len(norm) == D:
            actual, expected = (ops.norm_linear(x, weight, norm=norm, eps=1e-5, up=up) for ops in (triton, reference))
            assert_close(f"gated {N} x {D}", actual[0], expected[0])


def committed_cache(length: int, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same twice: random committed rows; others are NaN for kernels, and 0 for the definition, which masks."""
    cache = torch.zeros(rows, width)
    cache[:length] = torch.randn(length, width)
    poisoned = cache.clone()
    poisoned[length:] = float("nan")
    return poisoned.to(DEVICE, dtype), cache.to(DEVICE, dtype)


def tables_of(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows)[:, None] * torch.logspace(0, -2, width // 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


@pytest.mark.parametrize("count", [1, 5, 64])
def test_inputs_from_the_device_are_those_from_the_host(count: int) -> None:
    parents = [t // 3 - 1 for t in range(count)]
    tokens = list(range(7, 7 + count))
    ancestors = torch.eye(count, dtype=torch.bool)
    for t, parent in enumerate(parents):
        ancestors[t] |= ancestors[parent] if parent >= 0 else ancestors[t]
    host, device = StepInputs(64, DEVICE), StepInputs(64, DEVICE)
    host.fill(5, tokens, parents)
    device.fill_on_device(5, torch.tensor(tokens, device=DEVICE), ancestors.to(DEVICE))
    assert torch.equal(host.data, device.data)


def test_visible_bits_reach_the_sign() -> None:
    bits = visible_bits(torch.ones(64, 64).tril().bool())
    assert bits[0] == 1
    assert bits[62] == 2**63 - 1
    assert bits[63] == -1
    inputs = StepInputs(64, DEVICE)
    inputs.fill(0, [0] * 64)
    assert torch.equal(inputs.visible.cpu(), bits)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        kernels(DEVICE, "fast")
