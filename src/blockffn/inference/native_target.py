"""`NativeTarget`: the language model behind the `Target` protocol, a step of which is one call of the CPU kernels."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from blockffn.inference.head_screen import Screening
from blockffn.inference.ids import Ids, listed
from blockffn.inference.model_target import Pending, check_room, checked_capacity
from blockffn.inference.native_model import NativeModel
from blockffn.inference.target import Step
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops import native
from blockffn.ops.quantization import DEFAULT_GROUP_SIZE


class NativeTarget:
    """A `Target` that runs `model` on the CPU over weights that it packs. One thread at a time may use it.

    Args:
        capacity: tokens that the cache holds; default: the model's context.
        format, head_format, group_size: of the packed weights, see `NativeModel`.
        cache_dtype: float32 or bfloat16; default: float32 where the weights are, else bfloat16.
        screen_head: format (int8 or int4) in which the head is read first, where a few logits are asked for
            (`ask_best`); `None`: it is always read whole.

    Attributes:
        bits_per_weight: that the weights which steps read take in memory, on average.
        times: whether steps add up the seconds of their parts in `seconds`.
        seconds: by part of `blockffn.ops.native.PARTS`; `between` is norms, routing, and waiting for other threads.

    Raises:
        ValueError: a model that is not supported, a capacity beyond its context, or a head that cannot be screened so.
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        *,
        capacity: int | None = None,
        format: str | None = None,
        head_format: str | None = None,
        group_size: int = DEFAULT_GROUP_SIZE,
        cache_dtype: torch.dtype | None = None,
        screen_head: str | None = None,
    ) -> None:
        dtype = model.model.norm.weight.dtype
        if cache_dtype is None:
            exact = format == "f32" or (format is None and dtype == torch.float32)
            cache_dtype = torch.float32 if exact else torch.bfloat16
        self._capacity = checked_capacity(model, capacity)
        self.weights = NativeModel(
            model, capacity=self._capacity, format=format, head_format=head_format, group_size=group_size,
            cache_dtype=cache_dtype, screen_head=screen_head,
        )  # fmt: skip
        self._screening = None
        if self.weights.screen is not None:
            sizes = self.weights.screen.matrix.data.nbytes, self.weights.head.data.nbytes
            self._screening = Screening(sizes[0] / sizes[1])
        self.vocab_size = model.config.vocab_size
        self.bits_per_weight = self.weights.bits_per_weight
        self.times = False
        self._hidden_size = model.config.hidden_size
        self._padded_vocab = -(-self.vocab_size // 32) * 32
        self._seconds = torch.zeros(len(native.PARTS), dtype=torch.float64)
        self._model = self.weights.description
        self._workspace = native.empty_huge(native.function("step_workspace")(self._model))
        self._tokens, self._parents, self._choices = (native.StepIds() for _ in range(3))
        self._strips = ctypes.c_int64()
        self._step = native.Step(num_strips=ctypes.addressof(self._strips), workspace=self._workspace.data_ptr())
        self._run_step = partial(native.function("decode_step"), ctypes.byref(self._model), ctypes.byref(self._step))
        self._length = 0
        self._chooses = False
        self._pending: Pending | None = None

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def seconds(self) -> dict[str, float]:
        return dict(zip(native.PARTS, self._seconds.tolist()))

    def reset(self) -> None:
        """Forget all tokens. Thresholds that were changed in the model hold from here on."""
        self._length, self._pending = 0, None
        self.ask_best(None)
        self.weights.refresh_thresholds()

    def ask_best(self, count: int | None) -> None:
        """Until the next reset, steps need so many of the largest logits, `None`: all. With a screened head others may
        be -inf; those that equal the least of the asked are there."""
        self._chooses = count == 1
        if self._screening is not None:
            self._screening.ask(count)

    def extend(self, tokens: Ids, parents: Ids | None = None) -> Step:
        """As the protocol says. Its results are free to be kept.

        Raises:
            ValueError: tokens are pending, none were given, they do not fit, one is outside the vocabulary, a parent
                does not precede its child, or a tree of more than 64 tokens.
        """
        tokens = listed(tokens)
        count = len(tokens)
        check_room(count, self._pending, length=self._length, capacity=self._capacity)
        parents = None if parents is None else listed(parents)
        pending = Pending(count, parents)
        pending.check_parents()
        if parents is not None and count > native.MAX_STEP:
            raise ValueError(f"a tree has at most {native.MAX_STEP} tokens here, got {count}; draft fewer")
        screening = self._screening
        num_exact = 0 if screening is None else min(screening.num_exact(), self.vocab_size)
        step = self._run(tokens, parents, num_logits=count, num_exact=num_exact)
        if num_exact and screening is not None and step.head_share is not None:
            screening.observe(step.head_share)
        self._pending = pending
        return step

    def prefill(self, tokens: Ids) -> Step:
        """Run and commit a chain, with the logits `[1, V]` of its last token only.

        Raises:
            ValueError: as `extend`.
        """
        tokens = listed(tokens)
        check_room(len(tokens), self._pending, length=self._length, capacity=self._capacity)
        step = self._run(tokens, None, num_logits=1)
        self._length += len(tokens)
        return step

    def commit(self, kept: Ids) -> None:
        """As the protocol says.

        Raises:
            ValueError: nothing is pending, or the indices are no path from a root.
        """
        if self._pending is None:
            raise ValueError("nothing to commit: extend first")
        kept = listed(kept)
        if not self._pending.keeps_first(kept):
            source = native.StepIds(*(self._length + node for node in kept))
            native.function("move_positions")(self._model, source, len(kept), self._length)
        self._length += len(kept)
        self._pending = None

    def _run(self, tokens: list[int], parents: list[int] | None, *, num_logits: int, num_exact: int = 0) -> Step:
        """Run tokens after the committed ones, in pieces; the last `num_logits` of them get logits."""
        count, step = len(tokens), self._step
        hidden = torch.empty(count, self._hidden_size)
        logits = torch.empty(num_logits, self._padded_vocab)
        choices: list[int] = []
        pieces, strips = [], 0
        step.parents = None if parents is None else native.put(self._parents, parents)
        step.num_exact = num_exact
        step.choices = ctypes.addressof(self._choices) if self._chooses else None
        step.seconds = self._seconds.data_ptr() if self.times else None
        step.hidden, step.logits = hidden.data_ptr(), logits.data_ptr()
        for begin in range(0, count, native.MAX_STEP):
            size = min(native.MAX_STEP, count - begin)
            step.tokens = native.put(self._tokens, tokens[begin : begin + size])
            step.num_tokens, step.length = size, self._length + begin
            step.num_logits = min(size, max(begin + size - (count - num_logits), 0))
            pieces.append(self._counters(size, apart=count > native.MAX_STEP))
            if self._run_step():
                raise ValueError(
                    f"tokens must lie between 0 and {self.vocab_size - 1}, got {min(tokens)} … {max(tokens)}"
                )
            if self._chooses:
                choices += self._choices[: step.num_logits]
            strips += self._strips.value
            step.hidden += 4 * size * self._hidden_size
            step.logits += 4 * step.num_logits * self._padded_vocab
        head_share = None if self._screening is None else strips * 32 / (len(pieces) * self._padded_vocab)
        return Step(
            logits, hidden, *self._counts(pieces), head_share=head_share, choices=choices if self._chooses else None,
            vocab_size=self.vocab_size,
        )  # fmt: skip

    def _counters(self, size: int, *, apart: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the step counts the experts of so many tokens: `union [L]`, `active [L, T]`, and, where tokens are kept
        apart, which are active, `[L, T, E]`."""
        layers = self._model.num_layers
        union = torch.empty(layers, dtype=torch.int64)
        active = torch.empty(layers, size, dtype=torch.int64)
        marks = torch.zeros(layers, size, self.weights.most_experts, dtype=torch.uint8) if apart else None
        self._step.num_union, self._step.num_active = union.data_ptr(), active.data_ptr()
        self._step.is_active = None if marks is None else marks.data_ptr()
        return union, active, marks

    def _counts(self, pieces: list[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[Tensor | None, Tensor | None]:
        """`union` and `active` of a `Step`."""
        chosen, layers = self.weights.layers_with_experts, self._model.num_layers
        if not chosen:
            return None, None
        union, active, _ = pieces[0]
        if len(pieces) > 1:
            active = torch.cat([piece[1] for piece in pieces], dim=1)
            union = torch.cat([piece[2] for piece in pieces if piece[2] is not None], dim=1).any(dim=1).sum(dim=-1)
        if len(chosen) < layers:
            union, active = union[chosen], active[chosen]
        return union, active
