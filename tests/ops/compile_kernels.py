"""Compile the Triton kernels for a GPU that is not there: `python -m tests.ops.compile_kernels 89`.

Operations run on CPU tensors, but a launch is only noted; then each kernel is compiled for the compute capability, one
of `GPUS`. What does not compile, or asks for more shared memory than that GPU has, is printed, and the status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from blockffn.ops import gpu


@dataclass(frozen=True)
class Gpu:
    """`shared_memory`: bytes that a block may have."""

    name: str
    processors: int
    shared_memory: int


GPUS = {80: Gpu("A100", 108, 166_912), 89: Gpu("RTX 4090", 128, 101_376), 90: Gpu("H100", 132, 232_448)}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
         torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1"}  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class Launches:
    """What was launched: kernels with the types and constants that they are compiled for, each once."""

    noted: dict[tuple[Any, ...], tuple[str, ASTSource, dict[str, Any]]] = field(default_factory=dict)

    def note(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = kernel.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
        types = {p.name: "constexpr" if p.is_constexpr else type_of(values[p.name]) for p in kernel.params}
        constants = {name: values[name] for name in names if types[name] == "constexpr"}
        key = (kernel, *types.items(), *constants.items(), *options.items())
        if key in self.noted:
            return
        aligned = [
            i
            for i, name in enumerate(names)
            if types[name].startswith("*") or (types[name] == "i32" and values[name] % 16 == 0)
        ]
        source = ASTSource(
            kernel,
            types,
            {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        self.noted[key] = (f"{kernel.fn.__name__} {constants}", source, options)


def type_of(value: Any) -> str:
    """Of a kernel's argument, as Triton names it; what it makes a constant is one."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def run_sparse_ffn(dtype: torch.dtype, tokens: Sequence[int]) -> None:
    """The op at the published widths, and a step of training."""
    from blockffn.ops.sparse_ffn import sparse_ffn

    for E in (64, 128):
        up, down, gate = (torch.zeros(E, 128, 2048, dtype=dtype) for _ in range(3))
        for T, gated in itertools.product(tokens, (False, True)):
            x, weights = torch.zeros(T, 2048, dtype=dtype), torch.zeros(T, E, dtype=dtype)
            sparse_ffn(x, up, down, weights, gate_proj_EFD=gate if gated else None, backend="triton")
    sparse_ffn(x, up, down, weights, gate_proj_EFD=gate, backend="triton_invariant")
    trained = [tensor.requires_grad_() for tensor in (torch.zeros(256, 2048, dtype=dtype), up, down)]
    sparse_ffn(*trained, torch.zeros(256, E, dtype=dtype), backend="triton").sum().backward()  # type: ignore[no-untyped-call]


def run_decode_steps(dtype: torch.dtype, tokens: Sequence[int]) -> None:
    """Steps of one layer of the published 3B and 0.8B models, and of a dense one."""
    from blockffn.inference.graph_target import GraphTarget
    from blockffn.models.causal_lm import BlockFFNForCausalLM
    from blockffn.presets import preset_config

    torch.set_default_dtype(dtype)
    for size, method in (("3b", "blockffn"), ("3b", "dense"), ("0.8b", "blockffn")):
        config = preset_config(size, method, num_hidden_layers=1, vocab_size=4096, intermediate_size=8192)
        target = GraphTarget(BlockFFNForCausalLM(config).eval(), capacity=256, backend="triton", run_ahead=True)
        for T in tokens:
            target.reset()
            target.expect_choices()
            target.extend([0] * T)
    torch.set_default_dtype(torch.float32)


def launches_on(capability: int, tokens: Sequence[int], dtypes: Sequence[str]) -> Launches:
    """All that operations on so many tokens would launch there."""
    launches = Launches()
    # Before the modules that import these by name.
    gpu.refuses_device = lambda device: None
    gpu.has_dependent_launch = lambda device: capability >= 90  # type: ignore[assignment]
    gpu.num_processors = lambda device: GPUS[capability].processors  # type: ignore[assignment]
    JITFunction.run = lambda kernel, *args, **kwargs: launches.note(kernel, *args, **kwargs)  # type: ignore[method-assign]
    for run, dtype in itertools.product((run_sparse_ffn, run_decode_steps), dtypes):
        run(getattr(torch, dtype), tokens)
    return launches


def problem_of(launch: tuple[str, ASTSource, dict[str, Any]], capability: int) -> str | None:
    """Why a kernel cannot run there."""
    name, source, options = launch
    try:
        needed = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
    except Exception as problem:
        return f"{name}: {type(problem).__name__}: {str(problem)[:300]}"
    limit = GPUS[capability].shared_memory
    return f"{name}: {needed} bytes of shared memory, a block has {limit}" if needed > limit else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, choices=GPUS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 8, 16, 32, 64], help="of a step")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of weights and tokens")
    options = parser.parse_args()
    noted = launches_on(options.capability, options.tokens, options.dtypes).noted.values()
    with ThreadPoolExecutor() as pool:
        problems = list(filter(None, pool.map(lambda launch: problem_of(launch, options.capability), noted)))
    if not noted:
        sys.exit("nothing was launched: has Triton's JITFunction changed?")
    print(f"{len(noted)} kernels for {GPUS[options.capability].name}", *problems, sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
