"""What one batch teaches a draft: the target's next states and next-token distributions, over one or more passes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.data.batch import Batch, to_device
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.models.packed_attention import NAME as PACKED_ATTENTION
from blockffn.models.packed_attention import document_offsets, suits_packed_attention
from blockffn.training.draft.loss import divergence_and_gradient_of, head_divergence
from blockffn.training.draft.passes import accepted_and_tried, counted_pairs, run_passes
from blockffn.training.draft.settings import DraftTrainSettings


class DraftObjective:
    """Losses of a draft against its target. Not a module: checkpoints see the draft alone.

    Args:
        draft: on the target's device.
        target: frozen here, in the dtype that it shall run in.
        autocast: run the draft's products in bfloat16.
        compile: compile the target's layers and the divergence.
    """

    def __init__(
        self,
        draft: DraftModel,
        target: BlockFFNForCausalLM,
        settings: DraftTrainSettings,
        *,
        autocast: bool,
        compile: bool,
    ) -> None:
        self.draft, self.target, self.settings = draft, target.eval().requires_grad_(False), settings
        self.autocast = autocast
        relative = [settings.unroll_decay**step for step in range(settings.unroll)]
        self._shares_S11 = torch.tensor([r / sum(relative) for r in relative], device=target.device)[:, None, None]
        if suits_packed_attention(target.device, target.dtype):
            target.set_attn_implementation(PACKED_ATTENTION)
        self._divergence = torch.compile(divergence_and_gradient_of) if compile else divergence_and_gradient_of
        if compile:
            for layer in target.model.layers:
                layer.compile()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the pairs that count, of rows on the CPU.

        Returns:
            `loss`, what is minimised, 0-d float32 with a gradient; `token`, `feature`, `accepted` and `tried`, `[S]` by
            pass (see `accepted_and_tried`).
        """
        settings = self.settings
        hidden, outputs, counted = self._run(batch, settings.unroll)
        means = counted / counted.sum(dim=(1, 2), keepdim=True).clamp_min(1)
        weights = means * self._shares_S11
        loss, divergences, hits = self._head(outputs, hidden, weights * settings.token_weight)
        distances = feature_distances(outputs, hidden)
        if settings.feature_weight:
            loss = loss + settings.feature_weight * (distances * weights).sum()
        accepted, tried = accepted_and_tried(hits, counted)
        return {
            "loss": loss,
            "token": (divergences * means).sum(dim=(1, 2)),
            "feature": (distances.detach() * means).sum(dim=(1, 2)),
            "accepted": accepted,
            "tried": tried,
        }

    @torch.no_grad()
    def acceptance(self, batch: Batch, *, depth: int) -> tuple[Tensor, Tensor]:
        """`accepted_and_tried` of `depth` tokens drafted behind every token of the rows."""
        hidden, outputs, counted = self._run(batch, depth)
        _, _, hits = self._head(outputs, hidden, torch.zeros_like(counted, dtype=torch.float32))
        return accepted_and_tried(hits, counted)

    def _run(self, batch: Batch, passes: int) -> tuple[Tensor, Tensor, Tensor]:
        """The target's next states `[B, T, D]`, the draft's outputs `[S, B, T, D]`, and which count `[S, B, T]`."""
        device = self.target.device
        offsets = to_device(document_offsets(batch.document_ids), device)
        input_ids, document_ids, position_ids = (
            to_device(tensor, device) for tensor in (batch.input_ids, batch.document_ids, batch.position_ids)
        )
        with torch.no_grad():
            hidden = self.target.model(
                input_ids,
                document_ids=document_ids,
                document_offsets=offsets,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
            embeddings = self.target.model.embed_tokens(input_ids.roll(-1, dims=1)) * self.target.config.scale_emb
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
            outputs = run_passes(
                self.draft,
                embeddings,
                hidden,
                document_ids,
                passes=passes,
                mask_dtype=torch.bfloat16 if self.autocast else hidden.dtype,
            )
        counted = torch.stack([counted_pairs(document_ids, step) for step in range(passes)])
        return hidden.roll(-1, dims=1), outputs, counted

    def _head(self, outputs: Tensor, hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of divergences, divergences `[S, B, T]` and hits `[S, B, T]`."""
        loss, divergences, hits = head_divergence(
            self.target.head_input(outputs).flatten(1, 2),
            self.target.head_input(hidden).flatten(0, 1),
            self.target.lm_head.weight,
            self.draft.token_ids,
            weights.flatten(1, 2),
            divergence_and_gradient=self._divergence,
        )
        return loss, divergences.view_as(weights), hits.view_as(weights)


def feature_distances(outputs: Tensor, hidden: Tensor) -> Tensor:
    """Smooth L1 distance of outputs `[S, B, T, D]` and states `[B, T, D]`, mean over their numbers; float32."""
    ours = outputs.float()
    return F.smooth_l1_loss(ours, hidden.float().expand_as(ours), reduction="none").mean(dim=-1)
