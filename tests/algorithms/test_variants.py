"""The methods beside DAR, RLOO and GRPO, on batches small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from support.builders import assert_close, golden_scored, make_scored, padded, random_rewards, random_rows
from torch import Tensor

from dar.algorithms.base import Algorithm, Terms, UpdateTokens
from dar.algorithms.regression import DAR, awr
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.actor_critic import DualPPOSpec, PPOSpec
from dar.config.logits import LCOSpec
from dar.config.policy_gradient import (
    BAPOSpec,
    BNPOSpec,
    CISPOSpec,
    DAOSpec,
    DAPOSpec,
    DPPOSpec,
    DrGRPOSpec,
    GRPOSpec,
    GSPOSpec,
    MaxRLSpec,
    R2VPOSpec,
    RLOOSpec,
)
from dar.config.preference import ChiPOSpec, DPOSpec, IPOSpec, OnlineDPOSpec, OnlineIPOSpec, OnlineSLiCSpec, SLiCSpec
from dar.config.regression import AWRSpec, BestOfNSpec, DARSpec, SFTSpec, TargetESSSpec, TargetKLSpec, VARSpec
from dar.errors import RewardError
from dar.ops import Mean

INF = math.inf
MAX_LENGTH = 8
# Rewards 1 apart from their mean on either side, sample deviation √2, ε = 1e-4: the advantage of a pair.
PAIR = 1 / (math.sqrt(2) + 1e-4)


def build(spec: Any) -> Algorithm:
    return build_algorithm(spec, max_completion_length=MAX_LENGTH)


def batch_of(seed: int, num_prompts: int, num_generations: int) -> tuple[Tensor, Batch]:
    """log π_θ near a random scored batch in fp64, and that batch."""
    current, old, ref = random_rows(seed, num_prompts * num_generations)
    rewards = random_rewards(seed, num_prompts, num_generations)
    scored = make_scored(rewards, old, ref, dtype=torch.float64)
    return padded(current, dtype=torch.float64), replace(scored, values=0.3 * scored.old_logprobs)


def terms_of(algorithm: Algorithm, logprobs: Tensor, batch: Weighted) -> Terms:
    """The loss of each row, for logits equal to log π_θ and a critic that still says what it said."""
    return algorithm.terms(TokenOutputs(logprobs, values=batch.values, logits=logprobs), batch)


def gradient_of(algorithm: Algorithm, logprobs: Tensor, batch: Weighted) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(terms_of(algorithm, leaf, batch).losses.sum() / batch.denominator, leaf)
    return grad


def first_gradient(spec: Any, scored: Batch) -> Tensor:
    """∂L/∂log π_θ at π_θ = π_t."""
    algorithm = build(spec)
    batch, _ = algorithm.weigh(scored)
    return gradient_of(algorithm, batch.old_logprobs, batch)


def pair_of_rewards(old: list[list[float]], ref: list[list[float]] | None = None) -> Batch:
    """One prompt, the first completion better than the second."""
    return make_scored([[3, 1]], old, ref, dtype=torch.float64)


# --- regression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"beta": 0.7, "w_clip": 2.0, "normalize": "none", "updates": 3}, {"beta": TargetKLSpec(target_kl=0.2)}],
)
def test_awr_is_dar_without_the_reference(changes: dict[str, Any]):
    scored = replace(batch_of(0, 3, 4)[1], ref_logprobs=None)
    method, dar = awr(AWRSpec(**changes)), DAR(DARSpec(alpha=0.0, **changes))
    assert not method.needs_reference
    assert method.updates == dar.updates
    (batch, metrics), (expected, expected_metrics) = method.weigh(scored), dar.weigh(scored)
    assert_close(batch.weights, expected.weights.tolist(), rtol=0)
    assert metrics == expected_metrics
    assert batch.denominator == expected.denominator == 12.0


def test_awr_on_the_golden_batch():
    # e^Â with Â = (∓1, ∓.25)/√.53125.
    batch, _ = awr(AWRSpec(beta=1.0)).weigh(replace(golden_scored(), ref_logprobs=None))
    assert_close(batch.weights, [0.2536021240, 3.9431846402, 0.7096402196, 1.4091647744], rtol=1e-6)


def test_best_of_n_learns_from_the_first_of_the_best():
    scored = make_scored([[1, 5, 4], [3, 2, 3]], [[-1.0], [-2.0, -3.0], [-4.0]] * 2, dtype=torch.float64)
    algorithm = build(BestOfNSpec())
    batch, metrics = algorithm.weigh(scored)
    assert_close(batch.weights, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], rtol=0)
    assert_close(batch.advantages, [-7 / 3, 5 / 3, 2 / 3, 1 / 3, -2 / 3, 1 / 3], rtol=1e-12)
    assert batch.denominator == 2.0
    assert metrics == {}
    # The best completions have −5 and −1: (5 + 1)/2, and a gradient of −½ on each of their tokens.
    losses = terms_of(algorithm, scored.old_logprobs, batch).losses
    assert_close(losses.sum() / batch.denominator, 3.0, rtol=1e-12)
    expected = torch.zeros(6, 2)
    expected[1], expected[3, 0] = -0.5, -0.5
    assert_close(gradient_of(algorithm, scored.old_logprobs, batch), expected, rtol=1e-12)


def test_target_ess_has_a_closed_form_for_two_rows():
    # Â = ±1 and p = σ(2/β): ESS/N = 1/(2(p² + q²)) = .8 at p² + q² = .625, p = (1 + √.25)/2 = ¾, so 2/β = ln 3.
    scored = make_scored([[1, 2]], [[-1.0], [-1.0]], dtype=torch.float64)
    batch, metrics = DAR(DARSpec(alpha=0.0, beta=TargetESSSpec(target_ess=0.8))).weigh(scored)
    assert metrics["weights/beta"] == pytest.approx(2 / math.log(3), rel=1e-6)
    assert metrics["weights/target_reached"] == 1.0
    assert metrics["weights/ess_fraction"] == pytest.approx(0.8, rel=1e-6)
    # e^(∓½ ln 3).
    assert_close(batch.weights, [3**-0.5, 3**0.5], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_target_kl_is_that_of_the_normalised_weights(alpha: float):
    _, scored = batch_of(2, 3, 4)
    algorithm = DAR(DARSpec(alpha=alpha, beta=TargetKLSpec(target_kl=0.4), w_clip=INF))
    batch, metrics = algorithm.weigh(scored)
    p = batch.weights.double() / batch.weights.double().sum()
    assert (p * (12 * p).log()).sum().item() == pytest.approx(0.4, rel=1e-5)
    # The β that is logged is the one that was used.
    fixed, _ = DAR(DARSpec(alpha=alpha, beta=metrics["weights/beta"], w_clip=INF)).weigh(scored)
    assert_close(fixed.weights, batch.weights.tolist(), rtol=1e-6)
    assert metrics["weights/target_reached"] == 1.0


def test_target_out_of_reach_is_said():
    # Two rows are at most log 2 = .69 nats away from equal weights.
    scored = make_scored([[1, 2]], [[-1.0], [-1.0]], dtype=torch.float64)
    batch, metrics = DAR(DARSpec(alpha=0.0, beta=TargetKLSpec(target_kl=1.0))).weigh(scored)
    assert metrics["weights/target_reached"] == 0.0
    assert_close(batch.weights, [0.0, 20.0], rtol=1e-6)


def test_fixed_beta_is_not_logged():
    assert "weights/beta" not in DAR(DARSpec()).weigh(golden_scored())[1]


def test_var_weights_at_known_rewards():
    # 3·softmax(0, 1, 2) in each prompt, however good its completions are; ESS/N = 9/(3·Σw²) with Σw² = .07294954 +
    # .53902821 + 3.98290977.
    scored = make_scored([[0, 1, 2], [100, 101, 102]], [[-1.0]] * 6)
    batch, metrics = build(VARSpec(normalize="none")).weigh(scored)
    assert_close(batch.weights, [0.27009172, 0.73418541, 1.99572287] * 2, rtol=1e-5)
    assert_close(batch.advantages, [-1.0, 0.0, 1.0] * 2, rtol=1e-6, atol=1e-7)
    assert batch.denominator == 6.0
    assert metrics == {"weights/ess_fraction": pytest.approx(3 / 4.59488752, rel=1e-6)}


@pytest.mark.parametrize("normalize", ["none", "batch"])
def test_var_is_self_normalised_dar_with_alpha_one_at_the_reference(normalize: Any):
    _, scored = batch_of(3, 1, 5)
    scored = replace(scored, ref_logprobs=scored.old_logprobs)
    batch, _ = build(VARSpec(temperature=0.7, normalize=normalize)).weigh(scored)
    spec = DARSpec(alpha=1.0, beta=0.7, w_clip=INF, normalize=normalize, weight_scale="mean")
    assert_close(batch.weights, DAR(spec).weigh(scored)[0].weights.tolist(), rtol=1e-6)


def test_sft_is_the_mean_over_tokens():
    # −(−1 − 2 − 3 − 5)/4, and the same gradient on every token whatever the completion's length.
    scored = make_scored([[1], [1]], [[-1.0], [-2.0, -3.0, -5.0]], dtype=torch.float64)
    algorithm = build(SFTSpec())
    batch, metrics = algorithm.weigh(scored)
    losses = terms_of(algorithm, scored.old_logprobs, batch).losses
    assert_close(losses.sum() / batch.denominator, 11 / 4, rtol=1e-12)
    assert_close(gradient_of(algorithm, scored.old_logprobs, batch), scored.mask / -4, rtol=1e-12)
    assert metrics == {}
    assert not algorithm.needs_reference


# --- ratio methods ---------------------------------------------------------------------------------------------------


def test_dao_at_the_behaviour_policy():
    # α = .1, β = 1, D = LP_t − LP_0 = (2, −1, 0, 5), A = (−1, 1, −.25, .25): value αβD − A, slope αβD − A + β.
    golden = golden_scored()
    algorithm = build(DAOSpec(alpha=0.1, beta=1.0, normalize="none"))
    batch, _ = algorithm.weigh(golden)
    assert_close(terms_of(algorithm, golden.old_logprobs, batch).losses, [1.2, -1.1, 0.25, 0.25], rtol=1e-6)
    slopes = torch.tensor([2.2, -0.1, 1.25, 1.25]).unsqueeze(1) / 4
    assert_close(gradient_of(algorithm, golden.old_logprobs, batch), slopes * golden.mask, rtol=1e-6)


def test_dao_normalises_over_the_batch_by_default():
    batch, _ = build(DAOSpec()).weigh(golden_scored())
    assert_close(batch.advantages, [-1.3719886811, 1.3719886811, -0.3429971703, 0.3429971703], rtol=1e-6)
    assert_close(batch.weights, [1.0] * 4, rtol=0)
    assert batch.denominator == 4.0


def test_dao_ratio_is_of_the_completion_or_of_each_token():
    # Two tokens of ratio ρ = 1.1, α = 0, β = .5, A = 1: sequence −1.21 + .5·1.21·log 1.21, token 2(−1.1 + .55 log 1.1).
    scored = pair_of_rewards([[-1.0, -1.0], [-1.0, -1.0]])
    moved = scored.old_logprobs + math.log(1.1)
    levels: tuple[tuple[Literal["sequence", "token"], float], ...] = (
        ("sequence", -1.21 + 0.605 * math.log(1.21)),
        ("token", 2 * (-1.1 + 0.55 * math.log(1.1))),
    )
    for level, expected in levels:
        algorithm = build(DAOSpec(alpha=0.0, beta=0.5, normalize="none", ratio_level=level))
        assert not algorithm.needs_reference
        batch, _ = algorithm.weigh(scored)
        assert_close(terms_of(algorithm, moved, batch).losses[0], expected, rtol=1e-9)


def test_bnpo_gives_every_token_the_same_say():
    # A = ±PAIR, lengths 1 and 3: gradient −A/4 on each of the four tokens, where GRPO has −A/(2·|y|).
    scored = pair_of_rewards([[-1.0], [-1.0, -1.0, -1.0]])
    grad = first_gradient(BNPOSpec(), scored)
    assert_close(grad, [[-PAIR / 4, 0, 0], [PAIR / 4] * 3], rtol=1e-9)
    assert_close(first_gradient(GRPOSpec(beta=0.0), scored), [[-PAIR / 2, 0, 0], [PAIR / 6] * 3], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_bnpo_on_equal_lengths_is_grpo(beta: float):
    generator = torch.Generator().manual_seed(0)
    old, ref = (-torch.rand(6, 3, generator=generator) for _ in range(2))
    scored = make_scored(random_rewards(0, 2, 3), old.tolist(), ref.tolist(), dtype=torch.float64)
    moved = scored.old_logprobs + 0.2 * torch.randn(6, 3, dtype=torch.float64, generator=generator)
    grads = []
    for spec in (BNPOSpec(beta=beta), GRPOSpec(beta=beta)):
        algorithm = build(spec)
        assert algorithm.needs_reference == (beta > 0)
        grads.append(gradient_of(algorithm, moved, algorithm.weigh(scored)[0]))
    # GRPO's weight 1/|y| is fp32.
    assert_close(grads[0], grads[1].tolist(), rtol=1e-6)


def test_dapo_clips_higher_than_lower():
    # Ratios 1.25 and 1.3 under A > 0: the default bound 1.28 leaves the first; .7 under A < 0 meets .8.
    scored = pair_of_rewards([[-1.0, -1.0], [-1.0, -1.0]])
    ratios = torch.tensor([[1.25, 1.3], [1.3, 0.7]], dtype=torch.float64)
    algorithm = build(DAPOSpec())
    batch, _ = algorithm.weigh(scored)
    terms = terms_of(algorithm, scored.old_logprobs + ratios.log(), batch)
    assert_close(terms.losses, [-PAIR * (1.25 + 1.28), PAIR * (1.3 + 0.8)], rtol=1e-9)
    assert terms.means["clip_ratio/region_mean"] == Mean(2.0, 4.0)
    assert not algorithm.needs_reference


def test_dapo_leaves_tied_groups_out_of_weight_and_denominator():
    # Lengths 2 and 3 of the tied prompt do not count: 1 + 4 tokens. A row whose reward is its group's mean has no loss,
    # but its group is not tied.
    old = [[-1.0] * 2, [-1.0] * 3, [-1.0], [-1.0] * 4]
    batch, metrics = build(DAPOSpec()).weigh(make_scored([[1, 1], [0, 2]], old))
    assert_close(batch.weights, [0.0, 0.0, 1.0, 1.0], rtol=0)
    assert batch.denominator == 5.0
    assert metrics == {}
    centred, _ = build(DAPOSpec()).weigh(make_scored([[1, 2, 3]], old[:3]))
    assert_close(centred.weights, [1.0, 0.0, 1.0], rtol=0)
    assert centred.denominator == 6.0


def test_dapo_of_ties_alone_has_no_loss():
    scored = make_scored([[1, 1], [2, 2]], [[-1.0]] * 4)
    algorithm = build(DAPOSpec())
    batch, _ = algorithm.weigh(scored)
    assert batch.denominator == 1.0
    assert_close(batch.weights, [0.0] * 4, rtol=0)
    assert_close(gradient_of(algorithm, scored.old_logprobs, batch), torch.zeros(4, 1), rtol=0)


def test_dapo_penalises_the_last_tokens_before_the_limit():
    # L_max = 8 less a cache of 4: lengths 3, 4, 6, 8 lose 0, 0, ½, 1, and the tied group is tied no more. Deviations of
    # (1, 1, .5, 0) from .625, over √(.6875/3) + 1e-4.
    old = [[-1.0] * length for length in (3, 4, 6, 8)]
    batch, metrics = build(DAPOSpec(overlong_tokens=4)).weigh(make_scored([[1, 1, 1, 1]], old))
    assert metrics == {"rewards/overlong_penalty": pytest.approx(-0.375)}
    scale = math.sqrt(0.6875 / 3) + 1e-4
    assert_close(batch.advantages, [d / scale for d in (0.375, 0.375, -0.125, -0.625)], rtol=1e-6)
    assert batch.denominator == 21.0


def test_dr_grpo_divides_by_no_deviation_and_a_constant_length():
    # A = r − mean, B·L_max = 2·8.
    scored = make_scored([[3, 1]], [[-1.0], [-1.0] * 3], dtype=torch.float64)
    assert_close(first_gradient(DrGRPOSpec(), scored), [[-1 / 16, 0, 0], [1 / 16] * 3], rtol=1e-12)
    batch, _ = build(DrGRPOSpec()).weigh(make_scored([[2, 2], [1, 3]], [[-1.0]] * 4))
    assert_close(batch.weights, [0.0, 0.0, 1.0, 1.0], rtol=0)
    assert batch.denominator == 32.0
    # With a KL term a tied group's rows have a loss too.
    kept, _ = build(DrGRPOSpec(beta=0.1)).weigh(make_scored([[2, 2]], [[-1.0]] * 2, [[-1.0]] * 2))
    assert_close(kept.weights, [1.0, 1.0], rtol=0)


def test_gspo_clips_the_mean_ratio_of_a_completion():
    # √(1.3·1.1) = 1.1958 lies inside 1 ± .2 though 1.3 does not; √(.7·.8) = .7483 does not. Inside, each of the two
    # tokens has half of the gradient.
    scored = pair_of_rewards([[-1.0, -1.0], [-1.0, -1.0]])
    ratios = torch.tensor([[1.3, 1.1], [0.7, 0.8]], dtype=torch.float64)
    algorithm = build(GSPOSpec(clip_low=0.2, clip_high=0.2))
    batch, _ = algorithm.weigh(scored)
    moved = scored.old_logprobs + ratios.log()
    terms = terms_of(algorithm, moved, batch)
    mean_ratio = math.sqrt(1.3 * 1.1)
    assert_close(terms.losses, [-PAIR * mean_ratio, PAIR * 0.8], rtol=1e-9)
    assert terms.means["clip_ratio/region_mean"] == Mean(1.0, 2.0)
    # Two completions, two tokens each.
    assert_close(gradient_of(algorithm, moved, batch), [[-PAIR * mean_ratio / 4] * 2, [0.0, 0.0]], rtol=1e-9)


def test_cispo_clips_weights_and_not_gradients():
    # ρ = 6, .1 against A > 0 and 1.3, .1 against A < 0: only 6 is above 5, and nothing has a lower bound.
    scored = pair_of_rewards([[-3.0, -1.0], [-1.0, -1.0]])
    ratios = torch.tensor([[6.0, 0.1], [1.3, 0.1]], dtype=torch.float64)
    algorithm = build(CISPOSpec())
    batch, _ = algorithm.weigh(scored)
    moved = scored.old_logprobs + ratios.log()
    terms = terms_of(algorithm, moved, batch)
    weights = torch.tensor([[5.0, 0.1], [1.3, 0.1]])
    assert_close(terms.losses, -PAIR * torch.tensor([1.0, -1.0]) * (weights * moved).sum(1), rtol=1e-7)
    assert terms.means == {"cispo/clipped": Mean(1.0, 4.0)}
    signed = torch.tensor([[-PAIR], [PAIR]]) * weights / 4
    assert_close(gradient_of(algorithm, moved, batch), signed, rtol=1e-7)
    # A lower bound of .8 raises two weights.
    assert terms_of(build(CISPOSpec(clip_low=0.2)), moved, batch).means == {"cispo/clipped": Mean(3.0, 4.0)}


def test_dppo_takes_out_tokens_that_have_moved_too_far():
    # Shifts .2 and −.2 against A > 0, .2 and −.2 against A < 0: two go with A, the others against it.
    old = torch.tensor([[0.4, 0.4], [0.4, 0.4]], dtype=torch.float64).log()
    scored = pair_of_rewards(old.tolist())
    moved = torch.tensor([[0.6, 0.2], [0.6, 0.2]], dtype=torch.float64).log()
    algorithm = build(DPPOSpec(max_ratio=1.2))
    batch, _ = algorithm.weigh(scored)
    terms = terms_of(algorithm, moved, batch)
    assert terms.means == {"clip_ratio/region_mean": Mean(2.0, 4.0)}
    # 1.5 is bounded by 1.2.
    weights = torch.tensor([[0.0, 0.5], [1.2, 0.0]])
    assert_close(terms.losses, -PAIR * torch.tensor([1.0, -1.0]) * (weights * moved).sum(1), rtol=1e-7)
    assert_close(gradient_of(algorithm, moved, batch), torch.tensor([[-PAIR], [PAIR]]) * weights / 4, rtol=1e-7)


def test_maxrl_counts_a_prompt_by_the_inverse_of_its_success():
    # One success in four is worth 3; one failure in four loses 1, its successes gain ⅓; where all fail nothing moves.
    scored = make_scored([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]], [[-1.0]] * 12, dtype=torch.float64)
    algorithm = build(MaxRLSpec())
    batch, metrics = algorithm.weigh(scored)
    advantages = [3.0, -1.0, -1.0, -1.0, *[0.0] * 4, 1 / 3, 1 / 3, -1.0, 1 / 3]
    assert_close(batch.advantages, advantages, rtol=1e-12)
    assert batch.weights.tolist() == [1.0] * 4 + [0.0] * 4 + [1.0] * 4
    assert batch.denominator == 12.0
    assert metrics == {}
    assert_close(
        gradient_of(algorithm, scored.old_logprobs, batch).flatten(), [-a / 12 for a in advantages], rtol=1e-12
    )
    # Later updates have the clipped surrogate: 1.5 is out of 1 ± .2 for A > 0 alone.
    moved = scored.old_logprobs + math.log(1.5)
    assert_close(
        terms_of(algorithm, moved, batch).losses, [a * (-1.2 if a > 0 else -1.5) for a in advantages], rtol=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
def test_maxrls_advantages_are_those_of_its_authors_code(seed: int):
    """`compute_p_normalization_outcome_advantage` of github.com/tajwarfahim/maxrl at 7db6bb9, whose ε is 1e-6."""
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round()
    batch, _ = build(MaxRLSpec()).weigh(make_scored(rewards.tolist(), [[-1.0]] * 30, dtype=torch.float64))
    expected = [(r - group.mean()) / (group.mean() + 1e-6) for group in rewards for r in group]
    assert_close(batch.advantages, torch.stack(expected), rtol=1e-5)


def test_maxrl_refuses_rewards_below_zero():
    with pytest.raises(RewardError, match=r"\(maxrl\) need rewards ≥ 0, got -1"):
        build(MaxRLSpec()).weigh(make_scored([[0, -1]], [[-1.0]] * 2))


@pytest.mark.parametrize(
    ("spec", "other", "factor", "rtol"),
    [
        # At π_θ = π_t no bound and no penalty has a gradient yet: −A/Σ|y| on every token.
        *((spec, BNPOSpec(), 1.0, 1e-9) for spec in (DAPOSpec(), BAPOSpec(), R2VPOSpec(), CISPOSpec(), DPPOSpec())),
        (GSPOSpec(), GRPOSpec(beta=0.0), 1.0, 1e-6),
        # (K − 1)/K and the constant length, for K = 4.
        (DrGRPOSpec(), RLOOSpec(beta=0.0), 3 / 4 / MAX_LENGTH, 1e-9),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_methods_that_start_alike(spec: Any, other: Any, factor: float, rtol: float):
    _, scored = batch_of(6, 2, 4)
    assert_close(first_gradient(spec, scored), (factor * first_gradient(other, scored)).tolist(), rtol=rtol, atol=1e-12)


def test_dar_on_two_completions_is_best_of_two_times_half_the_clip():
    # Equal gaps: Â = ±1 for both prompts, so w = (0, 20) up to e^(−20), and 20/(2P) against 1/P.
    scored = make_scored([[1, 2], [7, 6]], random_rows(1, 4)[1], dtype=torch.float64)
    dar, best = first_gradient(DARSpec(alpha=0.0), scored), first_gradient(BestOfNSpec(), scored)
    assert_close(dar, 10 * best, rtol=1e-6, atol=1e-8)


# --- BAPO ------------------------------------------------------------------------------------------------------------


def bapo_tokens(old_logprobs: Tensor | None = None) -> UpdateTokens:
    """Five tokens. Weighted by π_t, the positive ones count .3·min(1.5, high) + .33, the negative ones of the surrogate
    .5·max(.71, low) + .405 + .26 (low ≤ .9): a share of .4035 at (.6, 1.2), .4333 at (.6, 1.5), .4116 at (.9, 3). By
    gradient 1.5 counts from high = 1.5 on, and .71 no more from low = .72 on: .244, then .4333, then .5398.
    """
    if old_logprobs is None:
        old_logprobs = torch.tensor([0.3, 0.6, 0.5, 0.9, 0.2]).log()
    return UpdateTokens(
        log_ratios=torch.tensor([1.5, 1.1, 0.71, 0.9, 1.3]).log(),
        advantages=torch.tensor([1.0, 0.5, -1.0, -0.5, -1.0]),
        old_logprobs=old_logprobs,
    )


@pytest.mark.parametrize(
    ("changes", "low", "high", "is_met"),
    [
        ({"target": 0.4}, 0.6, 1.2, 1.0),
        ({"target": 0.43}, 0.6, 1.5, 1.0),
        ({"target": 0.5}, 0.9, 3.0, 0.0),
        ({"target": 0.4, "contribution": "gradient"}, 0.6, 1.5, 1.0),
        ({"target": 0.5, "contribution": "gradient"}, 0.72, 3.0, 1.0),
        # Low first: the surrogate's share only falls with it, (.9, 1.2) has .382; then .43 is out of reach.
        ({"target": 0.43, "order": "low_first"}, 0.9, 3.0, 0.0),
        # Against the negative tokens, without π_t: 1.75/2.46 = .711, and one step of .05 makes it 1.8/2.46 = .732.
        ({"target": 0.71, "criterion": "ratio"}, 0.6, 1.2, 1.0),
        ({"target": 0.72, "criterion": "ratio"}, 0.6, 1.25, 1.0),
    ],
)
def test_bapo_takes_the_bounds_of_the_search(changes: dict[str, Any], low: float, high: float, is_met: float):
    algorithm = build(BAPOSpec(**changes))
    # Two tokens of one completion each, A = ±PAIR: the first is bounded from above, the second from below.
    scored = pair_of_rewards([[-1.0], [-1.0]])
    batch, _ = algorithm.weigh(scored)
    moved = scored.old_logprobs + torch.tensor([[100.0], [0.01]], dtype=torch.float64).log()
    # Before the first search the bounds are the start.
    assert_close(terms_of(algorithm, moved, batch).losses, [-PAIR * 1.2, PAIR * 0.6], rtol=1e-6)
    # Only the shares read π_t.
    tokens = bapo_tokens(torch.full((5,), math.nan) if changes.get("criterion") == "ratio" else None)
    expected = {"bapo/low": low, "bapo/high": high, "bapo/target_met": is_met}
    assert algorithm.begin_update(tokens) == pytest.approx(expected)
    terms = terms_of(algorithm, moved, batch)
    assert_close(terms.losses, [-PAIR * high, PAIR * low], rtol=1e-6)
    assert terms.means["clip_ratio/region_mean"] == Mean(2.0, 2.0)


def test_bapo_searches_anew_for_every_update():
    algorithm = build(BAPOSpec(target=0.43))
    first = algorithm.begin_update(bapo_tokens())
    assert algorithm.begin_update(bapo_tokens()) == first
    calm = replace(bapo_tokens(), log_ratios=torch.zeros(5), advantages=torch.ones(5))
    assert algorithm.begin_update(calm)["bapo/high"] == 1.2


def test_bapo_with_fixed_bounds_is_the_clipped_surrogate():
    logprobs, scored = batch_of(7, 2, 4)
    fixed = build(BAPOSpec(low_start=0.8, low_end=0.8, high_start=1.2, high_end=1.2))
    fixed.begin_update(bapo_tokens())
    clipped = build(BNPOSpec())
    (batch, _), (expected, _) = fixed.weigh(scored), clipped.weigh(scored)
    assert batch.denominator == expected.denominator
    assert_close(
        terms_of(fixed, logprobs, batch).losses, terms_of(clipped, logprobs, expected).losses.tolist(), rtol=1e-12
    )
    assert fixed.needs_ratios
    assert not clipped.needs_ratios


# --- R²VPO -----------------------------------------------------------------------------------------------------------


def test_r2vpo_penalises_the_variance_of_the_ratio():
    # ρ = (1.25, .8, 1.25, .8), (ρ − 1)² = (.0625, .04, .0625, .04): mean .05125. A = ±1/(√(4/3) + 1e-4), λ = .5.
    scored = make_scored([[1, 1, -1, -1]], [[-1.0]] * 4, dtype=torch.float64)
    ratios = torch.tensor([1.25, 0.8, 1.25, 0.8], dtype=torch.float64).unsqueeze(1)
    algorithm = build(R2VPOSpec(penalty=0.5))
    batch, _ = algorithm.weigh(scored)
    terms = terms_of(algorithm, scored.old_logprobs + ratios.log(), batch)
    a = 1 / (math.sqrt(4 / 3) + 1e-4)
    assert_close(terms.losses, [-1.25 * a + 0.03125, -0.8 * a + 0.02, 1.25 * a + 0.03125, 0.8 * a + 0.02], rtol=1e-9)
    variance = terms.means["r2vpo/variance"]
    assert (variance.count, variance.value) == (4.0, pytest.approx(0.05125, rel=1e-9))
    assert batch.denominator == 4.0


def test_r2vpo_penalty_follows_the_variance():
    # λ ← max(0, λ + η(v − δ)): .5 + 2(.05125 − .04) = .5225, and from there down to 0.
    algorithm = build(R2VPOSpec(penalty=0.5, penalty_rate=2.0))
    assert algorithm.finish_update({"r2vpo/variance": 0.05125}) == {"r2vpo/penalty": pytest.approx(0.5225)}
    scored = make_scored([[1, 1, -1, -1]], [[-1.0]] * 4, dtype=torch.float64)
    batch, _ = algorithm.weigh(scored)
    doubled = scored.old_logprobs + math.log(2.0)
    pushed = terms_of(algorithm, doubled, batch).losses + 2.0 * batch.advantages
    assert_close(pushed, [0.5225] * 4, rtol=1e-9)
    algorithm.finish_update({"r2vpo/variance": 0.0})
    assert algorithm.state() == {"penalty": pytest.approx(0.4425)}
    for _ in range(6):
        algorithm.finish_update({"r2vpo/variance": 0.0})
    assert algorithm.state() == {"penalty": 0.0}


def test_r2vpo_penalty_is_restored():
    algorithm, other = build(R2VPOSpec()), build(R2VPOSpec())
    assert algorithm.state() == {"penalty": 2.5}
    algorithm.finish_update({"r2vpo/variance": 1.0})
    other.restore(algorithm.state())
    assert other.state() == algorithm.state() == {"penalty": pytest.approx(3.46)}
    assert other.finish_update({"r2vpo/variance": 0.5}) == algorithm.finish_update({"r2vpo/variance": 0.5})


def test_r2vpo_keeps_tied_groups_for_the_penalty():
    batch, _ = build(R2VPOSpec(replay=3)).weigh(make_scored([[1, 1]], [[-1.0], [-1.0]]))
    assert_close(batch.weights, [1.0, 1.0], rtol=0)
    assert build(R2VPOSpec(replay=3)).replay == 3


def test_state_of_another_method_is_refused():
    assert build(GRPOSpec()).state() == {}
    build(GRPOSpec()).restore({})
    with pytest.raises(ValueError, match="GRPO has no state, but was given penalty"):
        build(GRPOSpec()).restore({"penalty": 1.0})


# --- LCO -------------------------------------------------------------------------------------------------------------


def lco_pair(loss: Any) -> tuple[Algorithm, Tensor, Weighted]:
    """Two one-token completions of probability .66524096 (logits 1, 0, −1), and β such that A/β = ±1."""
    scored = pair_of_rewards([[math.log(0.66524096)], [math.log(0.66524096)]])
    algorithm = build(LCOSpec(loss=loss, beta=PAIR))
    return algorithm, scored.old_logprobs, algorithm.weigh(scored)[0]


def test_lco_kld_pulls_towards_the_target():
    # The target of the sampled token is .84379473 for +1 and .42231880 for −1; KLs .08155467 and .12329236. In logits
    # the gradient is p − π*, and ∇log p_a = e_a − p, hence c = (π*_a − p_a)/(1 − p_a).
    algorithm, logprobs, batch = lco_pair("kld")
    assert_close(terms_of(algorithm, logprobs, batch).losses, [0.08155467, 0.12329236], rtol=1e-6)
    c = [(target - 0.66524096) / (1 - 0.66524096) for target in (0.84379473, 0.4223188)]
    # The mean is over two tokens.
    assert_close(gradient_of(algorithm, logprobs, batch), [[-c[0] / 2], [-c[1] / 2]], rtol=1e-6)
    assert not algorithm.needs_logits
    assert algorithm.updates == 1


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    # r = z − (z + A/β) = ∓1: r² and 2r; log cosh 1 = .43378083 and tanh r.
    [("mse", 1.0, 2.0), ("logcosh", 0.4337808304830272, 0.7615941559557649)],
)
def test_lco_distance_is_of_the_sampled_tokens_logit(loss: str, value: float, slope: float):
    algorithm, logprobs, batch = lco_pair(loss)
    assert algorithm.needs_logits
    logits = torch.tensor([[5.0], [-3.0]], dtype=torch.float64, requires_grad=True)
    losses = algorithm.terms(TokenOutputs(logprobs, logits=logits), batch).losses
    assert_close(losses, [value, value], rtol=1e-6)
    (grad,) = torch.autograd.grad(losses.sum() / batch.denominator, logits)
    assert_close(grad, [[-slope / 2], [slope / 2]], rtol=1e-6)
    with pytest.raises(ValueError, match="needs the sampled tokens' logits"):
        algorithm.terms(TokenOutputs(logprobs), batch)


@pytest.mark.parametrize("loss", ["kld", "mse", "logcosh"])
def test_lco_leaves_tied_groups_alone(loss: Any):
    scored = make_scored([[1, 1], [1, 3]], [[-1.0, -2.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    algorithm = build(LCOSpec(loss=loss))
    batch, _ = algorithm.weigh(scored)
    assert_close(batch.weights, [0.0, 0.0, 1.0, 1.0], rtol=0)
    assert batch.denominator == 5.0
    grad = gradient_of(algorithm, scored.old_logprobs, batch)
    assert_close(grad[:2], torch.zeros(2, 2), rtol=0)
    assert (grad[2:, 0] != 0).all()


# --- pairs -----------------------------------------------------------------------------------------------------------

PAIRED = [OnlineDPOSpec(), OnlineIPOSpec(), OnlineSLiCSpec(), DPOSpec(), IPOSpec(), SLiCSpec(), ChiPOSpec(beta=0.1)]
every_pair_method = pytest.mark.parametrize("spec", PAIRED, ids=lambda spec: spec.type)


@pytest.mark.parametrize(
    ("pairs", "signs"),
    [
        # The first of equals is the best or the worst; the group of equals has no pair.
        ("best_vs_worst", [-1, 1, 0, 0, 0, 0, 0, 0, 0, -1, 0, 1, 0, 0, 1, -1]),
        # The last group is tied in its first two.
        ("first_two", [-1, 1, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_online_pairs(pairs: Any, signs: list[float]):
    rewards = [[1, 5, 3, 5], [2, 2, 2, 2], [0, -1, -1, 4], [2, 2, 3, 1]]
    scored = make_scored(rewards, [[-1.0]] * 16, [[-1.0]] * 16)
    batch, metrics = build(OnlineDPOSpec(pairs=pairs)).weigh(scored)
    assert_close(batch.advantages, [float(sign) for sign in signs], rtol=0)
    assert_close(batch.weights, [float(abs(sign)) for sign in signs], rtol=0)
    num_pairs = sum(sign > 0 for sign in signs)
    assert batch.denominator == num_pairs
    assert metrics == {"pairs/tied_fraction": pytest.approx(1 - num_pairs / 4)}


def golden_pair(*, swapped: bool = False) -> tuple[Tensor, Batch]:
    """LP_θ = (−10, −9) and LP_0 = (−12, −9.5) of chosen and rejected in two tokens each, so Δ = 1.5."""
    current, ref = [[-4.0, -6.0], [-5.0, -4.0]], [[-7.0, -5.0], [-6.0, -3.5]]
    rewards = [1.0, 0.0]
    if swapped:
        current, ref, rewards = current[::-1], ref[::-1], rewards[::-1]
    scored = make_scored([rewards], [[-1.0, -1.0]] * 2, ref, dtype=torch.float64)
    return torch.tensor(current, dtype=torch.float64), scored


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("spec", "loss", "slope"),
    [
        # −log σ(.15), slope −.1·σ(−.15); (1.5 − 5)² and 2(1.5 − 5); 1 − .15 and −.1. The defaults are β = .1.
        (DPOSpec(), 0.62095705, -0.04625702),
        (OnlineDPOSpec(), 0.62095705, -0.04625702),
        (IPOSpec(), 12.25, -7.0),
        (OnlineIPOSpec(), 12.25, -7.0),
        (SLiCSpec(), 0.85, -0.1),
        (OnlineSLiCSpec(), 0.85, -0.1),
        # e^ℓ + ℓ at ℓ = 2 and .5: β·8.2403348 − … = .72403348. The chosen row's slope has the factor 1 + e².
        (ChiPOSpec(beta=0.1), 0.39527530, -0.1 * (1 - 1 / (1 + math.exp(-0.72403348))) * (1 + math.exp(2))),
        # Clipped to 2·.2, where there is no gradient.
        (ChiPOSpec(beta=0.1, max_reward=0.2), 0.51301525, 0.0),
    ],
)
def test_loss_of_the_golden_pair(spec: Any, loss: float, slope: float, swapped: bool):
    logprobs, scored = golden_pair(swapped=swapped)
    algorithm = build(spec)
    batch, metrics = algorithm.weigh(scored)
    assert metrics == {"pairs/tied_fraction": 0.0}
    terms = terms_of(algorithm, logprobs, batch)
    chosen = 1 if swapped else 0
    # β·(LP_θ − LP_0) = .1·2 and .1·.5.
    assert {name: mean.value for name, mean in terms.means.items()} == pytest.approx(
        {"rewards/chosen": 0.2, "rewards/rejected": 0.05, "rewards/margins": 0.15, "rewards/accuracies": 1.0}
    )
    assert {mean.count for mean in terms.means.values()} == {1.0}
    assert_close(terms.losses[chosen], loss, rtol=1e-6)
    assert terms.losses[1 - chosen] == 0.0
    assert_close(gradient_of(algorithm, logprobs, batch)[chosen], [slope, slope], rtol=1e-6)


@every_pair_method
def test_loss_is_the_mean_over_pairs(spec: Any):
    # The golden pair, a tie, and a pair that agrees with π₀ (Δ = 0): two pairs.
    logprobs, scored = golden_pair()
    algorithm = build(spec)
    one = terms_of(algorithm, logprobs, algorithm.weigh(scored)[0]).losses.sum()
    flat = [[-1.0, -1.0]] * 4
    ref = [[-7.0, -5.0], [-6.0, -3.5], *flat]
    several = make_scored([[1, 0], [1, 1], [0, 1]], [[-1.0, -1.0]] * 6, ref, dtype=torch.float64)
    more = torch.cat([logprobs, torch.full((4, 2), -1.0, dtype=torch.float64)])
    batch, metrics = algorithm.weigh(several)
    assert metrics == {"pairs/tied_fraction": pytest.approx(1 / 3)}
    assert batch.denominator == 2.0
    terms = terms_of(algorithm, more, batch)
    even = {"dpo": math.log(2), "ipo": 25.0, "slic": 1.0, "chi_po": math.log(2)}[spec.type.removeprefix("online_")]
    assert_close(terms.losses.sum() / batch.denominator, (one + even) / 2, rtol=1e-9)
    # Δ = 0 says neither: half.
    assert terms.means["rewards/accuracies"] == Mean(1.5, 2.0)


@every_pair_method
def test_rows_without_a_pair_have_no_loss_but_a_graph(spec: Any):
    """What is left of a batch of ties: the trainer keeps one row, so that every rank takes part."""
    logprobs, scored = golden_pair()
    tied = replace(scored, rewards=torch.ones_like(scored.rewards))
    algorithm = build(spec)
    batch, metrics = algorithm.weigh(tied)
    assert metrics == {"pairs/tied_fraction": 1.0}
    assert batch.denominator == 1.0
    assert_close(batch.weights, [0.0, 0.0], rtol=0)
    lone = batch.select(torch.tensor([True, False]))
    leaf = logprobs[:1].clone().requires_grad_()
    terms = terms_of(algorithm, leaf, lone)
    assert_close(terms.losses, [0.0], rtol=0)
    assert {mean.count for mean in terms.means.values()} == {0.0}
    (grad,) = torch.autograd.grad(terms.losses.sum(), leaf)
    assert_close(grad, torch.zeros(1, 2), rtol=0)


# --- PPO -------------------------------------------------------------------------------------------------------------

# Â = (.456, .48, .4) less its mean .44533333, over its sample deviation √(.00337066667/2).
WHITE = [0.25982807, 0.84444122, -1.10426929]


def golden_ppo() -> Batch:
    """One completion with R = (−.1, −.1, .9) at kl_coef = .1, V = (.2, .3, .5): Â = (.456, .48, .4), G = Â + V."""
    scored = make_scored([[1.0]], [[-1.0, -2.0, -3.0]], [[-2.0, -3.0, -4.0]], dtype=torch.float64)
    return replace(scored, values=torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("spec", [PPOSpec(kl_coef=0.1), DualPPOSpec(alpha=0.25, beta=0.4)], ids=lambda spec: spec.type)
def test_ppo_advantages_returns_and_metrics(spec: Any):
    batch, metrics = build(spec).weigh(golden_ppo())
    assert_close(batch.advantages, [WHITE], rtol=1e-6)
    assert_close(batch.tokens["returns"], [[0.656, 0.78, 0.9]], rtol=1e-9)
    assert_close(batch.weights, [1.0], rtol=0)
    assert batch.denominator == 3.0
    # Var Â = .0033706667/3, Var G = .0297706667/3.
    assert metrics == {
        "value/mean": pytest.approx(1 / 3),
        "value/return_mean": pytest.approx(0.77866667),
        "value/explained_variance": pytest.approx(1 - 0.00337066667 / 0.02977066667),
    }


def test_ppo_discount_and_lambda_are_the_specs():
    # λ = 0: G_t = R_t + γV_{t+1} = (−.1 + .15, −.1 + .25, .9) at γ = ½.
    batch, _ = build(PPOSpec(kl_coef=0.1, gamma=0.5, lam=0.0)).weigh(golden_ppo())
    assert_close(batch.tokens["returns"], [[0.05, 0.15, 0.9]], rtol=1e-9)


def test_ppo_first_update_has_one_gradient_for_the_policy_and_one_for_the_critic():
    # At ρ = 1 and V = V_old: −Â and c_v·(V − G), over three tokens; the whitened Â sum to 0.
    scored = golden_ppo()
    algorithm = build(PPOSpec(kl_coef=0.1))
    batch, _ = algorithm.weigh(scored)
    assert scored.values is not None
    logprobs, values = (t.clone().requires_grad_() for t in (scored.old_logprobs, scored.values))
    terms = algorithm.terms(TokenOutputs(logprobs, values=values), batch)
    assert_close(terms.losses, [0.1 * (0.456**2 + 0.48**2 + 0.4**2) / 2], rtol=1e-6)
    assert terms.means["loss/value"].value == pytest.approx((0.456**2 + 0.48**2 + 0.4**2) / 6)
    assert terms.means["clip_ratio/region_mean"] == Mean(0.0, 3.0)
    policy, critic = torch.autograd.grad(terms.losses.sum() / batch.denominator, (logprobs, values))
    assert_close(policy, [[-a / 3 for a in WHITE]], rtol=1e-6)
    assert_close(critic, [[-0.0456 / 3, -0.048 / 3, -0.04 / 3]], rtol=1e-6)


def test_ppo_clips_tokens_and_values():
    # Ratios (1.25, .7, .7): the first leaves 1.2 with Â > 0, the last .8 with Â < 0, the second is not bounded from
    # below. V = (.5, .4, 1.0): .5 is cut at .4 on the way to .656, .4 is near its old value, 1.0 left .7 on the far
    # side of .9, and the larger of (.1, −.2) counts.
    scored = golden_ppo()
    algorithm = build(PPOSpec(kl_coef=0.1, value_coef=1.0))
    batch, _ = algorithm.weigh(scored)
    ratios = torch.tensor([[1.25, 0.7, 0.7]], dtype=torch.float64)
    logprobs = (scored.old_logprobs + ratios.log()).requires_grad_()
    values = torch.tensor([[0.5, 0.4, 1.0]], dtype=torch.float64, requires_grad=True)
    terms = algorithm.terms(TokenOutputs(logprobs, values=values), batch)
    surrogate = -WHITE[0] * 1.2 - WHITE[1] * 0.7 - WHITE[2] * 0.8
    assert_close(terms.losses, [surrogate + (0.256**2 + 0.38**2 + 0.2**2) / 2], rtol=1e-6)
    assert terms.means["clip_ratio/region_mean"] == Mean(2.0, 3.0)
    policy, critic = torch.autograd.grad(terms.losses.sum(), (logprobs, values))
    assert_close(policy, [[0.0, -WHITE[1] * 0.7, 0.0]], rtol=1e-6)
    assert_close(critic, [[0.0, -0.38, 0.0]], rtol=1e-6)


def test_ppo_without_bounds_is_the_plain_surrogate():
    scored = golden_ppo()
    algorithm = build(PPOSpec(kl_coef=0.1, clip_low=1.0, clip_high=INF, clip_value=INF))
    batch, _ = algorithm.weigh(scored)
    moved = scored.old_logprobs + math.log(3.0)
    terms = algorithm.terms(TokenOutputs(moved, values=torch.tensor([[2.0, 2.0, 2.0]], dtype=torch.float64)), batch)
    # The whitened advantages sum to 0.
    value = sum((2.0 - g) ** 2 for g in (0.656, 0.78, 0.9)) / 2
    assert_close(terms.losses, [0.1 * value], rtol=1e-6)
    assert terms.means["clip_ratio/region_mean"] == Mean(0.0, 3.0)


def test_ppo_needs_a_critic():
    algorithm = build(PPOSpec(kl_coef=0.1))
    assert algorithm.needs_values
    with pytest.raises(ValueError, match="PPO reads a critic, but the batch has no values"):
        algorithm.weigh(replace(golden_ppo(), values=None))
    batch, _ = algorithm.weigh(golden_ppo())
    with pytest.raises(ValueError, match="PPO trains a critic, but the module returned no values"):
        algorithm.terms(TokenOutputs(batch.old_logprobs), batch)


def test_ppo_without_a_kl_coefficient_needs_no_reference():
    for spec in (PPOSpec(kl_coef=0.0), DualPPOSpec(alpha=0.0)):
        algorithm = build(spec)
        assert not algorithm.needs_reference
        batch, _ = algorithm.weigh(replace(golden_ppo(), ref_logprobs=None))
        # The reward alone: Â_t = Σ (λ)^l δ with δ = (.1, .2, .5), so (.1 + .95·.675, .2 + .475, .5).
        assert batch.values is not None
        advantages = batch.tokens["returns"] - batch.values
        assert_close(advantages, [[0.1 + 0.95 * 0.675, 0.675, 0.5]], rtol=1e-9)


def test_explained_variance_is_left_out_where_returns_do_not_vary():
    constant = make_scored([[1.0]], [[-1.0]], dtype=torch.float64)
    batch, metrics = build(PPOSpec(kl_coef=0.0)).weigh(replace(constant, values=torch.zeros(1, 1, dtype=torch.float64)))
    assert metrics == {"value/mean": 0.0, "value/return_mean": 1.0}
    # One token has no deviation to be divided by.
    assert_close(batch.advantages, [[0.0]], rtol=0)


def test_dual_ppo_with_alpha_one_is_ppo():
    logprobs, scored = batch_of(8, 3, 2)
    ppo, dual = build(PPOSpec(kl_coef=0.3)), build(DualPPOSpec(alpha=1.0, beta=0.3))
    (batch, metrics), (expected, expected_metrics) = dual.weigh(scored), ppo.weigh(scored)
    assert metrics == expected_metrics
    assert_close(batch.advantages, expected.advantages.tolist(), rtol=0)
    assert_close(terms_of(dual, logprobs, batch).losses, terms_of(ppo, logprobs, expected).losses.tolist(), rtol=0)


def test_dual_ppo_holds_the_policy_to_the_one_that_sampled():
    # (1−α)β = .3 times ρ log ρ − (ρ − 1) = 1.25·.22314355 − .25 on each of three tokens; αβ = .1 as in the golden case.
    scored = golden_ppo()
    ppo, dual = build(PPOSpec(kl_coef=0.1)), build(DualPPOSpec(alpha=0.25, beta=0.4))
    moved = scored.old_logprobs + math.log(1.25)
    batch, _ = dual.weigh(scored)
    added = terms_of(dual, moved, batch).losses - terms_of(ppo, moved, batch).losses
    assert_close(added, [3 * 0.3 * (1.25 * math.log(1.25) - 0.25)], rtol=1e-9)
    # It has no gradient at π_t.
    at_old = gradient_of(dual, scored.old_logprobs, batch)
    assert_close(at_old, gradient_of(ppo, scored.old_logprobs, batch).tolist(), rtol=1e-12)
