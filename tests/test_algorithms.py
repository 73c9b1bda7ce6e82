"""The named methods: from a scored batch to fixed weights, and from those to the loss of each row."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, few, golden_scored, make_scored, padded, random_rewards, random_rows
from support.flows import FLOW_METHODS
from torch import Tensor

from dar.algorithms.base import Algorithm, Terms, kl_metrics
from dar.algorithms.policy_gradient import GRPO, RLOO
from dar.algorithms.preference import PairedPreference
from dar.algorithms.realignment import IMPACT, TRACE
from dar.algorithms.regression import DAR, weight_metrics
from dar.algorithms.squared import OPTIMAL_VALUE
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, TokenGroups, TokenOutputs, Weighted
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.logits import LCOSpec
from dar.config.policy_gradient import BNPOSpec, DAOSpec, DAPOSpec, DPPOSpec, DrGRPOSpec, GRPOSpec, MaxRLSpec, RLOOSpec
from dar.config.preference import OnlineDPOSpec
from dar.config.realignment import TRACESpec
from dar.config.regression import AWRSpec, DARSpec, TargetESSSpec, TargetKLSpec, TPOSpec
from dar.objectives.policy_gradient import clipped_surrogate
from dar.objectives.regression import clip_log_weights
from dar.ops import Mean

NAN, INF = math.nan, math.inf
# Every method at its defaults, and further settings of those that have a branch there.
SPECS: list[Any] = [
    *(spec() for name, spec in ALGORITHM_SPECS.items() if name not in FLOW_METHODS),  # these read more of a step
    DARSpec(alpha=0.5, beta=1.0, weight_scale="mean", baseline="leave_one_out"),
    DARSpec(beta=TargetKLSpec(target_kl=0.3)),
    DARSpec(beta=1.0, normalize_weights="group", updates=2),
    DARSpec(beta=1.0, center_weights=True),
    TPOSpec(score="sum", updates=2),
    AWRSpec(beta=TargetESSSpec(target_ess=0.5), normalize="none"),
    DAOSpec(ratio_level="token", normalize="none"),
    RLOOSpec(beta=0.3),
    GRPOSpec(beta=0.3),
    BNPOSpec(beta=0.3),
    DrGRPOSpec(beta=0.3),
    DAPOSpec(overlong_tokens=3),
    DPPOSpec(max_shift=0.01, max_ratio=1.1),
    LCOSpec(loss="mse"),
    LCOSpec(loss="logcosh"),
    OnlineDPOSpec(pairs="first_two"),
]
MAX_LENGTH = 8


def build(spec: Any) -> Algorithm:
    return build_algorithm(spec, max_completion_length=MAX_LENGTH)


def named(specs: list[Any]) -> Any:
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: f"{spec.type}-{SPECS.index(spec)}")


every_method = named(SPECS)


def batch_of(
    seed: int, num_prompts: int, num_generations: int, *, padding: float = 0.0, extra: int = 0
) -> tuple[Tensor, Batch]:
    """log π_θ near a random scored batch in fp64, and that batch."""
    current, old, ref = random_rows(seed, num_prompts * num_generations)
    rewards = random_rewards(seed, num_prompts, num_generations)
    scored = make_scored(rewards, old, ref, padding=padding, extra=extra, dtype=torch.float64)
    scored = replace(scored, values=0.3 * scored.old_logprobs, labels={OPTIMAL_VALUE: 0.5 + 0 * scored.rewards})
    return padded(current, padding=padding, extra=extra, dtype=torch.float64), scored


def batch_for(spec: Any, seed: int, num_prompts: int, **padding: Any) -> tuple[Tensor, Batch]:
    """`batch_of` three completions per prompt, for MaxRL ≥ 0; for TRACE, of two with verdicts and impact weights."""
    if isinstance(spec, MaxRLSpec):
        logprobs, scored = batch_of(seed, num_prompts, 3, **padding)
        return logprobs, replace(scored, rewards=scored.rewards.abs())
    if not isinstance(spec, TRACESpec):
        return batch_of(seed, num_prompts, 3, **padding)
    logprobs, scored = batch_of(seed, num_prompts, 2, **padding)
    impact = torch.arange(1.0, num_prompts + 1, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    return logprobs, replace(scored, rewards=(scored.rewards > 0).double(), labels={IMPACT: impact})


def terms_of(algorithm: Algorithm, logprobs: Tensor, batch: Weighted) -> Terms:
    """The loss of each row where what else the module says is a function of log π_θ, so that all has a gradient."""
    others: Any = {"values": 0.5 * logprobs + 1, "logits": logprobs + 3, "ref_kl": 0.2 * logprobs.square()}
    return algorithm.terms(TokenOutputs(logprobs, **others), batch)


def loss_of(algorithm: Algorithm, logprobs: Tensor, batch: Weighted) -> Tensor:
    return terms_of(algorithm, logprobs, batch).losses.sum() / batch.denominator


# --- DAR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "weights", "loss"),
    [
        # log w = .1·(−2, 1, 0, −5) + (∓1, ∓.25)/√.53125/β, bounded by log 20; loss = mean of −w·LP_t with
        # LP_t = (−10, −11, −8, −15). Derived number by number in the tests of the regression objective.
        (0.05, [9.91285684809873e-13, 20.0, 1.0489732968570185e-3, 20.0], 130.00209794659617),
        (1.0, [0.20763185794803, 4.35789298895754, 0.70964021963693, 0.85470164025223], 17.127696954723024),
    ],
)
def test_dar_on_the_golden_batch(beta: float, weights: list[float], loss: float):
    algorithm = DAR(DARSpec(beta=beta))
    batch, _ = algorithm.weigh(golden_scored())
    assert_close(batch.advantages, [-1.3719886811, 1.3719886811, -0.3429971703, 0.3429971703], rtol=1e-6)
    assert_close(batch.weights, weights, rtol=3e-6)
    assert batch.denominator == 4.0
    assert_close(loss_of(algorithm, golden_scored().old_logprobs, batch), loss, rtol=1e-6)


def test_dar_defaults_are_the_papers():
    spec = DARSpec()
    assert (spec.alpha, spec.beta, spec.w_clip) == (0.1, 0.05, 20.0)
    assert (spec.baseline, spec.normalize, spec.weight_scale, spec.updates) == ("group_mean", "batch", "none", 1)


def test_dar_metrics_of_the_golden_batch():
    # w = (1e-12, 20, .001, 20): two of four clipped, two below .01, ESS = 40.001049²/(800 + 1.1e-6) = 2.000104896.
    # log w_reg = (−.2, .1, 0, −.5) has mean −.15; −log mean e^(…) = −log .88260797 = .12487402.
    _, metrics = DAR(DARSpec()).weigh(golden_scored())
    assert metrics == {
        "weights/mean": pytest.approx(10.00026224332446, rel=1e-6),
        "weights/clip_fraction": 0.5,
        "weights/zero_fraction": 0.5,
        "weights/ess_fraction": pytest.approx(2.000104895954209 / 4, rel=1e-6),
        "weights/log_w_reg_mean": pytest.approx(-0.15, rel=1e-6),
        "weights/neg_log_mean_w_reg": pytest.approx(0.12487402434071272, rel=2e-6),
    }
    _, wide = DAR(DARSpec(beta=1.0)).weigh(golden_scored())
    assert wide["weights/ess_fraction"] == pytest.approx(1.853879920138132 / 4, rel=1e-6)


@pytest.mark.parametrize("ref", [None, NAN])
def test_dar_without_alpha_does_not_read_the_reference(ref: float | None):
    algorithm = DAR(DARSpec(alpha=0.0, beta=1.0))
    golden = golden_scored()
    nothing = None if ref is None else torch.full_like(golden.old_logprobs, ref)
    batch, metrics = algorithm.weigh(replace(golden, ref_logprobs=nothing))
    # e^Â alone.
    assert_close(batch.weights, [0.2536021240, 3.9431846402, 0.7096402196, 1.4091647744], rtol=1e-6)
    assert "weights/log_w_reg_mean" not in metrics
    assert not algorithm.needs_reference
    assert DAR(DARSpec(alpha=1e-6)).needs_reference


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_dar_at_the_first_step_weighs_by_advantage_alone(alpha: float):
    golden = golden_scored()
    first = replace(golden, ref_logprobs=golden.old_logprobs)
    regularised, metrics = DAR(DARSpec(alpha=alpha)).weigh(first)
    alone, _ = DAR(DARSpec(alpha=0.0)).weigh(first)
    assert_close(regularised.weights, alone.weights, rtol=0)
    assert metrics["weights/log_w_reg_mean"] == 0.0
    assert metrics["weights/neg_log_mean_w_reg"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("weight_scale", "divisor"),
    # Σ w = .20763186 + 4.35789299 + .70964022 + .85470164 = 6.12986671.
    [("none", 1.0), ("clip", 20.0), ("mean", 1.5324666766986819)],
)
def test_weight_scale_divides_the_weights_and_not_the_metrics(weight_scale, divisor: float):
    plain = [0.20763185794803, 4.35789298895754, 0.70964021963693, 0.85470164025223]
    batch, metrics = DAR(DARSpec(beta=1.0, weight_scale=weight_scale)).weigh(golden_scored())
    assert_close(batch.weights, [weight / divisor for weight in plain], rtol=1e-6)
    assert metrics["weights/mean"] == pytest.approx(1.5324666766986819, rel=1e-6)
    assert batch.denominator == 4.0


def test_weight_scale_mean_of_all_zero_weights_stays_zero():
    # log w = −1e4 for every row: nothing to normalise by.
    drifted = make_scored([[1, 1]], old=[[0.0], [0.0]], ref=[[-1e4], [-1e4]])
    batch, metrics = DAR(DARSpec(alpha=1.0, weight_scale="mean")).weigh(drifted)
    assert_close(batch.weights, [0.0, 0.0], rtol=0)
    assert metrics["weights/ess_fraction"] == 0.0


def test_baseline_does_not_matter_to_dar_once_the_batch_is_standardised():
    scored = batch_of(0, 4, 3)[1]
    with_mean, _ = DAR(DARSpec(beta=1.0)).weigh(scored)
    without, _ = DAR(DARSpec(beta=1.0, baseline="leave_one_out")).weigh(scored)
    assert_close(without.weights, with_mean.weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    # K = 2: leaving one out doubles the distance to the group's mean.
    [("group_mean", [-1.0, 1.0, -0.25, 0.25]), ("leave_one_out", [-2.0, 2.0, -0.5, 0.5])],
)
def test_dar_without_normalisation_keeps_reward_units(baseline, expected: list[float]):
    spec = DARSpec(alpha=0.0, beta=0.5, w_clip=INF, baseline=baseline, normalize="none")
    batch, _ = DAR(spec).weigh(golden_scored())
    assert_close(batch.advantages, expected, rtol=0)
    assert_close(batch.weights, [math.exp(a / 0.5) for a in expected], rtol=1e-6)


def test_dar_with_one_completion_per_prompt_takes_the_batch_as_baseline():
    # Mean 3, σ = √2.5.
    scored = make_scored([[1], [2], [4], [5]], [[-1.0], [-1.0], [-1.0], [-1.0]])
    batch, _ = DAR(DARSpec(alpha=0.0, beta=1.0)).weigh(scored)
    expected = [deviation / math.sqrt(2.5) for deviation in (-2, -1, 1, 2)]
    assert_close(batch.advantages, expected, rtol=1e-6)
    assert_close(batch.weights, [math.exp(a) for a in expected], rtol=1e-6)


@pytest.mark.parametrize("num_generations", [1, 3])
def test_equal_rewards_leave_dar_the_regularisation_alone(num_generations: int):
    _, old, ref = random_rows(0, 6)
    rewards = [[0.9] * num_generations] * (6 // num_generations)
    batch, _ = DAR(DARSpec(alpha=0.5)).weigh(make_scored(rewards, old, ref))
    assert_close(batch.advantages, [0.0] * 6, rtol=0)
    # w = (π₀/π_t)^½.
    assert_close(batch.weights, [math.exp(0.5 * (sum(r) - sum(o))) for o, r in zip(old, ref, strict=True)], rtol=2e-6)


def test_tied_prompt_keeps_weight_one_in_a_batch_that_is_not_tied():
    scored = make_scored([[2, 2], [1, 3]], [[-1.0]] * 4)
    batch, _ = DAR(DARSpec(alpha=0.0)).weigh(scored)
    assert_close(batch.weights[:2], [1.0, 1.0], rtol=0)


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 50), shift=st.floats(-20, 20))
def test_dar_ignores_shift_per_prompt_and_scale_of_rewards(seed: int, scale: float, shift: float):
    _, scored = batch_of(seed, 3, 4)
    shifts = shift * torch.arange(1.0, 4.0, dtype=torch.float64).unsqueeze(1)
    moved = replace(scored, rewards=scale * scored.rewards + shifts)
    algorithm = DAR(DARSpec(beta=1.0))
    assert_close(algorithm.weigh(moved)[0].weights, algorithm.weigh(scored)[0].weights, rtol=3e-6)


@few
@given(seed=st.integers(0, 10_000), reward=st.floats(-1e3, 1e3), gap=st.floats(-1e4, 1e4))
def test_dar_weights_are_finite_and_bounded_whatever_comes_in(seed: int, reward: float, gap: float):
    _, scored = batch_of(seed, 2, 3)
    rewards, ref = scored.rewards.clone(), scored.old_logprobs.clone()
    rewards[0, 0] += reward
    ref[0, 0] += gap
    for normalize in ("batch", "none"):
        algorithm = DAR(DARSpec(alpha=1.0, normalize=normalize))
        batch, metrics = algorithm.weigh(replace(scored, rewards=rewards, ref_logprobs=ref))
        assert ((batch.weights >= 0) & (batch.weights <= 20)).all()
        assert all(math.isfinite(value) for value in metrics.values())


def test_dar_gradient_is_minus_the_weight_over_the_denominator():
    logprobs, scored = batch_of(1, 2, 3, padding=NAN)
    algorithm = DAR(DARSpec(beta=1.0))
    batch, _ = algorithm.weigh(scored)
    logprobs.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(algorithm, logprobs, batch), logprobs)
    assert_close(grad, -batch.weights.double().unsqueeze(1) * scored.mask / 6, rtol=1e-12)


def test_dar_weights_of_a_second_update_are_those_of_the_policy_that_sampled():
    logprobs, scored = batch_of(2, 2, 2)
    algorithm = DAR(DARSpec(beta=1.0, updates=3))
    batch, _ = algorithm.weigh(scored)
    # The loss is linear in log π_θ: a target that moved with θ would not be.
    at_old = terms_of(algorithm, scored.old_logprobs, batch).losses
    moved = terms_of(algorithm, scored.old_logprobs + logprobs, batch).losses
    assert_close(moved - at_old, terms_of(algorithm, logprobs, batch).losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("alpha_25", "beta_25", "alpha", "beta"),
    [
        # β = α₂₅ + β₂₅ and α = α₂₅/β: the default "total .05, ratio 10 %".
        (0.005, 0.045, 0.1, 0.05),
        (0.3, 0.1, 0.75, 0.4),
        (0.0, 0.2, 0.0, 0.2),
        (0.2, 0.0, 1.0, 0.2),
    ],
)
def test_letters_of_the_2025_paper(alpha_25: float, beta_25: float, alpha: float, beta: float):
    spec = DARSpec.from_2025(alpha_25=alpha_25, beta_25=beta_25, w_clip=7.0)
    assert spec.alpha == pytest.approx(alpha, rel=1e-12)
    assert spec.beta == pytest.approx(beta, rel=1e-12)
    assert spec.w_clip == 7.0


@pytest.mark.parametrize(("alpha_25", "beta_25"), [(-0.1, 0.2), (0.2, -0.1), (0.0, 0.0)])
def test_impossible_letters_of_the_2025_paper_are_refused(alpha_25: float, beta_25: float):
    with pytest.raises(ValueError, match="coefficients must be ≥ 0 and not both 0"):
        DARSpec.from_2025(alpha_25=alpha_25, beta_25=beta_25)


def test_dividing_by_an_infinite_clip_is_refused():
    with pytest.raises(ValueError, match="there is nothing to divide by"):
        DARSpec(w_clip=INF, weight_scale="clip")


def test_dar_leaving_one_out_of_one_is_refused():
    scored = make_scored([[1], [2]], [[-1.0], [-1.0]])
    with pytest.raises(ValueError, match="leave_one_out needs at least 2 completions"):
        DAR(DARSpec(alpha=0.0, baseline="leave_one_out")).weigh(scored)


# --- RLOO ------------------------------------------------------------------------------------------------------------


def test_rloo_advantages_at_known_rewards():
    # K = 4 and r = (1, 2, 4, 5): K/(K−1)·(r − 3).
    scored = make_scored([[1, 2, 4, 5]], [[-1.0]] * 4)
    batch, metrics = RLOO(RLOOSpec(beta=0.0)).weigh(scored)
    assert_close(batch.advantages, [-8 / 3, -4 / 3, 4 / 3, 8 / 3], rtol=1e-6)
    assert_close(batch.weights, [1.0] * 4, rtol=0)
    assert batch.denominator == 4.0
    assert metrics == {}


def test_rloo_takes_the_kl_off_the_reward():
    # β = .1, LP_t − LP_0 = (2, −1, 0, 5): R = (.8, 3.1, 2, 2); K = 2 subtracts the other one.
    batch, _ = RLOO(RLOOSpec(beta=0.1)).weigh(golden_scored())
    assert_close(batch.advantages, [-2.3, 2.3, 0.0, 0.0], rtol=1e-6, atol=1e-6)


def test_rloo_first_update_is_reinforce():
    # ρ = 1: loss −A in value, gradient −A/B on every token.
    _, scored = batch_of(3, 2, 3)
    algorithm = RLOO(RLOOSpec(beta=0.2))
    batch, _ = algorithm.weigh(scored)
    logprobs = scored.old_logprobs.clone().requires_grad_()
    terms = terms_of(algorithm, logprobs, batch)
    assert_close(terms.losses, -batch.advantages, rtol=1e-12)
    (grad,) = torch.autograd.grad(terms.losses.sum() / batch.denominator, logprobs)
    assert_close(grad, -batch.advantages.unsqueeze(1) * scored.mask / 6, rtol=1e-12)
    assert terms.means["clip_ratio/region_mean"] == Mean(0.0, 6.0)


def test_rloo_clips_the_ratio_of_the_sequence():
    # Two tokens of ratio 1.15 give 1.3225: beyond 1.2 for the better completion, a larger loss for the worse one.
    old = [[-1.0, -1.0], [-1.0, -1.0]]
    scored = make_scored([[3, 1]], old, dtype=torch.float64)
    algorithm = RLOO(RLOOSpec(beta=0.0))
    batch, _ = algorithm.weigh(scored)
    terms = terms_of(algorithm, scored.old_logprobs + math.log(1.15), batch)
    assert_close(terms.losses, [-2 * 1.2, 2 * 1.3225], rtol=1e-12)
    assert terms.means["clip_ratio/region_mean"] == Mean(1.0, 2.0)
    asymmetric = RLOO(RLOOSpec(beta=0.0, clip_high=0.3))
    assert_close(terms_of(asymmetric, scored.old_logprobs + math.log(1.15), batch).losses[0], -2 * 1.3, rtol=1e-12)
    lower = RLOO(RLOOSpec(beta=0.0, clip_low=0.1))
    assert_close(terms_of(lower, scored.old_logprobs + math.log(0.8), batch).losses, [-2 * 0.64, 2 * 0.9], rtol=1e-12)


def test_rloo_refuses_a_single_completion():
    with pytest.raises(ValueError, match="leave_one_out needs at least 2 completions"):
        RLOO(RLOOSpec(beta=0.0)).weigh(make_scored([[1], [2]], [[-1.0], [-1.0]]))


# --- GRPO ------------------------------------------------------------------------------------------------------------


def test_grpo_advantages_and_weights_at_known_rewards():
    # Deviations (−2, −1, 1, 2), sample σ = √(10/3), ε = 1e-4; the weight carries 1/|y|.
    old = [[-1.0], [-1.0, -1.0], [-1.0], [-1.0, -1.0, -1.0, -1.0]]
    batch, metrics = GRPO(GRPOSpec(beta=0.0)).weigh(make_scored([[1, 2, 4, 5]], old))
    assert_close(batch.advantages, [d / (math.sqrt(10 / 3) + 1e-4) for d in (-2, -1, 1, 2)], rtol=1e-6)
    assert_close(batch.weights, [1.0, 0.5, 1.0, 0.25], rtol=0)
    assert batch.denominator == 4.0
    assert metrics == {}


def test_grpo_at_the_behaviour_policy_has_loss_zero_and_a_gradient():
    # Σ A = 0 within a group, so at ρ = 1 the value says nothing; the gradient is −A/(B·|y|) on every token.
    _, scored = batch_of(4, 2, 4)
    algorithm = GRPO(GRPOSpec(beta=0.0))
    batch, _ = algorithm.weigh(scored)
    logprobs = scored.old_logprobs.clone().requires_grad_()
    loss = loss_of(algorithm, logprobs, batch)
    assert_close(loss, 0.0, rtol=0, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, logprobs)
    per_token = (batch.advantages / scored.groups.lengths / 8).unsqueeze(1)
    assert_close(grad, -per_token * scored.mask, rtol=1e-6)
    assert grad.abs().max() > 0.01


def test_grpo_tied_group_moves_nothing():
    _, old, _ = random_rows(5, 3)
    scored = make_scored([[0.9, 0.9, 0.9]], old)
    algorithm = GRPO(GRPOSpec(beta=0.0))
    batch, _ = algorithm.weigh(scored)
    logprobs = scored.old_logprobs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(algorithm, logprobs, batch), logprobs)
    assert_close(grad, torch.zeros_like(grad), rtol=0)


def test_grpo_adds_the_k3_of_every_token_to_the_loss():
    # Row 0: log π₀/π_θ = (−1, .5), k3 = .36787944 + .14872127; row 1: 0. ρ = 1, so the rest is −A = ±1/(√2 + 1e-4).
    scored = make_scored([[1, 3]], [[-1.0, -2.0], [-1.0]], [[-2.0, -1.5], [-1.0]], dtype=torch.float64)
    algorithm = GRPO(GRPOSpec(beta=0.04))
    batch, _ = algorithm.weigh(scored)
    logprobs = scored.old_logprobs.clone().requires_grad_()
    losses = terms_of(algorithm, logprobs, batch).losses
    advantage = 1 / (math.sqrt(2) + 1e-4)
    k3 = 0.36787944117144233 + 0.14872127070012822
    assert_close(losses, [advantage + 0.04 * k3 / 2, -advantage], rtol=1e-9)
    # dk3/dlogπ_θ = 1 − e^u.
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    pull = [advantage / 2 + 0.02 * (1 - math.exp(u)) for u in (-1.0, 0.5)]
    assert_close(grad, [pull, [-advantage, 0.0]], rtol=1e-9)


def test_grpo_clips_every_token_by_itself():
    # Ratios (1.3, 1.1) under A > 0: (1.2 + 1.1)/2; (1.3, .7) under A < 0: (1.3 + .8)/2. Two of four tokens are clipped.
    scored = make_scored([[3, 1]], [[-1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    algorithm = GRPO(GRPOSpec(beta=0.0))
    batch, _ = algorithm.weigh(scored)
    ratios = torch.tensor([[1.3, 1.1], [1.3, 0.7]], dtype=torch.float64)
    terms = terms_of(algorithm, scored.old_logprobs + ratios.log(), batch)
    advantage = 2 / 2 / (math.sqrt(2) + 1e-4)
    assert_close(terms.losses, [-advantage * 1.15, advantage * 1.05], rtol=1e-9)
    assert terms.means["clip_ratio/region_mean"] == Mean(2.0, 4.0)
    bounds = GRPO(GRPOSpec(beta=0.0, clip_low=0.1, clip_high=0.28))
    losses = terms_of(bounds, scored.old_logprobs + ratios.log(), batch).losses
    assert_close(losses, [-advantage * 1.19, advantage * 1.1], rtol=1e-9)


def test_grpo_on_equal_lengths_is_the_token_mean():
    generator = torch.Generator().manual_seed(0)
    old = (-torch.rand(6, 3, generator=generator)).tolist()
    scored = make_scored(random_rewards(0, 2, 3), old, dtype=torch.float64)
    algorithm = GRPO(GRPOSpec(beta=0.0))
    batch, _ = algorithm.weigh(scored)
    logprobs = scored.old_logprobs + 0.2 * torch.randn(6, 3, dtype=torch.float64, generator=generator)
    tokens = clipped_surrogate(
        logprobs, scored.old_logprobs, batch.advantages, scored.mask, clip_low=0.2, clip_high=0.2
    )
    assert_close(loss_of(algorithm, logprobs, batch), tokens.mean(), rtol=1e-6)


def test_grpo_refuses_a_single_completion():
    with pytest.raises(ValueError, match="group_standardized needs at least 2 completions"):
        GRPO(GRPOSpec(beta=0.0)).weigh(make_scored([[1], [2]], [[-1.0], [-1.0]]))


@pytest.mark.parametrize("make", [lambda beta: RLOO(RLOOSpec(beta=beta)), lambda beta: GRPO(GRPOSpec(beta=beta))])
def test_reference_is_needed_only_with_a_kl_coefficient(make):
    assert make(0.01).needs_reference
    assert not make(0.0).needs_reference


@pytest.mark.parametrize("name", [name for name, spec in ALGORITHM_SPECS.items() if "updates" in spec.model_fields])
def test_number_of_updates_is_the_specs(name: str):
    assert build(ALGORITHM_SPECS[name](**{"updates": 3})).updates == 3


@pytest.mark.parametrize("name", [name for name, spec in ALGORITHM_SPECS.items() if "updates" not in spec.model_fields])
def test_methods_without_the_option_take_one_update(name: str):
    assert build(ALGORITHM_SPECS[name]()).updates == 1


# --- what every method promises --------------------------------------------------------------------------------------


def torn(rows: Tensor, filling: float) -> Tensor:
    """[B, T] with a token behind the first that is not the policy's."""
    return torch.cat([rows[:, :1], torch.full_like(rows[:, :1], filling), rows[:, 1:]], 1)


