"""`NativeDraft`: an EAGLE draft model beside a `NativeTarget`, a step of which is one call of the CPU kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blockffn.inference.native_model import NativeModel
from blockffn.inference.native_weights import NativeWeights, rotary_table
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.ops import native
from blockffn.ops.quantization import take_rows


class NativeDraft(NativeWeights):
    """The packed weights of `draft` with an empty cache, and the target's embedding and head.

    An execution plan of `DraftModel`, as `NativeModel` is one of the target. Formats are the target's; of a reduced
    vocabulary the head's rows are copied once. One thread at a time may use it.

    Args:
        model, target: what it drafts for, and how that runs.
        capacity: tokens of a text; trees of `native.MAX_STEP` more fit behind them.

    Attributes:
        times: whether runs add up the seconds of their parts in `seconds`, by part of `native.PARTS`. runs: their number.

    Raises:
        ValueError: the draft lies on another device.
    """

    def __init__(self, draft: DraftModel, model: BlockFFNForCausalLM, target: NativeModel, *, capacity: int) -> None:
        if draft.fc.weight.device.type != "cpu":
            raise ValueError(f"the draft is on {draft.fc.weight.device}, its target's native step on the CPU; move it")
        super().__init__(format=target.format, head_format=target.head_format, group_size=target.group_size)
        self.hidden_size = draft.config.hidden_size
        self.token_ids = draft.token_ids
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
        head = target.head if draft.token_ids is None else take_rows(target.head, draft.token_ids)
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
            head=self.matrix(head),
            layers=self._layers,
        )

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
        step = native.Step(
            num_tokens=count,
            tokens=tokens.data_ptr(),
            parents=None if parents is None else parents.data_ptr(),
            length=length,
            num_earlier=0 if parents is None else len(parents) - count,
            states=states.data_ptr(),
            num_logits=num_logits,
            hidden=outputs.data_ptr(),
            logits=self._logits.data_ptr(),
            num_best=num_best if num_logits else 0,
            best=best.data_ptr(),
            best_log_probs=log_probs.data_ptr(),
            num_union=self._counts.data_ptr(),
            num_active=self._counts[self._num_layers :].data_ptr(),
            workspace=self._workspace.data_ptr(),
            seconds=self._seconds.data_ptr() if self.times else None,
        )
        self.runs += 1
        if native.function("decode_step")(self.description, ctypes.byref(step)):
            raise ValueError(
                f"the draft cannot run {count} tokens between {int(tokens.min())} and {int(tokens.max())}, behind "
                f"{length} and {step.num_earlier} of their tree, for the best {num_best}: it takes tokens below "
                f"{self.description.vocab_size}, {self.description.capacity} in all, trees of {native.MAX_STEP} and "
                f"the best {native.MAX_BEST}; draft fewer"
            )
        return outputs, log_probs if num_best else self._logits[:num_logits, : self.vocab_size], best
