"""Learning from a teacher: the loss is the divergence, its gradient is exact, and a student comes closer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from blockffn.data.tokenizer import load_tokenizer
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import preset_config
from blockffn.training.config import DataSettings, OptimizerSettings, TrainSettings
from blockffn.training.distillation import TeacherTargets, mixed_losses_and_gradient, state_difference
from blockffn.training.language_model_loss import IGNORE, language_model_loss, linear_loss
from blockffn.training.loop import train
from blockffn.training.results import read_metrics

Settings = Callable[..., TrainSettings]
VOCAB = 11


def parts() -> tuple[torch.Tensor, ...]:
    """Student's hidden states and head, teacher's hidden states and head, next tokens of which one is ignored."""
    student, head = torch.randn(6, 5, requires_grad=True), torch.randn(VOCAB, 5, requires_grad=True)
    tokens = torch.tensor([3, 0, IGNORE, 10, 7, 3])
    return student, head, torch.randn(6, 4), torch.randn(VOCAB, 4), tokens


def losses(share: float, student: torch.Tensor, head: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
    def loss_and_gradient(logits: torch.Tensor, targets: object, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return mixed_losses_and_gradient(logits, targets, size, share=share)  # type: ignore[arg-type]

    return linear_loss(student, head, TeacherTargets(*teacher), loss_and_gradient)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mixture_and_its_gradient_are_those_of_autograd(share: float) -> None:
    student, head, teacher, teacher_head, tokens = parts()
    minimised, cross_entropy = losses(share, student, head, teacher, teacher_head, tokens)
    found = torch.autograd.grad(2 * minimised, (student, head))
    kept = tokens != IGNORE
    logits = (student @ head.T)[kept]
    divergence = F.kl_div(
        logits.log_softmax(-1), (teacher @ teacher_head.T)[kept].log_softmax(-1), log_target=True, reduction="sum"
    )
    plain = F.cross_entropy(logits, tokens[kept], reduction="sum")
    wanted = share * divergence + (1 - share) * plain
    torch.testing.assert_close(minimised, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross_entropy, plain, rtol=1e-5, atol=1e-5)
    for left, right in zip(found, torch.autograd.grad(2 * wanted, (student, head))):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_without_the_teachers_share_it_is_the_language_models_loss() -> None:
    student, head, teacher, teacher_head, _ = parts()
    labels = torch.tensor([[4, 3, 0, IGNORE, 10, 7]])
    tokens = torch.cat((labels[0, 1:], torch.tensor([IGNORE])))
    plain = language_model_loss(student[None], head, labels)
    torch.testing.assert_close(losses(0.0, student, head, teacher, teacher_head, tokens)[0], plain)


def test_a_teacher_has_nothing_to_teach_its_equal() -> None:
    _, _, teacher, teacher_head, tokens = parts()
    minimised, _ = losses(1.0, teacher, teacher_head, teacher, teacher_head, tokens)
    assert abs(float(minimised)) < 1e-5


def test_states_differ_relative_to_the_teachers_size_and_padding_does_not_count() -> None:
    theirs = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    ours = torch.tensor([[[3.0, 1.0], [9.0, 9.0]]])
    assert float(state_difference(ours, theirs, torch.tensor([[True, False]]))) == pytest.approx(9 / 25)


@pytest.fixture
def teacher_folder(tmp_path: Path, data_folder: Path) -> Path:
    model = BlockFFNForCausalLM(preset_config("nano", "dense", hidden_size=32, num_hidden_layers=2, head_dim=8,
                                              intermediate_size=45, vocab_size=300))  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # an opinion that can be learnt
    model.save_pretrained(tmp_path / "teacher")
    load_tokenizer(data_folder).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_student_comes_closer_to_its_teacher(tmp_path: Path, settings: Settings, teacher_folder: Path) -> None:
    chosen = settings(steps=30, teacher={"folder": str(teacher_folder), "hidden": 0.1})
    train(chosen, tmp_path / "run", progress=False)
    records = read_metrics(tmp_path / "run")
    assert records[-1]["distillation_loss"] < 0.7 * records[0]["distillation_loss"]
    last = records[-1]
    penalties = sum(last["coefficients"][name] * last["terms"][name] for name in last["terms"])
    assert last["loss"] == pytest.approx(last["distillation_loss"] + penalties)


def test_a_step_does_not_depend_on_micro_batches(tmp_path: Path, settings: Settings, teacher_folder: Path) -> None:
    first: list[float] = []
    for micro in (8, 3):
        chosen = settings(steps=2, micro_batch_size=micro, teacher={"folder": str(teacher_folder), "share": 0.5})
        train(chosen, tmp_path / f"run{micro}", device="cpu", progress=False)
        first.append(read_metrics(tmp_path / f"run{micro}")[-1]["loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_a_run_starts_from_a_model_and_keeps_its_architecture(
    tmp_path: Path, data_folder: Path, teacher_folder: Path
) -> None:
    still = OptimizerSettings(learning_rate=0.0)
    data = DataSettings({str(data_folder): 1.0}, sequence_length=64, align=8)
    chosen = TrainSettings(start_from=str(teacher_folder), data=data, optimizer=still, steps=1, compile=False)
    train(chosen, tmp_path / "run", progress=False)
    before = BlockFFNForCausalLM.from_pretrained(teacher_folder)
    after = BlockFFNForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert after.config.intermediate_size == 45
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_model_to_start_from_and_model_settings_exclude_each_other(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"brings its own architecture; leave model\.hidden_size out"):
        settings(start_from="somewhere")


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, settings: Settings) -> None:
    BlockFFNForCausalLM(preset_config("nano", "dense", hidden_size=32, vocab_size=301)).save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match="has vocab_size 301, the model that learns"):
        train(settings(steps=1, teacher={"folder": str(tmp_path / "t")}), tmp_path / "run", progress=False)
