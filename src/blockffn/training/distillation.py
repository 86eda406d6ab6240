"""Learning from a teacher: the divergence from its predictions, in pieces like the cross entropy, and its states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.checkpoints.load import load
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.training.config import TeacherSettings
from blockffn.training.language_model_loss import IGNORE, LossAndGradient, linear_loss, next_tokens


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher says of each token, as its hidden states: logits are made piece by piece.

    Attributes:
        hidden_TD, head_VD: the teacher's head's input, and its head.
        tokens_T: the next tokens; -100 is ignored.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    tokens_T: Tensor

    def __getitem__(self, piece: slice) -> tuple[Tensor, Tensor]:
        """Logits `[P, V]` and next tokens `[P]` of a piece."""
        return self.hidden_TD[piece] @ self.head_VD.to(self.hidden_TD.dtype).T, self.tokens_T[piece]


class Teacher:
    """A model that is asked and does not learn. Not a module: wrappers and checkpoints do not see its weights.

    Args:
        model: on the device and in the dtype that it shall run in.
        settings: how much its word counts.
        compile: compile its layers.
    """

    def __init__(self, model: BlockFFNForCausalLM, settings: TeacherSettings, *, compile: bool = False) -> None:
        self.model, self.settings = model.eval().requires_grad_(False), settings
        loss_and_gradient = torch.compile(mixed_losses_and_gradient) if compile else mixed_losses_and_gradient
        self.loss_and_gradient: LossAndGradient = partial(loss_and_gradient, share=settings.share)
        if compile:
            for layer in model.model.layers:
                layer.compile()

    @torch.no_grad()
    def states(self, input_ids: Tensor, **rows: Tensor | None) -> tuple[Tensor, ...]:
        """States `[B, T, D]` before each layer and, last, after the final norm."""
        out = self.model.model(input_ids, **rows, output_hidden_states=True, use_cache=False)
        return out.hidden_states

    def losses(self, states: tuple[Tensor, ...], head_VD: Tensor, hidden_BTD: Tensor, labels: Tensor,
               theirs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What is minimised, and the plain cross entropy, both summed over the labels' tokens.

        Args:
            states: the student's, as `states` returns the teacher's (`theirs`).
            head_VD, hidden_BTD: the student's head, and its input.
        """
        tokens = next_tokens(labels).reshape(-1)
        hidden = self.model.head_input(theirs[-1]).flatten(0, 1)
        targets = TeacherTargets(hidden, self.model.lm_head.weight, tokens)
        minimised, cross_entropy = linear_loss(
            hidden_BTD.flatten(0, 1), head_VD, targets, self.loss_and_gradient
        ).unbind()
        if self.settings.hidden:
            counted = (tokens != IGNORE).view(labels.shape)
            differences = [state_difference(s, t, counted) for s, t in zip(states[1:], theirs[1:])]
            minimised = minimised + self.settings.hidden * torch.stack(differences).mean()
        return minimised, cross_entropy


def mixed_losses_and_gradient(
    logits_TV: Tensor, targets: tuple[Tensor, Tensor], vocab_size: int, *, share: float
) -> tuple[Tensor, Tensor]:
    """Summed `share · KL(teacher, student) + (1 - share) · cross entropy`, the cross entropy, the first one's gradient.

    Args:
        logits_TV: the student's; columns from `vocab_size` on count for nothing.
        targets: the teacher's logits `[T, vocab_size]`, and the next tokens, of which -100 counts for nothing.

    Returns:
        `[2]` in float32, and the gradient in the shape and dtype of the logits.
    """
    teacher_TV, tokens_T = targets
    ours = logits_TV[:, :vocab_size].float().log_softmax(dim=-1)
    theirs = teacher_TV.float().log_softmax(dim=-1)
    counted = tokens_T != IGNORE
    tokens = torch.where(counted, tokens_T, 0).unsqueeze(-1)
    wanted = theirs.exp()
    divergence = (wanted * (theirs - ours)).sum(dim=-1)
    cross_entropy = -ours.gather(-1, tokens).squeeze(-1)
    one_hot = torch.arange(vocab_size, device=ours.device) == tokens
    gradient = ours.exp() - share * wanted - (1 - share) * one_hot.to(ours.dtype)
    gradient = torch.where(counted.unsqueeze(-1), gradient, 0)
    losses = torch.stack((share * divergence + (1 - share) * cross_entropy, cross_entropy))
    padded = F.pad(gradient, (0, logits_TV.shape[-1] - vocab_size))
    return torch.where(counted, losses, 0).sum(dim=-1), padded.to(logits_TV.dtype)


def state_difference(ours_BTD: Tensor, theirs_BTD: Tensor, counted_BT: Tensor) -> Tensor:
    """Squared difference of states over the teacher's squared size, summed over the counted tokens; 0-d float32."""
    ours, theirs = ours_BTD.float(), theirs_BTD.float()
    relative = (ours - theirs).square().sum(dim=-1) / theirs.square().sum(dim=-1).clamp_min(1e-6)
    return torch.where(counted_BT, relative, 0).sum()


def open_teacher(
    settings: TeacherSettings, student: BlockFFNForCausalLM, *, precision: str, compile: bool
) -> Teacher | None:
    """The teacher that the settings name, on the student's device; `None` if they name none.

    Raises:
        ValueError: its vocabulary or, where states are compared, its shape is not the student's.
    """
    if settings.folder is None:
        return None
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = load(Path(settings.folder), device=student.device, dtype=dtype)
    compared = ("vocab_size", "hidden_size", "num_hidden_layers") if settings.hidden else ("vocab_size",)
    for name in compared:
        theirs, ours = getattr(model.config, name), getattr(student.config, name)
        if theirs != ours:
            raise ValueError(f"the teacher {settings.folder} has {name} {theirs}, the model that learns {ours}")
    return Teacher(model, settings, compile=compile)
