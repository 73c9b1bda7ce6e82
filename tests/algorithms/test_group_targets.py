"""Shares of a prompt's completions fitted to a target (TPO, DAR in groups), and weights that push down.

Where outcomes are enumerated each is one token, and π_t = (½, ¼, ¼) is so that two, one and one of four completions are
its samples in exact proportion: a group of these is the limit K → ∞. Weights are fp32, hence tolerances of a few 1e-7.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, f64, few, gradient, make_scored, padded, random_rewards, random_rows
from support.builders import golden_scored as golden
from torch import Tensor

from dar.algorithms.base import Algorithm
from dar.algorithms.regression import DAR, TPO
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.base import ConfigError
from dar.config.regression import DARSpec, TargetESSSpec, TargetKLSpec, TPOSpec
from dar.learn.update import idle
from dar.objectives.regression import clip_log_weights, dar_log_weights, group_cross_entropy, weighted_nll

INF, NAN = math.inf, math.nan
PI_0, PI_T, SCORES = f64(0.5, 0.3, 0.2), f64(0.5, 0.25, 0.25), f64(1.0, 0.0, -2.0)
MOVED = f64(0.3, -0.4, 0.9)
"""Logits of a policy that is neither π_t nor any target."""
PROPORTIONAL, EACH_ONCE = [0, 0, 1, 2], [0, 1, 2]


def outcomes(which: list[int], scores: Tensor = SCORES, pi_t: Tensor = PI_T) -> Batch:
    """One prompt with these outcomes as its completions."""
    old, ref = ([[float(p[one].log())] for one in which] for p in (pi_t, PI_0))
    return make_scored([[float(scores[one]) for one in which]], old, ref, dtype=torch.float64)


def logit_gradient(algorithm: Algorithm, batch: Batch, which: list[int], logits: Tensor = MOVED) -> Tensor:
    """d loss / d logits of the policy softmax(logits) over the outcomes."""
    weighted, _ = algorithm.weigh(batch)
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(0)[which].unsqueeze(1)
    return gradient(algorithm.terms(TokenOutputs(logprobs), weighted).losses / weighted.denominator, leaf)


def normalised(masses: Tensor) -> Tensor:
    return masses / masses.sum()


def group_dar(**settings: Any) -> DAR:
    """Two updates: groups that have nothing to say stay in."""
    return DAR(DARSpec(**{"normalize_weights": "group", "normalize": "none", "w_clip": INF, "updates": 2, **settings}))


def random_batch(seed: int, num_prompts: int = 3, num_generations: int = 4) -> tuple[Tensor, Batch]:
    current, old, ref = random_rows(seed, num_prompts * num_generations)
    scored = make_scored(random_rewards(seed, num_prompts, num_generations), old, ref, dtype=torch.float64)
    return padded(current, dtype=torch.float64), scored


def gradient_of(algorithm: Algorithm, logprobs: Tensor, weighted: Weighted) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    return gradient(algorithm.terms(TokenOutputs(leaf), weighted).losses / weighted.denominator, leaf)


# --- the objective ---------------------------------------------------------------------------------------------------


def test_shares_are_pulled_to_the_target_and_pushed_where_they_exceed_it():
    # p = (¾, ¼), q ∝ (1·2, 3·1) = (.4, .6); a completion alone; p = (½, ½) to q = (⅘, ⅕).
    scores = f64(math.log(3), 0.0, -7.0, 5.0, 5.0).requires_grad_()
    old = f64(math.log(2), 0.0, 3.0, 0.0, 0.0)
    losses = group_cross_entropy(scores, old, f64(1.0, 3.0, 9.0, 8.0, 2.0), (2, 1, 2))
    log_half = math.log(0.5)
    expected = [-0.4 * math.log(0.75), -0.6 * math.log(0.25), 0.0, -0.8 * log_half, -0.2 * log_half]
    assert_close(losses, expected, rtol=1e-12)
    assert_close(gradient(losses, scores), [0.35, -0.35, 0.0, -0.3, 0.3], rtol=1e-12, atol=1e-15)


def test_a_completion_of_weight_zero_is_as_if_it_were_not_there():
    scores = f64(1.0, -200.0, 0.5, 3.0, 2.0).requires_grad_()
    losses = group_cross_entropy(scores, f64(0.0, 400.0, 0.0, 1.0, 0.0), f64(1.0, 0.0, 3.0, 0.0, 0.0), (3, 2))
    alone = f64(1.0, 0.5).requires_grad_()
    expected = group_cross_entropy(alone, f64(0.0, 0.0), f64(1.0, 3.0), (2,))
    assert_close(losses[[0, 2]], expected, rtol=1e-12)
    assert_close(losses[[1, 3, 4]], [0.0] * 3, rtol=0)
    there = gradient(losses, scores)
    assert_close(there[[0, 2]], gradient(expected, alone), rtol=1e-12)
    assert_close(there[[1, 3, 4]], [0.0] * 3, rtol=0)


@few
@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50))
def test_constants_of_a_group_play_no_part_and_its_gradients_add_up_to_nothing(seed: int, shift: float):
    generator = torch.Generator().manual_seed(seed)
    scores, old, weights = torch.randn(3, 6, dtype=torch.float64, generator=generator).unbind()
    weights, sizes = weights.exp(), (1, 2, 3)
    by_group = shift * f64(1, 2, 2, 3, 3, 3)
    found, moved = scores.clone().requires_grad_(), (scores + by_group).requires_grad_()
    grads = [
        gradient(group_cross_entropy(found, old, weights, sizes), found),
        gradient(group_cross_entropy(moved, old - by_group, weights * by_group.abs().add(1), sizes), moved),
    ]
    assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
    assert_close(torch.stack([part.sum() for part in grads[0].split(sizes)]), [0.0] * 3, rtol=0, atol=1e-12)


# --- DAR in groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_clip", [INF, 1.5])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_many_samples_are_fitted_to_dars_target_by_forward_kl(alpha: float, w_clip: float):
    """∇ KL(π*‖π_θ) = π_θ − π* at any θ, π* ∝ π_t · min(w, w_clip): of DAR's own loss, its 1/Z(x) restored."""
    mean = SCORES[PROPORTIONAL].mean()
    log_weights = dar_log_weights(PI_T.log()[:, None], PI_0.log()[:, None], SCORES - mean, torch.ones(3, 1).bool(),
                                  alpha=alpha, beta=0.7)  # fmt: skip
    target = normalised(PI_T * clip_log_weights(log_weights, w_clip).double())
    algorithm = group_dar(alpha=alpha, beta=0.7, w_clip=w_clip)
    found = logit_gradient(algorithm, outcomes(PROPORTIONAL), PROPORTIONAL)
    assert_close(found, MOVED.softmax(0) - target, rtol=1e-6, atol=1e-7)
    assert_close(logit_gradient(algorithm, outcomes(PROPORTIONAL), PROPORTIONAL, target.log()), [0.0] * 3, rtol=0,
                 atol=1e-7)  # fmt: skip


