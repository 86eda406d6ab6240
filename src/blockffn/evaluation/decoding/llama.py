"""llama.cpp beside us: a dense Llama of random weights with as many parameters and bits, timed through its C interface.

Its text means nothing and is not compared; what it reads and computes for a token is that of any Llama of its shape.
"""

from __future__ import annotations

import ctypes
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockffn.configuration import BlockFFNConfig
from blockffn.evaluation.decoding.ways import Run
from blockffn.metrics.cost import parameter_counts

HEAD_DIM = 128
# What stores as many bits a weight as each of our precisions, and for the head; `auto` is bfloat16.
FORMATS = {"auto": ("BF16", "BF16"), "bf16": ("BF16", "BF16"), "f32": ("F32", "F32"), "int8": ("Q8_0", "Q8_0"),
           "int4": ("Q4_0", "Q8_0")}  # fmt: skip
STORED = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # what can be written
BLOCK = 32  # weights that Q8_0 and Q4_0 scale together
ROWS = 64  # of random weights; a matrix repeats them


def missing() -> str | None:
    """What to install, or `None` where everything is there."""
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"llama.cpp is left out, {' and '.join(absent)} missing: pip install 'blockffn[bench]', which builds it"


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a dense Llama with an untied head."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    width: int
    context: int

    @property
    def parameters(self) -> int:
        return 2 * self.vocab_size * self.hidden_size + self.hidden_size + self.layers * self._layer

    @property
    def _layer(self) -> int:
        attention = 2 * self.hidden_size * HEAD_DIM * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden_size * self.width + 2 * self.hidden_size

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, rows first, as the format has them."""
        d, keys = self.hidden_size, self.key_value_heads * HEAD_DIM
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab_size, d)}
        for layer in range(self.layers):
            shapes = {
                "attn_norm": (d,), "attn_q": (self.heads * HEAD_DIM, d), "attn_k": (keys, d), "attn_v": (keys, d),
                "attn_output": (d, self.heads * HEAD_DIM), "ffn_norm": (d,), "ffn_gate": (self.width, d),
                "ffn_up": (self.width, d), "ffn_down": (d, self.width),
            }  # fmt: skip
            found |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        return found | {"output_norm.weight": (d,), "output.weight": (self.vocab_size, d)}


def llama_like(config: BlockFFNConfig, *, context: int) -> LlamaShape:
    """The Llama nearest to a model: equal vocabulary, width and depth, attention as large as heads of 128 allow, and
    the rest of its parameters in the FFN.

    Raises:
        ValueError: a hidden size that no such Llama has.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    if d % HEAD_DIM:
        raise ValueError(f"llama.cpp's peer has heads of {HEAD_DIM}, which hidden_size {d} is no multiple of")
    heads, counts = d // HEAD_DIM, parameter_counts(config)
    attention = counts.attention / layers
    sizes = [n for n in range(1, heads + 1) if heads % n == 0]
    keys = min(sizes, key=lambda n: abs(2 * d * HEAD_DIM * (heads + n) - attention))
    per_layer = (counts.non_embedding - d) / layers - 2 * d * HEAD_DIM * (heads + keys) - 2 * d
    width = max(BLOCK, round(per_layer / (3 * d) / BLOCK) * BLOCK)
    return LlamaShape(config.vocab_size, d, layers, heads, keys, width, context)


