"""One micro-batch: what the model and the objectives make of it, as sums that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.objectives import objective_terms
from blockffn.routing import Routing
from blockffn.training.config import ObjectiveSettings
from blockffn.training.language_model_loss import cross_entropy_sum, language_model_loss


@dataclass(frozen=True)
class MicroBatchLoss:
    """Parts of the step's loss that this micro-batch adds. All are 0-d float32; `routings` are detached.

    Attributes:
        language_model: cross entropy over the step's target tokens.
        terms: objective by name, averaged over layers, without its coefficient.
    """

    language_model: Tensor
    terms: dict[str, Tensor]
    routings: tuple[Routing, ...]


class TrainingModel(nn.Module):
    """The model together with its objectives, so that data-parallel wrappers see one forward pass.

    Args:
        model: the language model.
        objectives: names and constants of the objectives; coefficients are the caller's.
        precision: `bfloat16` runs the model under autocast; norms, routing and losses stay in float32.
        compile: compile each decoder layer and the cross entropy (eager, it costs as much as several layers).
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        objectives: ObjectiveSettings,
        *,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.autocast = precision == "bfloat16"
        self.cross_entropy_sum = torch.compile(cross_entropy_sum) if compile else cross_entropy_sum
        if compile:
            for layer in model.model.layers:
                layer.compile()

    def forward(
        self, input_ids: Tensor, labels: Tensor, document_ids: Tensor, position_ids: Tensor, counts: dict[str, Tensor]
    ) -> MicroBatchLoss:
        """Rows `[B, T]` of a packed batch; `counts` are those of the whole step over all ranks."""
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            out = self.model.model(
                input_ids, document_ids=document_ids, position_ids=position_ids, output_routing=True, use_cache=False
            )
            hidden = self.model.head_input(out.last_hidden_state)
            loss = language_model_loss(hidden, self.model.lm_head.weight, labels, apply=self.cross_entropy_sum)
        routings = out.routings or ()
        terms = {}
        if self.objectives.terms:
            terms = objective_terms(
                routings,
                list(self.objectives.terms),
                document_ids=document_ids,
                counts=counts,
                chunk_length=self.objectives.chunk_length,
                sharpness=self.objectives.sharpness,
            )
        detached = tuple(Routing(r.logits.detach(), r.shares.detach(), r.weights.detach()) for r in routings)
        return MicroBatchLoss(loss / counts["num_targets"].clamp_min(1), terms, detached)