@every_method
@pytest.mark.parametrize("is_torn", [False, True])
@pytest.mark.parametrize(("extra", "garbage"), [(0, NAN), (3, INF), (3, -1e4)])
def test_padding_and_tokens_of_others_change_nothing(spec: Any, extra: int, garbage: float, is_torn: bool):
    clean_logprobs, clean = batch_for(spec, 6, 3)
    dirty_logprobs, dirty = batch_for(spec, 6, 3, padding=garbage, extra=extra)
    if is_torn:
        ids, mask = torn(dirty.groups.completion_ids, 7), torn(dirty.mask, False)
        groups = TokenGroups(dirty.groups.prompt_ids, dirty.groups.group_sizes, ids, mask)
        dirty_logprobs = torn(dirty_logprobs, garbage)
        names = ("old_logprobs", "ref_logprobs", "values")
        dirty = replace(dirty, groups=groups, **{name: torn(getattr(dirty, name), garbage) for name in names})
    algorithm = build(spec)
    expected, expected_metrics = algorithm.weigh(clean)
    batch, metrics = algorithm.weigh(dirty)
    # The order of a sum may change, hence a few ulps of fp32 in weights that were divided by their mean; with holes in
    # the rows it changes more.
    rtol = 1e-6 if is_torn else 2.5e-7
    assert_close(batch.weights, expected.weights, rtol=rtol)
    if batch.advantages.ndim == 1:
        assert_close(batch.advantages, expected.advantages, rtol=1e-12)
    else:
        assert_close(batch.advantages[dirty.mask], expected.advantages[clean.mask], rtol=1e-12)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6 if is_torn else 1e-12)
    dirty_logprobs.requires_grad_()
    clean_logprobs.requires_grad_()
    terms, wanted = terms_of(algorithm, dirty_logprobs, batch), terms_of(algorithm, clean_logprobs, expected)
    assert_close(terms.losses, wanted.losses, rtol=rtol)
    assert_same_means(terms.means, wanted.means)
    (grad,) = torch.autograd.grad(terms.losses.sum(), dirty_logprobs)
    (wanted_grad,) = torch.autograd.grad(wanted.losses.sum(), clean_logprobs)
    assert_close(grad[dirty.mask], wanted_grad[clean.mask], rtol=rtol)


