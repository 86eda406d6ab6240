"""The GPU backend: one token, a chunk of up to 64, or grouped products for more; for inference and for training.

No launch synchronises with the host and every path can be captured in a CUDA graph. Triton itself is imported at the
first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockffn.ops.gpu import has_dependent_launch, refuses_device
from blockffn.ops.registration import define

MAX_EXPERTS = 512
MAX_CHUNK = 64
MAX_AUTO_TOKENS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses_triton(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> str | None:
    """Why the Triton kernels cannot take these tensors, or `None`."""
    if gate_proj_EFD is not None and len(x_TD) > MAX_CHUNK:
        return f"it takes up to {MAX_CHUNK} tokens of gated experts, got {len(x_TD)}; use backend='dense'"
    return _refuses_tensors(x_TD, up_proj_EFD, down_proj_EFD, weights_TE, gate_proj_EFD=gate_proj_EFD)


def _refuses_tensors(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, *, gate_proj_EFD: Tensor | None
) -> str | None:
    projections = (up_proj_EFD, down_proj_EFD, *([] if gate_proj_EFD is None else [gate_proj_EFD]))
    (E, F, D), tensors = up_proj_EFD.shape, (x_TD, *projections, weights_TE)
    if gate_proj_EFD is not None and needs_gradient(*tensors):
        return "it has no gradient for gated experts; use backend='dense'"
    reason = refuses_device(x_TD.device)
    if reason is not None:
        return reason
    if any(tensor.device != x_TD.device for tensor in tensors):
        return f"it needs all tensors on one device, got {sorted({str(tensor.device) for tensor in tensors})}"
    if x_TD.dtype not in DTYPES or any(proj.dtype != x_TD.dtype for proj in projections):
        dtypes = ", ".join(str(proj.dtype) for proj in projections)
        return f"it needs x and experts of one dtype, bfloat16, float16 or float32; got {x_TD.dtype} and {dtypes}"
    if not all(proj.is_contiguous() for proj in projections):
        return "it needs contiguous expert weights; call .contiguous() once when they are loaded"
    if D % 16 or F % 16:
        return f"it needs D and F to be multiples of 16, got {D} and {F}; use backend='dense'"
    if E > MAX_EXPERTS:
        return f"it takes up to {MAX_EXPERTS} experts, got {E}; use backend='dense'"
    return None


def pays_triton(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> bool:
    """Whether `auto` takes these kernels: for inference on up to 64 tokens, in float32 up to 32.

    Neither float32 nor gated experts were measured.

    The union, which the host cannot know without waiting for the GPU, does not matter: with every expert in it, 16 to
    32 tokens took 0.82 to 0.98 and 64 tokens 1.02 to 1.04 times as long as the dense product in bfloat16 (launch shapes
    tuned on an H100, D 2048). More tokens and training pay only where a small share of the pairs is active; name the
    backend there.
    """
    tensors = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    limit = MAX_AUTO_TOKENS.get(x_TD.dtype, 0)
    return x_TD.device.type == "cuda" and x_TD.shape[0] <= limit and not needs_gradient(*tensors)


def sparse_ffn_triton(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> Tensor:
    """The sparse FFN on the GPU; shapes as in the op's contract, differentiable in all four tensors without a gate.

    Weights of inactive experts are not read; active ones are read once for a chunk of up to 64 tokens. Experts in the
    union of a chunk must have finite weights, since their rows meet hidden values of 0 for tokens that do not use them.
    Gradients of inactive routing weights are 0, as in the reference. Results of up to 64 tokens are bit-equal between
    runs; beyond, and in gradients of `x`, float32 atomics leave the last bits free.
    """
    tensors = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    if needs_gradient(*tensors):
        trained: Tensor = torch.ops.blockffn.sparse_ffn_grouped(*tensors)[0]
        return trained
    result: Tensor = torch.ops.blockffn.sparse_ffn_triton(*tensors, gate_proj_EFD)
    return result


def refuses_triton_invariant(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> str | None:
    """Why the batch-invariant Triton kernels cannot take these tensors, or `None`."""
    tensors = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    if needs_gradient(*tensors):
        return "it has no gradient; use backend='triton', or torch.inference_mode()"
    return _refuses_tensors(*tensors, gate_proj_EFD=gate_proj_EFD)


def sparse_ffn_triton_invariant(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> Tensor:
    """The sparse FFN on the GPU, bit-equal for a token whatever other tokens share the call; no gradient.

    One launch shape for any number of tokens, and sums in an order of expert numbers, to which experts that only other
    tokens activate add exact zeros. Every 32 tokens read the weights of their union anew.
    """
    tensors = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    result: Tensor = torch.ops.blockffn.sparse_ffn_triton_invariant(*tensors, gate_proj_EFD)
    return result


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _infer(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, gate_proj_EFD: Tensor | None = None
) -> Tensor:
    from blockffn.ops.sparse_ffn.triton_grouped import grouped_forward
    from blockffn.ops.sparse_ffn.triton_token import ffn_of_one_token
    from blockffn.ops.sparse_ffn.triton_union import ffn_over_union

    tensors = (x_TD.contiguous(), up_proj_EFD, down_proj_EFD, weights_TE.contiguous())
    T, pdl = x_TD.shape[0], has_dependent_launch(x_TD.device)
    if T == 0:
        return torch.empty_like(tensors[0])
    if T == 1:
        return ffn_of_one_token(*tensors, gate_proj_EFD=gate_proj_EFD, pdl=pdl)
    if T <= MAX_CHUNK:
        return ffn_over_union(*tensors, gate_proj_EFD=gate_proj_EFD, pdl=pdl)
    assert gate_proj_EFD is None  # `refuses_triton`
    return grouped_forward(*tensors, save=False)[0]


def _infer_invariant(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, gate_proj_EFD: Tensor | None = None
) -> Tensor:
    from blockffn.ops.sparse_ffn.triton_union import INVARIANT_CONFIG, INVARIANT_TOKENS, ffn_over_union

    pdl = has_dependent_launch(x_TD.device)
    tokens, weights = (tensor.contiguous().split(INVARIANT_TOKENS) for tensor in (x_TD, weights_TE))
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD)
    given = (up_proj_EFD, down_proj_EFD)
    parts = [
        ffn_over_union(x, *given, w, gate_proj_EFD=gate_proj_EFD, config=INVARIANT_CONFIG, pdl=pdl)
        for x, w in zip(tokens, weights, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _train(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from blockffn.ops.sparse_ffn.triton_grouped import grouped_forward

    return grouped_forward(x_TD.contiguous(), up_proj_EFD, down_proj_EFD, weights_TE.contiguous(), save=True)


def _train_backward(
    dy_TD: Tensor, x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor,
    preact: Tensor, hidden: Tensor, num_tokens_E: Tensor, tokens_ET: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from blockffn.ops.sparse_ffn.triton_grouped import grouped_backward

    dy_TD, x_TD, weights_TE = dy_TD.contiguous(), x_TD.contiguous(), weights_TE.contiguous()
    saved = (preact, hidden, num_tokens_E, tokens_ET)
    return grouped_backward(dy_TD, x_TD, up_proj_EFD, down_proj_EFD, weights_TE, *saved)


def _fake_train(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, E), F = weights_TE.shape, up_proj_EFD.shape[1]
    pairs = x_TD.new_empty(T * E, F)
    counts, tokens = (weights_TE.new_empty(shape, dtype=torch.int32) for shape in ((E,), (E, T)))
    return x_TD.new_empty(x_TD.shape), pairs, torch.empty_like(pairs), counts, tokens


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, dy_TD: Tensor, *unused: Any) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.blockffn.sparse_ffn_grouped_backward(dy_TD, *ctx.saved_tensors)
    return gradients


_EXPERTS = "Tensor x_TD, Tensor up_proj_EFD, Tensor down_proj_EFD, Tensor weights_TE"
# On the CPU these run in the Triton interpreter, for tests.
for _name, _run in (("sparse_ffn_triton", _infer), ("sparse_ffn_triton_invariant", _infer_invariant)):
    define(
        f"{_name}({_EXPERTS}, Tensor? gate_proj_EFD=None) -> Tensor",
        {"CUDA": _run, "CPU": _run},
        fake=lambda x_TD, *experts: x_TD.new_empty(x_TD.shape),
    )
define(
    f"sparse_ffn_grouped({_EXPERTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"CUDA": _train, "CPU": _train},
    fake=_fake_train,
)
define(
    f"sparse_ffn_grouped_backward(Tensor dy_TD, {_EXPERTS}, Tensor preact, Tensor hidden, "
    "Tensor num_tokens_E, Tensor tokens_ET) -> (Tensor, Tensor, Tensor, Tensor)",
    {"CUDA": _train_backward, "CPU": _train_backward},
    fake=lambda dy_TD, x_TD, up, down, weights_TE, *saved: (
        x_TD.new_empty(x_TD.shape), torch.empty_like(up), torch.empty_like(down), weights_TE.new_empty(weights_TE.shape)
    ),
)  # fmt: skip
torch.library.register_autograd("blockffn::sparse_ffn_grouped", _backward, setup_context=_save_for_backward)
