"""The CPU kernels (`native/blockffn.h`), loaded with ctypes. ctypes releases the GIL during every call.

The library is built when the package is installed. Where it is missing, `unavailable()` says why and what to do; ops
then use torch. `BLOCKFFN_CPU_ISA` (amx, avx512_bf16, avx512, avx2, neon, portable) forces kernels below the best that
the processor has; it is read when the library is first used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

API_VERSION = 5
LIBRARY = Path(__file__).with_name("_native.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FORMATS = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3}


class Experts(Structure):
    """`blockffn_experts`."""

    _fields_ = (
        ("data", c_void_p),
        ("expert_bytes", c_int64),
        ("num_experts", c_int64),
        ("width", c_int64),
        ("hidden_size", c_int64),
        ("format", c_int32),
        ("gated", c_int32),
        ("group_in", c_int32),
        ("group_hidden", c_int32),
    )


class Matrix(Structure):
    """`blockffn_matrix`."""

    _fields_ = (
        ("data", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("format", c_int32),
        ("group", c_int32),
    )


class Layer(Structure):
    """`blockffn_layer`."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("in_proj", Matrix),
        ("out_proj", Matrix),
        ("query_norm", c_void_p),
        ("latent_norm", c_void_p),
        ("query_proj", Matrix),
        ("to_latent", Matrix),
        ("to_values", Matrix),
        ("ffn_norm", c_void_p),
        ("router", Matrix),
        ("router_scale", c_void_p),
        ("router_normalizes", c_int32),
        ("router_eps", c_float),
        ("threshold", c_float),
        ("experts", Experts),
    )


class Model(Structure):
    """`blockffn_model`."""

    _fields_ = (
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("vocab_size", c_int64),
        ("num_heads", c_int64),
        ("num_key_heads", c_int64),
        ("nope_width", c_int64),
        ("rope_width", c_int64),
        ("value_width", c_int64),
        ("query_latent_size", c_int64),
        ("latent_size", c_int64),
        ("capacity", c_int64),
        ("max_threads", c_int64),
        ("attention", c_int32),
        ("cache_format", c_int32),
        ("norm_eps", c_float),
        ("latent_norm_eps", c_float),
        ("query_scale", c_float),
        ("embedding_scale", c_float),
        ("residual_scale", c_float),
        ("head_scale", c_float),
        ("rotary", c_void_p),
        ("embedding", Matrix),
        ("embedding_is_plain", c_int64),
        ("embedding_norm", c_void_p),
        ("state_norm", c_void_p),
        ("fusion_bias", c_void_p),
        ("fusion", Matrix),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("screen", Matrix),
        ("screen_errors", c_void_p),
        ("layers", POINTER(Layer)),
        ("cache", c_void_p),
    )


MAX_STEP = MAX_BEST = 64  # tokens of a step, and that can be asked for as the best
StepIds = c_int64 * MAX_STEP  # tokens of a step, as many as it has, or indices into it
ATTENTION = {"gqa": 0, "mla": 1}
PARTS = ("projections", "attention", "router", "ffn", "head", "between")  # of a step's time


class Step(Structure):
    """`blockffn_step`."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("length", c_int64),
        ("num_earlier", c_int64),
        ("states", c_void_p),
        ("num_logits", c_int64),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("num_exact", c_int64),
        ("choices", c_void_p),
        ("num_strips", c_void_p),
        ("num_best", c_int64),
        ("best", c_void_p),
        ("best_log_probs", c_void_p),
        ("num_union", c_void_p),
        ("num_active", c_void_p),
        ("is_active", c_void_p),
        ("workspace", c_void_p),
        ("seconds", c_void_p),
    )


def put(ids: ctypes.Array[c_int64], values: list[int]) -> int:
    """Write values to the front of an array; gives its address."""
    ids[: len(values)] = values  # type: ignore[assignment]  # ctypes converts integers
    return ctypes.addressof(ids)


_TOKENS = (c_int64, c_int32, c_void_p, c_int64)  # num_tokens, dtype, x, x_stride
_WEIGHTS = (c_void_p, c_int64, c_float)  # weights, weights_stride, threshold
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "blockffn_sparse_ffn": (c_int32, (POINTER(Experts), *_TOKENS, *_WEIGHTS, c_void_p)),
    "blockffn_linear": (c_int32, (POINTER(Matrix), *_TOKENS, c_void_p)),
    "blockffn_sparse_ffn_plain": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, *_TOKENS, *_WEIGHTS, c_void_p),
    ),
    "blockffn_decode_step": (c_int32, (POINTER(Model), POINTER(Step))),
    "blockffn_draft_chain": (
        c_int32,
        (POINTER(Model), POINTER(Step), c_int64, c_float, c_void_p, c_void_p, c_void_p, POINTER(c_int64)),
    ),
    "blockffn_cache_bytes": (c_int64, (POINTER(Model),)),
    "blockffn_step_workspace": (c_int64, (POINTER(Model),)),
    "blockffn_move_positions": (None, (POINTER(Model), c_void_p, c_int64, c_int64)),
    "blockffn_isa": (c_char_p, ()),
    "blockffn_isa_error": (c_char_p, ()),
    "blockffn_use_threads": (None, (c_void_p, c_void_p, c_void_p)),
    "blockffn_advise_huge_pages": (c_int32, (c_void_p, c_int64)),
    "blockffn_read": (c_uint64, (c_void_p, c_int64)),
    "blockffn_api_version": (c_int32, ()),
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none, which is also given as a warning."""
    library = _open()
    if isinstance(library, str):
        warnings.warn(f"{library}. Until then decoding on the CPU is several times slower.", stacklevel=2)
    return library


