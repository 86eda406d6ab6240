"""One micro-batch: what the model and the objectives make of it, as sums that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockffn.data.batch import Batch
from blockffn.evaluation.perplexity import Scores, token_losses
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.packed_attention import NAME as PACKED_ATTENTION
from blockffn.models.packed_attention import suits_packed_attention
from blockffn.objectives import objective_terms
from blockffn.routing import Routing
from blockffn.training.config import ObjectiveSettings
from blockffn.training.distillation import Teacher
from blockffn.training.language_model_loss import cross_entropy_and_gradient, language_model_loss
from blockffn.training.statistics import layer_counts


@dataclass(frozen=True)
class MicroBatchLoss:
    """What this micro-batch adds to the step's loss and to what is logged.

    Attributes:
        language_model: 0-d float32; cross entropy over the step's target tokens.
        distillation: what is minimised in its place where there is a teacher, 0-d float32.
        terms: objective by name, 0-d float32, averaged over layers, without its coefficient.
        active_in_windows, expert_tokens: of `statistics.layer_counts`, stacked over layers: `[layers]` and
            `[layers, E]`; `None` for a dense model.
    """

    language_model: Tensor
    terms: dict[str, Tensor]
    distillation: Tensor | None = None
    active_in_windows: Tensor | None = None
    expert_tokens: Tensor | None = None


class TrainingModel(nn.Module):
    """The model together with its objectives, so that data-parallel wrappers see one forward pass.

    Args:
        model: the language model, on the device where it will train.
        objectives: names and constants of the objectives; coefficients are the caller's.
        precision: `bfloat16` runs the model under autocast; norms, routing and losses stay in float32.
        compile: compile each decoder layer and the cross entropy (eager, it costs as much as several layers); on a GPU
            also the objectives, which eager are many small launches (on a CPU, compiling them costs a short run more).
        teacher: a model to learn from.
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        objectives: ObjectiveSettings,
        *,
        precision: str = "float32",
        compile: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.model, self.teacher = model, teacher
        self.objectives = objectives
        self.autocast = precision == "bfloat16"
        if self.autocast and suits_packed_attention(model.device, torch.bfloat16):
            for one in [model] if teacher is None else [model, teacher.model]:
                one.set_attn_implementation(PACKED_ATTENTION)
        self.loss_and_gradient = torch.compile(cross_entropy_and_gradient) if compile else cross_entropy_and_gradient
        self.measure_layer = (
            torch.compile(_measure_layer) if compile and model.device.type == "cuda" else _measure_layer
        )
        if compile:
            for layer in model.model.layers:
                layer.compile()

    def score(self, batch: Batch) -> Scores:
        """Losses of held-out tokens, as `evaluate` wants them; goes through a sharded model's own hooks."""
        return token_losses(self.model, batch, precision="bfloat16" if self.autocast else "float32")

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        document_ids: Tensor,
        position_ids: Tensor,
        counts: dict[str, Tensor],
        document_offsets: Tensor | None = None,
    ) -> MicroBatchLoss:
        """Rows `[B, T]` of a packed batch; `counts` are those of the whole step over all ranks.

        `document_offsets`: as for the model.
        """
        losses, routings = self.language_model(input_ids, labels, document_ids, position_ids, document_offsets)
        losses = losses / counts["num_targets"].clamp_min(1)
        distillation, loss = (None, losses) if self.teacher is None else losses.unbind()
        if not routings:
            return MicroBatchLoss(loss, {}, distillation)
        config = self.model.config
        layers = [
            self.measure_layer(
                routing,
                document_ids,
                counts,
                self.objectives,
                num_shared_experts=config.num_shared_experts,
                num_experts_per_tok=config.num_experts_per_tok,
            )
            for routing in routings
        ]
        return MicroBatchLoss(
            loss,
            {name: torch.stack([layer[0][name] for layer in layers]).mean() for name in self.objectives.terms},
            distillation,
            active_in_windows=torch.stack([layer[1] for layer in layers]),
            expert_tokens=torch.stack([layer[2] for layer in layers]),
        )

    def language_model(
        self,
        input_ids: Tensor,
        labels: Tensor,
        document_ids: Tensor,
        position_ids: Tensor,
        document_offsets: Tensor | None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Summed cross entropy of the rows, and the layers' routings (none of a dense model).

        With a teacher: `[2]`, what is minimised in place of the cross entropy, and the cross entropy.
        """
        rows = {"document_ids": document_ids, "document_offsets": document_offsets, "position_ids": position_ids}
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            out = self.model.model(
                input_ids,
                **rows,
                output_routing=True,
                output_hidden_states=self.teacher is not None and self.teacher.settings.hidden > 0,
                use_cache=False,
            )
            hidden = self.model.head_input(out.last_hidden_state)
            if self.teacher is not None:
                theirs = self.teacher.states(input_ids, **rows)
                head = self.model.lm_head.weight
                losses = self.teacher.losses(out.hidden_states or (), head, hidden, labels, theirs)
                return torch.stack(losses), out.routings or ()
            loss = language_model_loss(
                hidden, self.model.lm_head.weight, labels, loss_and_gradient=self.loss_and_gradient
            )
        return loss, out.routings or ()


def _measure_layer(
    routing: Routing,
    document_ids: Tensor,
    counts: dict[str, Tensor],
    objectives: ObjectiveSettings,
    *,
    num_shared_experts: int,
    num_experts_per_tok: int,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A layer's objectives by name, and its `layer_counts`."""
    terms = objective_terms(
        (routing,),
        list(objectives.terms),
        document_ids=document_ids,
        counts=counts,
        chunk_length=objectives.chunk_length,
        sharpness=objectives.sharpness,
        num_shared_experts=num_shared_experts,
        num_experts_per_tok=num_experts_per_tok,
    )
    return terms, *layer_counts(routing.weights.detach(), document_ids)