def test_a_prompt_whose_weights_are_all_heavier_counts_no_more():
    """Plain weights leave out 1/Z(x), and a factor of a prompt's weights is one of its gradient."""
    _, scored = random_batch(0, 2, 3)
    assert scored.ref_logprobs is not None
    shift = f64(*[2.0] * 3, *[0.0] * 3)[:, None] / scored.mask.sum(1, keepdim=True)
    heavier = replace(scored, ref_logprobs=scored.ref_logprobs + shift)
    for algorithm, factor in ((group_dar(alpha=0.5, beta=1.0), 1.0), (DAR(DARSpec(alpha=0.5, w_clip=INF)), math.e)):
        before, after = (
            gradient_of(algorithm, scored.old_logprobs, algorithm.weigh(each)[0]) for each in (scored, heavier)
        )
        assert_close(after[:3], factor * before[:3], rtol=1e-5, atol=1e-7)
        assert_close(after[3:], before[3:], rtol=1e-5, atol=1e-7)


def test_known_target_is_clipped_before_it_is_normalised():
    # log w of the golden batch at β = 1: (log .2076, log 4.3579, …); w_clip 2 makes shares .2076/2.2076, 2/2.2076.
    batch, metrics = DAR(DARSpec(beta=1.0, w_clip=2.0, normalize_weights="group")).weigh(golden())
    first, second = 0.20763185794803, 2.0
    third, fourth = 0.70964021963693, 0.85470164025223
    total, other = first + second, third + fourth
    expected = [2 * first / total, 2 * second / total, 2 * third / other, 2 * fourth / other]
    assert_close(batch.weights, expected, rtol=1e-6)
    assert batch.denominator == 2.0
    # Metrics are of the weights before.
    _, plain = DAR(DARSpec(beta=1.0, w_clip=2.0)).weigh(golden())
    assert metrics == plain
    # At π_t: p − q, half of it for one of two prompts.
    grad = gradient_of(DAR(DARSpec(normalize_weights="group")), golden().old_logprobs.double(), batch)
    slopes = [0.5 * (0.5 - weight / 2) for weight in expected]
    assert_close(grad, f64(*slopes)[:, None] * golden().mask, rtol=1e-6)


