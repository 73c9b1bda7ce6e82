"""PMD-mean, A*-PO and QRPO from rewards to the loss, beside their authors' formulas and the policy gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import assert_close, f64, golden_scored, make_scored, random_rewards, random_rows
from torch import Tensor

from dar.algorithms.base import Algorithm
from dar.algorithms.policy_gradient import RLOO
from dar.algorithms.squared import OPTIMAL_VALUE
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, Prompt, TokenOutputs
from dar.config.policy_gradient import RLOOSpec
from dar.config.squared import AStarPOSpec, PMDMeanSpec, QRPOSpec
from dar.objectives.squared import uniform_optimal_value


def build(spec: Any) -> Algorithm:
    return build_algorithm(spec, max_completion_length=8)


def drawn(seed: int = 0) -> tuple[Tensor, Batch]:
    """log π_θ and a scored batch of three prompts with four completions, in double precision."""
    current, old, ref = random_rows(seed, 12)
    scored = make_scored(random_rewards(seed, 3, 4), old, ref, dtype=torch.float64)
    logprobs = make_scored(random_rewards(seed, 3, 4), current, dtype=torch.float64).old_logprobs
    return logprobs, replace(scored, labels={OPTIMAL_VALUE: f64(0.3, -0.2, 1.0).unsqueeze(1).repeat(1, 4)})


def loss_of(spec: Any, logprobs: Tensor, scored: Batch) -> Tensor:
    algorithm = build(spec)
    batch, _ = algorithm.weigh(scored)
    return algorithm.terms(TokenOutputs(logprobs), batch).losses.sum() / batch.denominator


def gradient_of(algorithm: Algorithm, logprobs: Tensor, scored: Batch) -> Tensor:
    batch, _ = algorithm.weigh(scored)
    logprobs = logprobs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(algorithm.terms(TokenOutputs(logprobs), batch).losses.sum(), logprobs)
    return grad


def sequence(tokens: Tensor, scored: Batch) -> Tensor:
    return (tokens * scored.mask).sum(1)


# --- the golden batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "advantages"),
    [
        (PMDMeanSpec(), [-1.0, 1.0, -0.25, 0.25]),
        (AStarPOSpec(), [-1.0, 1.0, 0.5, 1.0]),
        # V* = 1 + .1 log(.1 (1 − e^−10)) = .76973695.
        (QRPOSpec(), [0.23026305, 2.23026305, 1.23026305, 1.73026305]),
    ],
    ids=lambda spec: getattr(spec, "type", ""),
)
def test_advantages_of_the_golden_batch(spec: Any, advantages: list[float]):
    scored = replace(golden_scored(), labels={OPTIMAL_VALUE: torch.tensor([[2.0, 2.0], [1.5, 1.5]])})
    batch, metrics = build(spec).weigh(scored)
    assert_close(batch.advantages, advantages, rtol=1e-6)
    assert batch.weights.tolist() == [1.0] * 4
    assert batch.denominator == 4.0
    assert metrics == {}


def test_anchors_are_the_sampler_and_the_reference():
    # LP_t = (−10, −11, −8, −15), LP_0 = (−12, −10, −8, −20); π_θ = π_t, so the log-ratios to π₀ are (2, −1, 0, 5).
    scored = replace(golden_scored(), labels={OPTIMAL_VALUE: torch.zeros(2, 2)})
    at_sampler = loss_of(PMDMeanSpec(beta=0.5), scored.old_logprobs, scored)
    assert_close(at_sampler, (1 + 1 + 0.0625 + 0.0625) / 4, rtol=1e-6)
    errors = [1 - 1, 3 + 0.5, 2 - 0, 2.5 - 2.5]
    found = loss_of(AStarPOSpec(beta=0.5), scored.old_logprobs, scored)
    assert_close(found, sum(each**2 for each in errors) / 4, rtol=1e-6)
    value = uniform_optimal_value(0.5)
    assert_close(
        loss_of(QRPOSpec(beta=0.5), scored.old_logprobs, scored),
        sum((each - value) ** 2 for each in errors) / 4,
        rtol=1e-6,
    )


def test_a_row_counts_as_much_as_its_weight():
    logprobs, scored = drawn()
    algorithm = build(PMDMeanSpec())
    batch, _ = algorithm.weigh(scored)
    losses = algorithm.terms(TokenOutputs(logprobs), batch).losses
    weights = torch.arange(12.0) / 4
    weighted = algorithm.terms(TokenOutputs(logprobs), replace(batch, weights=weights)).losses
    assert_close(weighted, weights * losses, rtol=1e-12)


# --- other implementations -------------------------------------------------------------------------------------------


def test_pmd_mean_is_openkimis_loss_but_for_length_and_own_sample():
    # `compute_policy_loss_opmd` of horizon-rl/OpenKimi: ½ τ (A/τ − log-ratio)², there divided by |y|, with A of RLOO.
    logprobs, scored = drawn()
    tau = 0.03
    advantages = (scored.rewards - scored.rewards.mean(1, keepdim=True)).flatten()
    log_ratio = sequence(logprobs - scored.old_logprobs, scored)
    expected = (0.5 * tau * (advantages / tau - log_ratio).square()).mean()
    assert_close(loss_of(PMDMeanSpec(beta=tau), logprobs, scored), expected, rtol=1e-10)
    # A of RLOO is K/(K − 1) times as large, which is this loss at τ (K − 1)/K, and (K/(K − 1)) times as long a step.
    rloo = (0.5 * tau * (advantages * 4 / 3 / tau - log_ratio).square()).mean()
    assert_close(loss_of(PMDMeanSpec(beta=tau * 3 / 4), logprobs, scored) * 4 / 3, rloo, rtol=1e-10)


def test_a_star_po_is_the_authors_loss_over_two_betas():
    # `compute_policy_loss` of ZhaolinGao/A-PO: mean (β₂ · log-ratio + V* − r)².
    logprobs, scored = drawn()
    log_ratio = sequence(logprobs - scored.ref_logprobs, scored)  # pyright: ignore[reportOperatorIssue]
    value = scored.labels[OPTIMAL_VALUE].flatten()
    expected = (0.2 * log_ratio + value - scored.rewards.flatten()).square().mean() / 0.4
    assert_close(loss_of(AStarPOSpec(beta=0.2), logprobs, scored), expected, rtol=1e-10)


def test_a_star_po_is_trls_loss_over_two_betas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    a2po = pytest.importorskip("trl.experimental.a2po.a2po_trainer", reason="the extra dar-rlhf[trl] is not installed")
    logprobs, scored = drawn()
    assert scored.ref_logprobs is not None
    trainer = SimpleNamespace(
        args=SimpleNamespace(beta2=0.2),
        model=SimpleNamespace(training=True),
        _metrics={"train": {"implicit_reward": [], "advantage": []}},
        _get_sequence_logps=lambda *_: sequence(logprobs, scored),
    )
    inputs: dict[str, Any] = dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep"))
    inputs |= {
        "ref_logps": sequence(scored.ref_logprobs, scored),
        "rewards": scored.rewards.flatten(),
        "v_star": scored.labels[OPTIMAL_VALUE].flatten(),
    }
    theirs = a2po.A2POTrainer.compute_loss(trainer, None, inputs)
    assert_close(loss_of(AStarPOSpec(beta=0.2), logprobs, scored), theirs / 0.4, rtol=1e-10)


def test_qrpo_is_the_authors_loss_over_two_betas():
    # `qrpo_loss` of CLAIRE-Labo/quantile-reward-policy-optimization: mean (q − β log Z − β · log-ratio)², with
    # log Z = log β + 1/β.
    logprobs, scored = drawn()
    scored = replace(scored, rewards=f64([0, 0.25, 0.5, 1], [0.1, 1, 0.9, 0], [0.5, 0.5, 0.5, 0.5]))
    beta = 0.05
    log_ratio = sequence(logprobs - scored.ref_logprobs, scored)  # pyright: ignore[reportOperatorIssue]
    errors = scored.rewards.flatten() - beta * (math.log(beta) + 1 / beta) - beta * log_ratio
    assert_close(loss_of(QRPOSpec(beta=beta), logprobs, scored), errors.square().mean() / (2 * beta), rtol=1e-7)


# --- the policy gradient ---------------------------------------------------------------------------------------------


def test_pmd_mean_starts_along_rloos_gradient():
    # Without a KL, and K/(K − 1) apart: the mean here has the sample in it.
    _, scored = drawn()
    pmd = gradient_of(build(PMDMeanSpec(beta=0.3)), scored.old_logprobs, scored)
    rloo = gradient_of(RLOO(RLOOSpec(beta=0.0)), scored.old_logprobs, scored)
    assert_close(pmd * 4 / 3, rloo, rtol=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_star_po_on_policy_has_the_expected_gradient_of_rloo_whatever_the_value_is(value: float):
    # Over all outcomes with their probabilities: that of −(E[r] − β KL[π‖π₀]). V* is a baseline.
    policy, pi_0, rewards, beta = f64(0.2, 0.5, 0.3), f64(0.5, 0.3, 0.2), f64(1.0, 0.0, -1.0), 0.4
    logits = policy.log().requires_grad_()
    softmax = torch.softmax(logits, 0)
    exact = -((softmax * rewards).sum() - beta * (softmax * (softmax.log() - pi_0.log())).sum())
    (expected,) = torch.autograd.grad(exact, logits)

    old, ref = ([[each] for each in which.log().tolist()] for which in (policy, pi_0))
    scored = make_scored([[each] for each in rewards.tolist()], old, ref, dtype=torch.float64)
    scored = replace(scored, labels={OPTIMAL_VALUE: torch.full((3, 1), value)})
    algorithm = build(AStarPOSpec(beta=beta))
    batch, _ = algorithm.weigh(scored)
    losses = algorithm.terms(TokenOutputs(torch.log_softmax(logits, 0).unsqueeze(1)), batch).losses
    (grad,) = torch.autograd.grad((policy * losses).sum(), logits)
    assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def test_qrpo_pushes_down_what_is_below_its_value_at_the_reference():
    # At π₀ the gradient on a token is −(q − V*)/B: only quantiles above .77 are pushed up at β = .1.
    _, scored = drawn()
    scored = replace(scored, rewards=f64([0, 0.25, 0.5, 1], [0.76, 0.78, 0.9, 0], [0.5, 0.5, 0.5, 0.5]))
    assert scored.ref_logprobs is not None
    grad = gradient_of(build(QRPOSpec()), scored.ref_logprobs, scored)
    assert torch.equal(grad[:, 0] < 0, scored.rewards.flatten() > 0.7698)


def test_a_star_po_reads_the_optimal_value_of_every_prompts_row():
    columns = [{"ref_rewards": [float(n)] * n + [0]} for n in (1, 3)]
    prompts = [Prompt(position=0, content="p", token_ids=(1,), columns=each) for each in columns]
    # n rewards of n and one of 0: 2 log((n e^(n/2) + 1)/(n + 1)).
    expected = [2 * math.log((n * math.exp(n / 2) + 1) / (n + 1)) for n in (1, 3)]
    assert_close(build(AStarPOSpec(value_beta=2.0)).labels(prompts)[OPTIMAL_VALUE], expected, rtol=1e-6)
    assert not build(PMDMeanSpec()).labels(prompts)
