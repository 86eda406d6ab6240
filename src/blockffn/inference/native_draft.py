"""`NativeDraft`: an EAGLE draft model beside a `NativeTarget`, a step of which is one call of the CPU kernels."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from blockffn.inference.native_model import NativeModel
from blockffn.inference.native_weights import NativeWeights, rotary_table
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.ops import native
from blockffn.ops.quantization import PackedMatrix, pack_linear, take_rows, unpack_rows


class NativeDraft(NativeWeights):
    """The packed weights of `draft` with an empty cache, and the target's embedding and head.

    An execution plan of `DraftModel`, as `NativeModel` is one of the target. Formats are the target's, but beside int4
    weights the head is int4 too, which the target keeps in int8: every level of a draft reads it, and a draft may err.
    Of a reduced vocabulary the head's rows are copied once. One thread at a time may use it.

    Args:
        model, target: what it drafts for, and how that runs.
        capacity: tokens of a text; trees of `native.MAX_STEP` more fit behind them.

    Attributes:
        times: whether runs add up the seconds of their parts in `seconds`, by part of `native.PARTS`.
        runs: their number.

    Raises:
        ValueError: the draft lies on another device.
    """

    def __init__(self, draft: DraftModel, model: BlockFFNForCausalLM, target: NativeModel, *, capacity: int) -> None:
        if draft.fc.weight.device.type != "cpu":
            raise ValueError(f"the draft is on {draft.fc.weight.device}, its target's native step on the CPU; move it")
        super().__init__(format=target.format, head_format=target.head_format, group_size=target.group_size)
        self.hidden_size = draft.config.hidden_size
        self.token_ids = None if draft.token_ids is None else draft.token_ids.to(torch.int64).contiguous()
        self._num_layers = len(draft.layers)
        with torch.no_grad():
            self._layers = (native.Layer * self._num_layers)(*(self.layer(layer) for layer in draft.layers))  # type: ignore[arg-type]
            self.description = self._description(draft, model, target, capacity + native.MAX_STEP)
        self.add_cache(self.description)
        self._workspace = native.empty_huge(native.function("step_workspace")(self.description))
        self.vocab_size = self.description.head.outputs
        self._logits = torch.empty(native.MAX_STEP, -(-self.vocab_size // 32) * 32)
        self._counts = torch.empty(self._num_layers * (native.MAX_STEP + 1), dtype=torch.int64)
        self.times, self.runs = False, 0
        self._seconds = torch.zeros(len(native.PARTS), dtype=torch.float64)

    @property
    def seconds(self) -> dict[str, float]:
        return dict(zip(native.PARTS, self._seconds.tolist()))

    def _description(
        self, draft: DraftModel, model: BlockFFNForCausalLM, target: NativeModel, capacity: int
    ) -> native.Model:
        config = draft.config
        embedding, is_plain = self.embedding(model)
        return native.Model(
            num_layers=self._num_layers,
            hidden_size=config.hidden_size,
            vocab_size=model.config.vocab_size,
            num_heads=config.num_attention_heads,
            num_key_heads=config.num_key_value_heads,
            rope_width=config.head_dim,
            value_width=config.head_dim,
            capacity=capacity,
            max_threads=torch.get_num_threads(),
            attention=native.ATTENTION["gqa"],
            cache_format=target.description.cache_format,
            norm_eps=config.rms_norm_eps,
            query_scale=draft.layers[0].self_attn.scaling,  # type: ignore[union-attr]
            embedding_scale=model.config.scale_emb,
            residual_scale=1.0,
            head_scale=1 / config.width_multiplier,
            rotary=self.address(rotary_table(draft.rotary_emb, capacity)),
            embedding=embedding,
            embedding_is_plain=is_plain,
            embedding_norm=self.vector(draft.input_norm1.weight),
            state_norm=self.vector(draft.input_norm2.weight),
            fusion_bias=self.vector(draft.fc.bias),
            fusion=self.matrix(self.pack([draft.fc], self.format)),
            head=self.matrix(self._head(target.head, draft.token_ids)),
            layers=self._layers,
        )

    def _head(self, head: PackedMatrix, token_ids: Tensor | None) -> PackedMatrix:
        """The target's, for the tokens that the draft proposes."""
        layout = head.layout
        if self.format != "int4" or layout.format == "int4":
            return head if token_ids is None else take_rows(head, token_ids)
        rows = torch.arange(layout.outputs) if token_ids is None else token_ids
        return pack_linear(unpack_rows(head.data, layout, rows), format="int4", group_size=self.group_size)

    def run(
        self, tokens: Tensor, states: Tensor, *, length: int, parents: Tensor | None = None, num_logits: int = 0,
        num_best: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One step.

        Args:
            tokens: `[T]` int64. states: `[T, D]` float32, the target's of the token before each, or the draft's own.
            length: rows of the cache that are kept; the step fills those behind them.
            parents: `[S + T]` int64, of a tree whose first `S` tokens earlier steps have run; `None`: a chain.
            num_logits: tokens at the end that get logits. num_best: of these the best so many alone.

        Returns:
            Outputs `[T, D]`; then logits `[num_logits, V']`, valid until the next step, and `[num_logits, 0]` indices;
            or, with `num_best`, log-probabilities and indices `[num_logits, num_best]`, the largest first.

        Raises:
            ValueError: a token outside the vocabulary, a tree of more than 64 tokens, more than 64 or V' best, or no
                room in the cache.
        """
        count = len(tokens)
        num_best = min(num_best, self.vocab_size)
        tokens, states = tokens.to(torch.int64).contiguous(), states.float().contiguous()
        outputs = torch.empty(count, self.hidden_size)
        best = torch.empty(num_logits, num_best, dtype=torch.int64)
        log_probs = torch.empty(num_logits, num_best)
        step = self._step(tokens, states, outputs, length=length, num_logits=num_logits)
        step.parents = None if parents is None else parents.data_ptr()
        step.num_earlier = 0 if parents is None else len(parents) - count
        step.num_best = num_best if num_logits else 0
        step.best, step.best_log_probs = best.data_ptr(), log_probs.data_ptr()
        self.runs += 1
        if native.function("decode_step")(self.description, ctypes.byref(step)):
            raise ValueError(
                f"the draft cannot run {count} tokens between {int(tokens.min())} and {int(tokens.max())}, behind "
                f"{length} and {step.num_earlier} of their tree, for the best {num_best}: it takes tokens below "
                f"{self.description.vocab_size}, {self.description.capacity} in all, trees of {native.MAX_STEP} and "
                f"the best {native.MAX_BEST}; draft fewer"
            )
        return outputs, log_probs if num_best else self._logits[:num_logits, : self.vocab_size], best

    def run_chain(
        self, tokens: Tensor, states: Tensor, *, length: int, count: int, least: float = -math.inf
    ) -> tuple[Tensor, Tensor]:
        """A chain of drafts behind a chain of tokens, in one native call: each the most probable behind the one before.

        Args:
            tokens, states, length: as for `run`.
            count: at most so many drafts. least: none behind a draft where the log-probability of the path falls below.

        Returns:
            Indices and log-probabilities `[C]`; fewer than `count` also where logits are not numbers.

        Raises:
            ValueError: as `run`, or `count` below 1.
        """
        tokens, states = tokens.to(torch.int64).contiguous(), states.float().contiguous()
        outputs = torch.empty(len(tokens), self.hidden_size)
        best, log_probs = torch.empty(max(count, 0), dtype=torch.int64), torch.empty(max(count, 0))
        step = self._step(tokens, states, outputs, length=length, num_logits=1)
        ids = None if self.token_ids is None else self.token_ids.data_ptr()
        drafted = ctypes.c_int64()
        if native.function("draft_chain")(
            self.description, step, count, least, ids, best.data_ptr(), log_probs.data_ptr(), ctypes.byref(drafted)
        ):
            raise ValueError(
                f"the draft cannot run {len(tokens)} tokens between {int(tokens.min())} and {int(tokens.max())} behind "
                f"{length} and {count} drafts behind them: it takes tokens below {self.description.vocab_size}, "
                f"{self.description.capacity} in all, and drafts at least one; draft fewer"
            )
        # Where it ended early, the step that found so has run as well.
        ended = drafted.value < count and not (drafted.value and float(log_probs[: drafted.value].sum()) < least)
        self.runs += drafted.value + int(ended)
        return best[: drafted.value], log_probs[: drafted.value]

    def _step(self, tokens: Tensor, states: Tensor, outputs: Tensor, *, length: int, num_logits: int) -> native.Step:
        """A chain, without ranking."""
        return native.Step(
            num_tokens=len(tokens),
            tokens=tokens.data_ptr(),
            length=length,
            states=states.data_ptr(),
            num_logits=num_logits,
            hidden=outputs.data_ptr(),
            logits=self._logits.data_ptr(),
            num_union=self._counts.data_ptr(),
            num_active=self._counts[self._num_layers :].data_ptr(),
            workspace=self._workspace.data_ptr(),
            seconds=self._seconds.data_ptr() if self.times else None,
        )