def test_in_one_group_it_is_dar_with_centred_weights_of_mean_one_where_the_policy_has_not_moved():
    _, scored = random_batch(1, 1, 5)
    group = DAR(DARSpec(beta=0.7, normalize_weights="group"))
    centred = DAR(DARSpec(beta=0.7, weight_scale="mean", center_weights=True))
    grads = [gradient_of(each, scored.old_logprobs, each.weigh(scored)[0]) for each in (group, centred)]
    assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)
    assert (grads[0] > 0).any()


def test_what_is_next_to_worthless_stays_in_its_group_and_is_pushed_down():
    # log w = ∓20: e^(−40) of a share, ten thousand of which e^(−200).
    for beta in (0.05, 1e-5):
        scored = make_scored([[-1, 1]], [[-1.0], [-1.0]], dtype=torch.float64)
        algorithm = DAR(DARSpec(alpha=0.0, beta=beta, normalize_weights="group"))
        batch, _ = algorithm.weigh(scored)
        assert algorithm.loads(batch) is None
        assert batch.carries_weight(None, 1e-4).all()
        assert_close(gradient_of(algorithm, scored.old_logprobs, batch), [[0.5], [-0.5]], rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("build", [
    lambda updates: DAR(DARSpec(alpha=0.0, normalize_weights="group", updates=updates)),
    lambda updates: TPO(TPOSpec(updates=updates)),
], ids=["dar", "tpo"])  # fmt: skip
def test_a_tied_group_is_left_out_of_one_update_and_holds_to_where_it_was_in_later_ones(build: Any, updates: int):
    logprobs, scored = random_batch(2, 2, 3)
    scored = replace(scored, rewards=f64([1.0, 1.0, 1.0], [0.0, 1.0, 3.0]))
    algorithm = build(updates)
    batch, _ = algorithm.weigh(scored)
    assert (batch.weights[:3] == (updates == 2)).all()
    assert (batch.weights[3:] > 0).all()
    assert batch.denominator == 2.0
    at_old, moved = (gradient_of(algorithm, each, batch)[:3] for each in (scored.old_logprobs, logprobs))
    assert_close(at_old, torch.zeros_like(at_old), rtol=0, atol=1e-7)
    assert moved.any() == (updates == 2)


@pytest.mark.parametrize("spec", [DARSpec(normalize_weights="group", beta=1.0), TPOSpec()], ids=lambda spec: spec.type)
def test_groups_that_lost_completions_are_those_that_never_had_them(spec: Any):
    logprobs, scored = random_batch(3, 3, 3)
    rewards = scored.rewards.clone()
    rewards[0, 1], rewards[1, :2], rewards[2] = NAN, NAN, NAN
    algorithm = build_algorithm(spec, max_completion_length=8)
    batch, _ = algorithm.weigh(replace(scored, rewards=rewards).rewarded())
    assert batch.groups.group_sizes == (2, 1)
    assert batch.denominator == 2.0
    assert_close(batch.weights[:2].sum(), 2.0, rtol=1e-6)
    assert batch.weights[2] == 0
    here = logprobs[[0, 2, 5], : batch.mask.shape[1]]
    grad = gradient_of(algorithm, here, batch)
    assert (grad[:2] != 0).any()
    assert not grad[2].any()
    # Cut off, a completion leaves its group, and the rest is the group.
    masked = replace(algorithm.weigh(scored)[0], has_eos=torch.tensor([True, False, True] * 3))
    masked = replace(masked, weights=masked.weights * masked.has_eos)
    left = masked.select(masked.carries_weight(None, 0.0))
    wanted = group_cross_entropy(f64(0.1, -0.2), f64(0.0, 0.0), masked.weights[[0, 2]], (2,))
    found = group_cross_entropy(f64(0.1, 5.0, -0.2), f64(0.0, 0.0, 0.0), masked.weights[:3], (3,))
    assert left.groups.group_sizes == (2, 2, 2)
    assert_close(found[[0, 2]], wanted, rtol=1e-12)


@pytest.mark.parametrize("spec", [DARSpec(normalize_weights="group"), TPOSpec()], ids=lambda spec: spec.type)
def test_a_rank_without_rows_takes_part_and_moves_nothing(spec: Any):
    logprobs, scored = random_batch(4)
    algorithm = build_algorithm(spec, max_completion_length=8)
    lone = idle(algorithm.weigh(scored)[0])
    grad = gradient_of(algorithm, logprobs[:1, : lone.mask.shape[1]], lone)
    assert_close(grad, torch.zeros_like(grad), rtol=0)


# --- TPO -------------------------------------------------------------------------------------------------------------


def published(logprobs: Tensor, old: Tensor, rewards: Tensor, eta: float) -> Tensor:
    """Mean over prompts, from [P, K] log π(y): github.com/JeanKaddour/tpo, `tpo_skill`, `tpo_target`, Fig. 2 there."""
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = centred.std(1, keepdim=True, correction=0)
    skill = torch.where(deviation > 1e-6, centred / torch.where(deviation > 1e-6, deviation, 1.0), centred)
    q = torch.softmax(torch.log_softmax(old, 1) + skill / eta, 1)
    return -(q * torch.log_softmax(logprobs, 1)).sum(1).mean()


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_tpo_is_what_its_author_published(eta: float, score: Any):
    logprobs, scored = random_batch(5)
    rewards = scored.rewards.clone()
    rewards[1] = 0.7
    algorithm = TPO(TPOSpec(temperature=eta, score=score, updates=4))
    batch, metrics = algorithm.weigh(replace(scored, rewards=rewards))
    leaf = logprobs.clone().requires_grad_()
    lengths = scored.mask.sum(1) if score == "mean" else 1
    sums, old = (((each * scored.mask).sum(1) / lengths).view(3, 4) for each in (leaf, scored.old_logprobs))
    expected = published(sums, old, rewards, eta)
    assert_close(algorithm.terms(TokenOutputs(logprobs), batch).losses.sum() / batch.denominator, expected, rtol=1e-6)
    assert_close(gradient_of(algorithm, logprobs, batch), gradient(expected, leaf), rtol=1e-6, atol=1e-8)
    assert metrics == {"group/max_share": pytest.approx(float(old.softmax(1).amax(1).mean()))}
    assert not algorithm.needs_reference


def test_tpo_on_a_group_worked_out_by_hand():
    # r = (0, 1) is u = (−1, 1); p_old = (.7, .3): q₂ = .3e²/(.7 + .3e²) = .76000, gradient (.7 − .24, .3 − .76).
    scored = make_scored([[0, 1]], [[math.log(0.07)], [math.log(0.03)]], dtype=torch.float64)
    algorithm = TPO(TPOSpec())
    batch, metrics = algorithm.weigh(scored)
    assert_close(batch.advantages, [-1.0, 1.0], rtol=1e-12)
    assert metrics == {"group/max_share": pytest.approx(0.7)}
    odds = 0.3 * math.exp(2) / 0.7
    slope = odds / (1 + odds) - 0.3
    assert slope == pytest.approx(0.46000, abs=1e-4)
    assert_close(gradient_of(algorithm, scored.old_logprobs, batch), [[slope], [-slope]], rtol=1e-6)


# --- where the two meet ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_tpo_on_each_completion_once_is_dar_on_its_samples(alpha: float):
    """At every θ, so over several updates too. With α > 0 TPO is told u = A/β + α log(π₀/π_t)."""
    told = SCORES / 0.7 + alpha * (PI_0 / PI_T).log()
    eta = float(1 / told.std(correction=0))
    dar = logit_gradient(group_dar(alpha=alpha, beta=0.7), outcomes(PROPORTIONAL), PROPORTIONAL)
    tpo = logit_gradient(TPO(TPOSpec(temperature=eta, updates=2)), outcomes(EACH_ONCE, told), EACH_ONCE)
    assert_close(tpo, dar, rtol=1e-6, atol=1e-7)


def test_they_are_one_where_all_completions_of_a_prompt_are_equally_likely():
    _, scored = random_batch(6, 1, 5)
    lengths = scored.mask.sum(1, keepdim=True)
    even = replace(scored, old_logprobs=-3.0 / lengths * scored.mask)
    # Of one prompt the batch's standardisation is the group's.
    dar = DAR(DARSpec(alpha=0.0, beta=0.8, w_clip=INF, normalize_weights="group", updates=2))
    tpo = TPO(TPOSpec(temperature=0.8, score="sum", updates=2))
    moved = even.old_logprobs + 0.3 * torch.randn(5, even.mask.shape[1], generator=torch.Generator().manual_seed(0))
    grads = [gradient_of(each, moved * even.mask, each.weigh(even)[0]) for each in (dar, tpo)]
    assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)