def assert_same_means(means: dict[str, Mean], expected: dict[str, Mean]) -> None:
    """Counts exactly; totals within what the order of a float64 sum can change."""
    assert means.keys() == expected.keys()
    for name, mean in means.items():
        assert mean.count == expected[name].count, name
        assert mean.total == pytest.approx(expected[name].total, rel=1e-12), name


@every_method
def test_padding_gets_no_gradient(spec: Any):
    logprobs, scored = batch_for(spec, 6, 3)
    algorithm = build(spec)
    if not algorithm.needs_reference:
        scored = replace(scored, ref_logprobs=None)
    batch, _ = algorithm.weigh(scored)
    # Far below π₀ in the padding: e^u overflows there.
    logprobs = logprobs.masked_fill(~scored.mask, -1e4).requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(algorithm, logprobs, batch), logprobs)
    assert_close(grad[~scored.mask], torch.zeros(int((~scored.mask).sum())), rtol=0)


@every_method
@few
@given(seed=st.integers(0, 10_000), num_prompts=st.integers(1, 5), max_tokens=st.integers(1, 150))
def test_micro_batches_add_up_to_the_whole(spec: Any, seed: int, num_prompts: int, max_tokens: int):
    algorithm = build(spec)
    logprobs, scored = batch_for(spec, seed, num_prompts)
    batch, _ = algorithm.weigh(scored)
    logprobs.requires_grad_()
    whole = terms_of(algorithm, logprobs, batch)
    (expected,) = torch.autograd.grad(whole.losses.sum() / batch.denominator, logprobs)
    total, means, row = torch.zeros((), dtype=torch.float64), dict[str, Mean](), 0
    for part in (batch.select(rows) for rows in batch.groups.split(max_tokens)):
        height, width = part.mask.shape
        terms = terms_of(algorithm, logprobs[row : row + height, :width], part)
        row += height
        total = total + terms.losses.sum() / part.denominator
        means = {name: means.get(name, Mean()) + terms.means.get(name, Mean()) for name in means | terms.means}
    (grad,) = torch.autograd.grad(total, logprobs)
    assert_close(total, whole.losses.sum() / batch.denominator, rtol=1e-12, atol=1e-12)
    assert_close(grad, expected, rtol=1e-12)
    assert_same_means(means, whole.means)


