"""GRIN's router: greedy picks against a loop in plain Python, the sampled gradient against its expectation."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.models.routers.sparsemixer import SparseMixerRouter, pick


def greedy(logits: list[float], k: int, jitter: float) -> list[float]:
    """Weights of one token, written from the method's description."""
    weights, left = [0.0] * len(logits), set(range(len(logits)))
    for _ in range(k):
        best = max(left, key=lambda e: logits[e])
        near = [e for e in left if (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= 2 * jitter]
        weights[best] = math.exp(logits[best]) / sum(math.exp(logits[e]) for e in near)
        left.remove(best)
    return weights


def test_a_hand_computed_case() -> None:
    """1.9 lies within a fifth of 2.0; at the second pick nothing lies near 1.9."""
    router = SparseMixerRouter(1, 4, 2).eval()
    with torch.no_grad():
        router.proj.weight.copy_(torch.tensor([[2.0], [1.9], [0.1], [-1.0]]))
    routing = router(torch.ones(1, 1))
    assert routing.weights[0].tolist() == pytest.approx([1 / (1 + math.exp(-0.1)), 1.0, 0.0, 0.0])
    torch.testing.assert_close(routing.shares[0], torch.tensor([2.0, 1.9, 0.1, -1.0]).softmax(dim=0))


def test_evaluation_is_greedy() -> None:
    torch.manual_seed(0)
    router, x = SparseMixerRouter(8, 10, 4).eval(), torch.randn(30, 8)
    with torch.no_grad():
        routing = router(x)
    expected = [greedy(row, 4, 0.1) for row in routing.logits.tolist()]
    torch.testing.assert_close(routing.weights, torch.tensor(expected))


@pytest.mark.parametrize("logit", [0.0, 3.0, -2.0])
def test_equal_logits_are_picked_k_times_without_repetition(logit: float) -> None:
    left, weights = torch.ones(1, 3, dtype=torch.bool), []
    for _ in range(3):
        chosen, weight = pick(torch.full((1, 3), logit), left, jitter_noise=0.1, sample=False)
        assert chosen.sum() == 1
        assert (left & chosen).sum() == 1
        left = left & ~chosen
        weights.append(weight.item())
    assert weights == pytest.approx([1 / 3, 1 / 2, 1.0])


def test_training_samples_near_experts_by_their_probability() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.8, 0.0]).expand(20_000, 3)
    chosen, _ = pick(logits, torch.ones_like(logits, dtype=torch.bool), jitter_noise=0.1, sample=True)
    p = 1 / (1 + math.exp(-0.2))
    frequency = chosen.float().mean(dim=0)
    torch.testing.assert_close(frequency, torch.tensor([p, 1 - p, 0.0]), atol=0.012, rtol=0)


def test_training_keeps_a_sampled_weight_whole_one_time_in_four() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.8]).expand(20_000, 2)
    chosen, weight = pick(logits, torch.ones_like(logits, dtype=torch.bool), jitter_noise=0.1, sample=True)
    p = 1 / (1 + math.exp(0.2))
    second = weight[chosen[:, 1]]
    assert second.unique().tolist() == pytest.approx([p / 3, p])
    assert (second > p / 2).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert weight[chosen[:, 0]].unique().tolist() == [pytest.approx(1 - p)]


def test_the_mean_gradient_is_the_estimator_s_expectation() -> None:
    """With a cubic loss `f_D` of the weight, Heun's rule is exact: a pick D other than the likeliest contributes
    `(f_D(p) - f_D(0)) · dp/dlogits`, the exact gradient of choosing D, and the likeliest `p · f_D'(p) · dp/dlogits`.
    """
    torch.manual_seed(0)
    num, base = 400_000, torch.tensor([1.0, 0.9, 0.95])
    cubic, square, linear = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -1.0], [-0.7, 2.0, 1.0]])
    logits = base.clone().requires_grad_()
    rows = logits.expand(num, 3)
    chosen, weight = pick(rows, torch.ones(num, 3, dtype=torch.bool), jitter_noise=0.1, sample=True)
    expert = chosen.int().argmax(dim=-1, keepdim=True)
    a, b, c = cubic[expert], square[expert], linear[expert]
    ((a * weight**3 + b * weight**2 + c * weight).sum() / num).backward()

    p = base.softmax(dim=0)
    jacobian = torch.diag(p) - p[:, None] * p[None, :]
    factor = cubic * p**3 + square * p**2 + linear * p
    factor[0] = p[0] * (3 * cubic[0] * p[0] ** 2 + 2 * square[0] * p[0] + linear[0])
    torch.testing.assert_close(logits.grad, factor @ jacobian, atol=2e-3, rtol=0)


def test_every_token_has_k_active_experts_in_training_too() -> None:
    torch.manual_seed(0)
    weights = SparseMixerRouter(8, 10, 4)(torch.randn(5, 6, 8)).weights
    assert ((weights != 0).sum(dim=-1) == 4).all()


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_experts_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok must lie in 1…4, got {k}"):
        SparseMixerRouter(2, 4, k)