def test_on_samples_tpo_counts_likely_completions_twice():
    """Its shares of many samples are ∝ π_t π_θ and ∝ π_t² e^u: the same fixed point π_t e^u, another way there."""
    mean, deviation = SCORES[PROPORTIONAL].mean(), SCORES[PROPORTIONAL].std(correction=0)
    tilt = ((SCORES - mean) / deviation).exp()
    tpo = TPO(TPOSpec(updates=2))
    found = logit_gradient(tpo, outcomes(PROPORTIONAL), PROPORTIONAL)
    wanted = normalised(PI_T * MOVED.softmax(0)) - normalised(PI_T**2 * tilt)
    assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    still = logit_gradient(tpo, outcomes(PROPORTIONAL), PROPORTIONAL, (PI_T * tilt).log())
    assert_close(still, [0.0] * 3, rtol=0, atol=1e-7)


# --- centred weights -------------------------------------------------------------------------------------------------


def test_centred_weights_are_those_less_their_mean_after_clip_and_scale():
    # w = (.20763186, 2, .70964022, .85470164) at w_clip 2, mean .94299343.
    clipped = f64(0.20763185794803, 2.0, 0.70964021963693, 0.85470164025223)
    scales: Any = (("none", 1.0), ("clip", 2.0), ("mean", float(clipped.mean())))
    for scale, divisor in scales:
        spec = DARSpec(beta=1.0, w_clip=2.0, weight_scale=scale, center_weights=True)
        batch, metrics = DAR(spec).weigh(golden())
        assert_close(batch.weights, (clipped - clipped.mean()) / divisor, rtol=1e-6, atol=1e-7)
        assert batch.denominator == 4.0
        assert metrics == DAR(DARSpec(beta=1.0, w_clip=2.0)).weigh(golden())[1]
        assert (batch.weights < 0).any()
        grad = gradient_of(DAR(spec), golden().old_logprobs, batch)
        assert_close(grad, -batch.weights[:, None] / 4 * golden().mask, rtol=1e-6)