def reordered(scored: Batch, rows: list[int]) -> Batch:
    """The same batch with its rows in another order; completions of a prompt stay together."""
    num_generations = scored.rewards.shape[1]
    prompts = tuple(scored.groups.prompt_ids[row // num_generations] for row in rows[::num_generations])
    moved = scored.map(lambda each: each[rows], lambda table: table.flatten()[rows].view_as(table))
    return replace(moved, groups=replace(moved.groups, prompt_ids=prompts), places=scored.places)


@every_method
def test_order_of_prompts_and_of_completions_does_not_matter(spec: Any):
    logprobs, scored = batch_for(spec, 7, 3)
    algorithm = build(spec)
    rows = [7, 8, 6, 0, 2, 1, 4, 3, 5]
    if isinstance(algorithm, PairedPreference) and algorithm.pairs == "first_two":
        rows = [6, 7, 8, 0, 1, 2, 3, 4, 5]
    if isinstance(algorithm, TRACE):
        rows = [4, 5, 0, 1, 2, 3]
    batch, metrics = algorithm.weigh(scored)
    other, other_metrics = algorithm.weigh(reordered(scored, rows))
    assert_close(other.weights, batch.weights[rows], rtol=1e-6)
    assert_close(other.advantages, batch.advantages[rows], rtol=1e-10)
    assert other.denominator == batch.denominator
    assert other_metrics == pytest.approx(metrics, rel=1e-6)
    losses = terms_of(algorithm, logprobs[rows], other).losses
    assert_close(losses, terms_of(algorithm, logprobs, batch).losses[rows], rtol=1e-6)


# A preference loss reads π₀ as it comes; that it has no gradient is what is tested.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@every_method
def test_only_the_trained_policy_gets_a_gradient(spec: Any):
    logprobs, scored = batch_for(spec, 8, 3)
    algorithm = build(spec)
    weighted, _ = algorithm.weigh(scored)
    assert weighted.ref_logprobs is not None
    fixed = {
        name: getattr(weighted, name).double().clone().requires_grad_()
        for name in ("old_logprobs", "ref_logprobs", "advantages")
    }
    tokens = {name: values.clone().requires_grad_() for name, values in weighted.tokens.items()}
    batch = replace(weighted, **fixed, tokens=tokens)
    loss_of(algorithm, logprobs.requires_grad_(), batch).backward()
    assert logprobs.grad is not None
    assert (logprobs.grad != 0)[scored.mask].any()
    assert all(tensor.grad is None for tensor in [*fixed.values(), *tokens.values()])


@named([spec for spec in SPECS if not isinstance(spec, TRACESpec)])
def test_rows_of_weight_zero_have_no_gradient(spec: Any):
    """The trainer leaves them out of the pass."""
    logprobs, scored = batch_of(9, 3, 3)
    # One tied prompt, and in another the first reward is the mean of its group.
    rewards = torch.tensor([[0.5, 0.5, 0.5], [2.0, 1.0, 3.0], [1.0, 2.0, 4.0]], dtype=torch.float64)
    algorithm = build(spec)
    batch, _ = algorithm.weigh(replace(scored, rewards=rewards))
    logprobs.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(algorithm, logprobs, batch), logprobs)
    assert (grad[batch.weights == 0] == 0).all()
    assert (grad != 0).any()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_weights_of_gaussian_advantages_are_spread_as_their_closed_form_says():
    # α = 0, A ~ N(0, 1), w_clip = 20. P(w = 20) = P(A ≥ β ln 20), P(w < .01) = P(A < β ln .01): at β = .05 that is
    # 1 − Φ(.1498) = .4405 and Φ(−.2303) = .4089. E[w] = e^(1/2β²) Φ(β ln 20 − 1/β) + 20·P(w = 20).
    # Quantiles (i + ½)/N instead of samples: a share is off by at most ½/N, a mean of a monotone f by at most
    # (max f − min f)/N.
    number, normal = 20_000, NormalDist()
    advantages = torch.tensor([normal.inv_cdf((i + 0.5) / number) for i in range(number)], dtype=torch.float64)
    for beta, share_clipped, share_zero in ((0.05, 0.4405, 0.4089), (1.0, 0.0014, 0.0)):
        log_weights = advantages / beta
        metrics = weight_metrics(clip_log_weights(log_weights, 20.0), log_weights, w_clip=20.0)
        threshold = beta * math.log(20)
        clipped = 1 - normal.cdf(threshold)
        # Φ by erfc: 1 + erf would leave nothing of Φ(−20), which e^200 makes a large number of.
        tail = math.erfc((1 / beta - threshold) / math.sqrt(2)) / 2
        mean = math.exp(1 / (2 * beta**2)) * tail + 20 * clipped
        assert metrics["weights/clip_fraction"] == pytest.approx(clipped, abs=1 / number)
        assert clipped == pytest.approx(share_clipped, abs=5e-5)
        assert metrics["weights/zero_fraction"] == pytest.approx(normal.cdf(beta * math.log(0.01)), abs=1 / number)
        assert metrics["weights/zero_fraction"] == pytest.approx(share_zero, abs=1e-4)
        assert metrics["weights/mean"] == pytest.approx(mean, abs=20 / number)


def test_clip_fraction_counts_a_weight_that_rounds_below_the_clip():
    log_weights = torch.tensor([math.log(20.0), 0.0], dtype=torch.float64)
    weights = log_weights.exp()
    assert weights[0] < 20.0
    assert weight_metrics(weights, log_weights, w_clip=20.0)["weights/clip_fraction"] == 0.5


def test_kl_metrics_are_per_completion_and_per_token():
    # log p/q: row 0 (1, −.5), row 1 (1); k1 sums (.5, 1), mean .75, per token 1.5/3.
    # k3 at u = −1 and .5: (.36787944 + .14872127, .36787944).
    p = torch.tensor([[-1.0, -2.0], [-1.0, NAN]])
    q = torch.tensor([[-2.0, -1.5], [-2.0, INF]])
    metrics = kl_metrics(p, q, torch.tensor([[True, True], [True, False]]), name="ref")
    k3 = 2 * 0.36787944117144233 + 0.14872127070012822
    assert metrics == {
        "kl/ref": pytest.approx(0.75, rel=1e-6),
        "kl/ref_per_token": pytest.approx(0.5, rel=1e-6),
        "kl/ref_k3": pytest.approx(k3 / 2, rel=1e-6),
        "kl/ref_k3_per_token": pytest.approx(k3 / 3, rel=1e-6),
    }


@named([spec for spec in SPECS if build(spec).needs_reference])
def test_missing_reference_is_an_error_where_it_is_read(spec: Any):
    _, scored = batch_for(spec, 0, 2)
    with pytest.raises(ValueError, match="reads the reference, but the batch has no ref_logprobs"):
        build(spec).weigh(replace(scored, ref_logprobs=None))