def _open() -> ctypes.CDLL | str:
    advice = "install a C++ compiler (or `pip install ziglang`) and reinstall blockffn"
    if not LIBRARY.exists():
        return f"the CPU kernels are not built; {advice}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the CPU kernels cannot be loaded ({error}); {advice}"
    library.blockffn_api_version.restype = c_int32
    if library.blockffn_api_version() != API_VERSION:
        return f"the CPU kernels are from another version of the package; {advice}"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _share_threads(library)
    forced = library.blockffn_isa_error()
    if forced is not None:
        best = library.blockffn_isa().decode()
        raise ValueError(f"{forced.decode()}: {os.environ['BLOCKFFN_CPU_ISA']!r}; the best one here is {best!r}")
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    """Lend torch's OpenMP threads to the library: two pools spinning on the same cores were 27 times slower."""
    for path in _openmp_libraries():
        try:
            openmp = ctypes.CDLL(path)
            functions = [openmp.GOMP_parallel, openmp.GOMP_barrier, openmp.omp_get_max_threads]
        except (OSError, AttributeError):
            continue
        library.blockffn_use_threads(*(ctypes.cast(function, c_void_p) for function in functions))
        return


def _openmp_libraries() -> list[str]:
    """Where torch's OpenMP library may be: those that the process has loaded, torch's own first, then by name."""
    maps = Path("/proc/self/maps")
    words = maps.read_text().split() if maps.exists() else []
    loaded = sorted({word for word in words if "libgomp" in word}, key=lambda path: "torch" not in path)
    return [*loaded, str(Path(torch.__file__).parent / "lib" / "libomp.dylib"), "libgomp.so.1"]


def unavailable() -> str | None:
    """Why there are no native kernels and how to get them, or `None` when they are there. Warns the first time."""
    library = _load()
    return library if isinstance(library, str) else None


def forget() -> None:
    """Look for the library again at the next call."""
    _load.cache_clear()
    function.cache_clear()


@functools.cache
def function(name: str) -> Callable[..., int]:
    """The C function `blockffn_<name>`. Raises `RuntimeError` when there are no native kernels."""
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    result: Callable[..., int] = getattr(library, f"blockffn_{name}")
    return result


def isa() -> str:
    """The instruction set of the kernels that run, e.g. `avx512`."""
    name: bytes = function("isa")()  # type: ignore[assignment]
    return name.decode()


def check(status: int, op: str) -> None:
    """Turn the status of a C function into an exception."""
    if status == 1:
        raise MemoryError(f"{op}: no memory for the intermediate values of this many tokens; split the batch")
    if status:
        raise ValueError(f"{op}: the native library refuses these arguments (status {status})")


def empty_huge(num_bytes: int) -> torch.Tensor:
    """An uninitialised uint8 tensor in huge pages where the system gives them; 3-13 % faster to stream from DRAM."""
    tensor = torch.empty(num_bytes, dtype=torch.uint8)
    if unavailable() is None and num_bytes >= 1 << 21:
        function("advise_huge_pages")(tensor.data_ptr(), num_bytes)
    return tensor


def read_bandwidth(tensor: torch.Tensor) -> int:
    """Read a contiguous tensor with all threads, for measuring the machine; returns a checksum."""
    return function("read")(tensor.data_ptr(), tensor.numel() * tensor.element_size())