def test_equal_weights_leave_nothing():
    for weight in (0.3, 1.0, 7.7):
        tied = make_scored([[1.0] * 7], [[-1.0]] * 7, [[-1.0 + math.log(weight)]] * 7)
        batch, _ = DAR(DARSpec(alpha=1.0, center_weights=True)).weigh(tied)
        assert_close(batch.weights, [0.0] * 7, rtol=0)


@pytest.mark.parametrize("num_rows", [2, 3])
def test_centring_keeps_the_expected_gradient_but_for_one_in_b(num_rows: int):
    """E over all batches of π_t's samples. Rewards are equal, so that w = (π₀/π_t)^α is each row's own."""
    means = []
    for is_centred in (False, True):
        algorithm = DAR(DARSpec(alpha=0.5, w_clip=INF, center_weights=is_centred))
        total = torch.zeros(3, dtype=torch.float64)
        for which in map(list, itertools.product(range(3), repeat=num_rows)):
            batch = outcomes(which, torch.zeros(3))
            total += PI_T[which].prod() * logit_gradient(algorithm, batch, which, PI_T.log())
        means.append(total)
    expected = PI_T * (PI_0 / PI_T).sqrt()
    assert_close(means[0], PI_T * expected.sum() - expected, rtol=1e-6, atol=1e-8)
    assert_close(means[1], (1 - 1 / num_rows) * means[0], rtol=1e-6, atol=1e-8)


