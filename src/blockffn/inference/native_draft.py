"""`NativeDraft`: an EAGLE draft model beside a `NativeTarget`, a step of which is one call of the CPU kernels."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from blockffn.inference.ids import Ids, listed
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
        self._make_step()

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

    def _make_step(self) -> None:
        """What steps are told, and where they leave what is read at once: made once, because a step takes about as long
        as making these in caches that it has emptied."""
        self._tokens, self._parents, self._best = (native.StepIds() for _ in range(3))
        self._log_probs = (ctypes.c_float * native.MAX_STEP)()
        self._num_drafted = ctypes.c_int64()
        self._outputs = torch.empty(native.MAX_STEP, self.hidden_size)
        self._step = native.Step(
            logits=self._logits.data_ptr(),
            num_union=self._counts.data_ptr(),
            num_active=self._counts[self._num_layers :].data_ptr(),
            workspace=self._workspace.data_ptr(),
        )
        # Of a token's index its id, without a tensor's detour.
        ids = self.token_ids
        self._ids = None if ids is None else (ctypes.c_int64 * len(ids)).from_address(ids.data_ptr())

    def run(
        self, tokens: Ids, states: Tensor, *, length: int, parents: Ids | None = None, num_logits: int = 0,
        num_best: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One step.

        Args:
            tokens: `T`. states: `[T, D]` float32, contiguous: the target's of the token before each, or the
                draft's own.
            length: rows of the cache that are kept; the step fills those behind them.
            parents: `S + T`, of a tree whose first `S` tokens earlier steps have run; `None`: a chain.
            num_logits: tokens at the end that get logits. num_best: of these the best so many alone.

        Returns:
            Outputs `[T, D]`; then logits `[num_logits, V']`, valid until the next step, and `[num_logits, 0]` indices;
            or, with `num_best`, log-probabilities and indices `[num_logits, num_best]`, the largest first.

        Raises:
            ValueError: a token outside the vocabulary, a tree of more than 64 tokens, more than 64 or V' best, or no
                room in the cache.
        """
        tokens, tree = listed(tokens), listed(() if parents is None else parents)
        count, num_best = len(tokens), min(num_best, self.vocab_size)
        fits = max(count, len(tree)) <= native.MAX_STEP
        outputs = torch.empty(count, self.hidden_size)
        best = torch.empty(num_logits, num_best, dtype=torch.int64)
        log_probs = torch.empty(num_logits, num_best)
        if fits:
            step = self._set_step(tokens, states, outputs, length=length, num_logits=num_logits)
            if parents is not None:
                step.parents, step.num_earlier = native.put(self._parents, tree), len(tree) - count
            step.num_best = num_best if num_logits else 0
            step.best, step.best_log_probs = best.data_ptr(), log_probs.data_ptr()
            fits = not native.function("decode_step")(self.description, step)
        self.runs += 1
        if not fits:
            raise ValueError(
                f"the draft cannot run {count} tokens between {min(tokens)} and {max(tokens)}, behind {length} and "
                f"{max(len(tree) - count, 0)} of their tree, for the best {num_best}: it takes tokens below "
                f"{self.description.vocab_size}, {self.description.capacity} in all, trees of {native.MAX_STEP} and "
                f"the best {native.MAX_BEST}; draft fewer"
            )
        return outputs, log_probs if num_best else self._logits[:num_logits, : self.vocab_size], best

    def run_chain(
        self, tokens: Ids, states: Tensor, *, length: int, count: int, least: float = -math.inf
    ) -> tuple[list[int], list[float]]:
        """A chain of drafts behind a chain of tokens, in one native call: each the most probable behind the one before.

        Args:
            tokens, states, length: as for `run`.
            count: at most so many drafts. least: none behind a draft where the log-probability of the path falls below.

        Returns:
            Ids of tokens and their log-probabilities; fewer than `count` also where logits are not numbers.

        Raises:
            ValueError: as `run`, or `count` below 1 or above 64.
        """
        tokens = listed(tokens)
        fits = max(len(tokens), count) <= native.MAX_STEP
        if fits:
            step = self._set_step(tokens, states, self._outputs, length=length, num_logits=1)
            ids = None if self.token_ids is None else self.token_ids.data_ptr()
            fits = not native.function("draft_chain")(
                self.description, step, count, least, ids, self._best, self._log_probs, self._num_drafted
            )
        if not fits:
            raise ValueError(
                f"the draft cannot run {len(tokens)} tokens between {min(tokens)} and {max(tokens)} behind "
                f"{length} and {count} drafts behind them: it takes tokens below {self.description.vocab_size}, "
                f"{self.description.capacity} in all, and drafts 1 to {native.MAX_STEP} at once; draft fewer"
            )
        drafted = self._num_drafted.value
        best, log_probs = self._best[:drafted], self._log_probs[:drafted]
        # Where it ended early, the step that found so has run as well.
        ended = drafted < count and not (drafted and sum(log_probs) < least)
        self.runs += drafted + int(ended)
        return best if self._ids is None else [self._ids[index] for index in best], log_probs

    def _set_step(
        self, tokens: list[int], states: Tensor, outputs: Tensor, *, length: int, num_logits: int
    ) -> native.Step:
        """A chain, without ranking. The tensors have to live as long as it is used."""
        assert states.dtype == torch.float32
        assert states.is_contiguous()
        step = self._step
        step.tokens = native.put(self._tokens, tokens)
        step.num_tokens, step.length, step.num_logits = len(tokens), length, num_logits
        step.states, step.hidden = states.data_ptr(), outputs.data_ptr()
        step.parents, step.num_earlier, step.num_best = None, 0, 0
        step.seconds = self._seconds.data_ptr() if self.times else None
        return step