def write_gguf(path: Path, shape: LlamaShape, kind: str, *, head: str, seed: int = 0) -> None:
    """Write a model of random weights in a storage format, the head's apart, a matrix at a time. Norms are float32."""
    import gguf
    from gguf.quants import quantize

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(seed)
    samples: dict[tuple[int, Any], Any] = {}

    def data(name: str, size: tuple[int, ...]) -> tuple[Any, Any]:
        """A few rows of a tensor as they are stored, and their format."""
        if len(size) == 1:
            return np.ones(size, dtype=np.float32), kinds.F32
        stored = kinds[head if name == "output.weight" else kind]
        if (size[1], stored) not in samples:
            noise = rng.standard_normal((ROWS, size[1]), dtype=np.float32) / size[1] ** 0.5
            samples[size[1], stored] = quantize(noise, stored)
        return samples[size[1], stored], stored

    for name, size in shape.tensors.items():
        rows, stored = data(name, size)
        writer.add_tensor_info(name, size, np.dtype(np.float32), rows[0].nbytes * size[0], raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size in shape.tensors.items():
        rows, _ = data(name, size)
        writer.write_tensor_data(np.resize(rows, (size[0], *rows.shape[1:])))
    writer.close()


TRIAL = """
import sys
from pathlib import Path
from blockffn.evaluation.decoding.llama import LlamaCpp
LlamaCpp(Path(sys.argv[1]), name="trial", vocab_size=int(sys.argv[2]), capacity=512).run([1, 2, 3], 2)
"""


# For processors with AMX, GCC 12 removes the stores that set up its tiles; without these two passes it keeps them.
REMEDIES = (
    "where the processor has AMX, the compiler may have dropped the set-up of its tiles: CXXFLAGS='-fno-tree-dse "
    "-fno-dse' pip install --force-reinstall --no-cache-dir llama-cpp-python; a build for any processor is "
    "CMAKE_ARGS=-DGGML_NATIVE=OFF instead of CXXFLAGS"
)


def why_not_running(formats: tuple[str, str]) -> str | None:
    """What stops llama.cpp on this machine, or `None`: tried in a process of its own, which it may take down.

    A build that does not suit the processor ends in an illegal instruction, and with it everything measured by then.
    """
    kind, head = formats
    shape = LlamaShape(vocab_size=256, hidden_size=256, layers=1, width=256, heads=2, key_value_heads=1, context=512)
    with tempfile.TemporaryDirectory(prefix="blockffn-llama-") as folder:
        path = Path(folder) / "trial.gguf"
        write_gguf(path, shape, kind, head=head)
        command = [sys.executable, "-c", TRIAL, str(path), str(shape.vocab_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        reason = f"ended by {signal.Signals(-done.returncode).name}; {REMEDIES}"
    else:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"llama.cpp is left out, it does not run here: {reason}"


def formats_of(precision: str) -> tuple[str, str]:
    """llama.cpp's formats with as many bits, of the weights and of the head. Raises `ValueError` where it has none."""
    if precision not in FORMATS:
        raise ValueError(f"llama.cpp has no format for precision {precision!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[precision]


def formats_named(name: str) -> tuple[str, str]:
    """`KIND` or `KIND/HEAD`: formats of the weights and of the head. Raises `ValueError` for one that is unknown."""
    kind, _, head = name.partition("/")
    for one in (kind, head or kind):
        if one not in STORED:
            raise ValueError(f"llama.cpp's peer is not written in {one!r}; choose from {', '.join(STORED)}")
    return kind, head or kind


class LlamaCpp:
    """Greedy decoding by llama.cpp, a token a call, with as many threads as torch.

    Raises:
        RuntimeError: llama.cpp does not load the file.
    """

    def __init__(self, path: Path, *, name: str, vocab_size: int, capacity: int) -> None:
        import llama_cpp

        self.name, self._lib, self._vocab_size = name, llama_cpp, vocab_size
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = capacity
        settings.n_batch = settings.n_ubatch = min(512, capacity)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {capacity} tokens for {path}")

    @classmethod
    def like(cls, config: BlockFFNConfig, *, formats: tuple[str, str], capacity: int) -> LlamaCpp:
        """With a Llama as large as a model, in formats for the weights and the head.

        Raises:
            ValueError: a shape that it does not have.
        """
        kind, head = formats
        shape = llama_like(config, context=max(capacity, 512))
        stored = kind if head == kind else f"{kind}, head {head}"
        name = f"llama.cpp {stored}, dense {shape.parameters / 1e6:.0f} M"
        with tempfile.TemporaryDirectory(prefix="blockffn-llama-") as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, shape, kind, head=head)
            # The file stays mapped after it is removed.
            return cls(path, name=name, vocab_size=shape.vocab_size, capacity=max(capacity, 512))

    def run(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Run:
        lib = self._lib
        begin = time.perf_counter()
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        new = [self._decode(list(prompt_ids))]
        first = time.perf_counter()
        for _ in range(max_new_tokens - 1):
            new.append(self._decode(new[-1:]))
        return Run(new, time.perf_counter() - first, first - begin)

    def _decode(self, tokens: list[int]) -> int:
        """Run tokens; the most likely one behind them."""
        lib = self._lib
        for begin in range(0, len(tokens), 512):
            piece = tokens[begin : begin + 512]
            array = (ctypes.c_int32 * len(piece))(*piece)  # the batch only points to it
            batch = lib.llama_batch_get_one(array, len(piece))
            code = lib.llama_decode(self._context, batch)
            if code:
                raise RuntimeError(f"llama.cpp failed to decode (code {code})")
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), (self._vocab_size,)).argmax())