def test_what_is_pushed_down_moves_and_is_not_left_out():
    algorithm = DAR(DARSpec(beta=1.0, center_weights=True))
    batch, _ = algorithm.weigh(golden())
    plain = DAR(DARSpec(beta=1.0))
    loads = algorithm.loads(batch)
    reference = plain.loads(replace(batch, weights=batch.weights.abs()))
    assert loads is not None
    assert reference is not None
    assert_close(loads, reference, rtol=1e-6)
    assert batch.carries_weight(loads, 1e-4).all()
    # −w · log π: 0.5 · −3 of a row that is pushed down.
    assert_close(weighted_nll(f64([-1.0, -2.0]), f64(-0.5), torch.ones(1, 2).bool()), [-1.5], rtol=0)


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"weight_scale": "mean"}, "leave out weight_scale"),
    ({"center_weights": True}, "leave out weight_scale, center_weights"),
    ({"beta": TargetKLSpec(target_kl=0.3)}, "a beta with a target"),
    ({"beta": TargetESSSpec(target_ess=0.3)}, "a beta with a target"),
])  # fmt: skip
def test_what_a_group_does_already_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=f"scales and centres in each prompt's group: .*{message}"):
        DARSpec(normalize_weights="group", **settings)


def test_centred_weights_in_a_second_update_are_refused():
    with pytest.raises(ConfigError, match=r"for one update per batch, not 2: .*pushes away from π_t without bound"):
        DARSpec(center_weights=True, updates=2)
    assert DARSpec(center_weights=True, beta=TargetKLSpec(target_kl=0.3), weight_scale="mean").updates == 1


def test_a_second_update_with_centred_weights_would_have_no_minimum():
    """E[−(w − E w) log π_θ] over π_t at logits (s, 0, −s): below any bound as s grows; a group's is not."""
    weights = (PI_0 / PI_T).sqrt() * SCORES.exp()
    centred = weights - (PI_T * weights).sum()
    found = [float((PI_T * weighted_nll((s * SCORES).log_softmax(0)[:, None], centred, torch.ones(3, 1).bool())).sum())
             for s in (1.0, 10.0, 100.0)]  # fmt: skip
    assert found[0] > found[1] > found[2]
    assert found[2] < -50
