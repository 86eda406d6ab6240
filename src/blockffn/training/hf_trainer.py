"""A thin `transformers.Trainer` for those who stay there: the same loss as `blockffn train`, nothing else changed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from blockffn.configuration import BlockFFNConfig
from blockffn.objectives import objective_counts, objective_terms
from blockffn.training.coefficients import make_coefficient
from blockffn.training.config import ObjectiveSettings


class BlockFFNTrainer(Trainer):
    """`Trainer` that adds the sparsity objectives to the language-model loss.

    Batches hold `input_ids` and `labels`, and either `document_ids` (packed rows) or `attention_mask` (padded rows).
    Coefficients warm up by `state.global_step`; the terms are logged by name. Each micro-batch is
    averaged over its own tokens and micro-batches equally, so equal-sized ones give the loss of the whole batch;
    `blockffn train` is exact for unequal ones, too.

    Args:
        objectives: names, coefficients (constant, possibly warmed up) and constants, as for `blockffn train`.

    Raises:
        ValueError: an adaptive or steered coefficient.
    """

    # Otherwise Trainer would not divide the loss by the accumulation steps, and every objective would be that much
    # larger.
    accepts_loss_kwargs = False

    def __init__(self, *args: Any, objectives: ObjectiveSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.objectives = objectives
        self.coefficients = {name: make_coefficient(spec) for name, spec in objectives.terms.items()}
        for name, coefficient in self.coefficients.items():
            if coefficient.interval is not None:
                raise ValueError(
                    f"the coefficient of {name} reacts to what it measures, and Trainer keeps no state for it; give it "
                    "kind 'constant' here, or train with `blockffn train`"
                )
        self._sums: dict[str, Tensor] = {}
        self._sum_steps = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        labels = inputs["labels"]
        document_ids = inputs.get("document_ids")
        if document_ids is None and inputs.get("attention_mask") is not None:
            document_ids = inputs["attention_mask"].long() - 1
        forward = {k: v for k, v in inputs.items() if k not in ("labels", "source_ids")}
        outputs = model(**forward, output_routing=True)
        logits = outputs.logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if not model.training:  # the evaluation loss is the language model's, and the log is the training's
            return (loss, outputs) if return_outputs else loss
        self._add("language_model_loss", loss)
        if document_ids is None:
            document_ids = torch.zeros_like(labels)
        config = cast(BlockFFNConfig, self.model.config)  # type: ignore[union-attr]  # Trainer has refused None
        terms = objective_terms(
            outputs.routings or (),
            list(self.coefficients),
            document_ids=document_ids,
            counts=objective_counts(document_ids, chunk_length=self.objectives.chunk_length),
            chunk_length=self.objectives.chunk_length,
            sharpness=self.objectives.sharpness,
            num_shared_experts=config.num_shared_experts,
            num_experts_per_tok=config.num_experts_per_tok,
        )
        for name, term in terms.items():
            self._add(name, term)
            loss = loss + self.coefficients[name].value(self.state.global_step + 1) * term
        self._sum_steps += 1
        return (loss, outputs) if return_outputs else loss

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sum_steps:
            logs |= {name: (total / self._sum_steps).item() for name, total in self._sums.items()}
            self._sums, self._sum_steps = {}, 0
        super().log(logs, *args, **kwargs)
