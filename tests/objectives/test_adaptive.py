"""β from a trust region: closed forms of the tilted normal and of two rows, and what happens where no β fits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import norm
from support.builders import assert_close, f64, few
from torch import Tensor

from dar.objectives.adaptive import AdaptiveBeta, beta_for_ess, beta_for_kl, weights_kl
from dar.objectives.regression import clip_log_weights
from dar.ops import effective_sample_size

NAN, INF = math.nan, math.inf
LOG_3 = math.log(3.0)
# p = (¾, ¼): KL = log 2 + ¾ log ¾ + ¼ log ¼, and ESS/N = 1/(2 (9/16 + 1/16)) = .8.
KL_OF_3_TO_1 = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
ESS_OF_3_TO_1 = 0.8


def random_batch(seed: int, *, num_rows: int = 12) -> tuple[Tensor, Tensor]:
    """Advantages and c of a batch whose c moves the weights about as much as the advantages do."""
    generator = torch.Generator().manual_seed(seed)
    advantages, log_w_reg = torch.randn(2, num_rows, dtype=torch.float64, generator=generator)
    return advantages, log_w_reg


def assert_found(found: AdaptiveBeta, *, beta: float, achieved: float, is_reached: bool) -> None:
    assert found.beta == pytest.approx(beta, rel=1e-12)
    assert found.achieved == pytest.approx(achieved, rel=1e-12)
    assert found.is_reached == is_reached


def kl_at(advantages: Tensor, log_w_reg: Tensor, beta: float) -> float:
    return weights_kl(advantages / beta + log_w_reg).item()


# --- The distance ----------------------------------------------------------------------------------------------------


def test_kl_of_two_rows_by_hand():
    assert_close(weights_kl(f64(LOG_3, 0.0)), KL_OF_3_TO_1, rtol=1e-12)
    assert_close(weights_kl(f64(1000.0 + LOG_3, 1000.0)), KL_OF_3_TO_1, rtol=1e-12)


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_kl_lies_between_equal_weights_and_one_row(num_rows: int):
    one = torch.zeros(num_rows)
    one[0] = 1e4
    assert 0.0 <= weights_kl(torch.full((num_rows,), 0.1)).item() <= 1e-15
    assert weights_kl(one).item() == math.log(num_rows)


def test_rounding_does_not_take_the_kl_of_nearly_equal_weights_below_zero():
    # Unclamped these are −3e-17 and −1e-16, while the KL is 1e-17 and less.
    assert weights_kl(f64(0.0, 1e-8)).item() == 0.0
    assert weights_kl(f64(0.0, 1e-9, 2e-9, 3e-9)).item() == 0.0


def test_kl_is_taken_in_float64_without_gradient():
    # p = (½ + 2.5e-5, …): KL = 2·(2.5e-5)² = 1.25e-9, less than fp32 resolves next to log 2.
    log_weights = torch.tensor([1e-4, 0.0], requires_grad=True)
    kl = weights_kl(log_weights)
    assert kl.dtype == torch.float64
    assert not kl.requires_grad
    assert_close(kl, 1.25e-9, rtol=1e-6)


@few
@given(seed=st.integers(0, 10_000), bound=st.floats(-3.0, 3.0))
def test_clipping_from_above_never_raises_the_kl(seed: int, bound: float):
    # Truncated and normalised weights are majorised by the untruncated ones: every sum of the k largest is smaller.
    log_weights = 2 * random_batch(seed)[0]
    clipped = log_weights.clamp(max=bound)
    before, after = (torch.softmax(x, 0).sort(descending=True).values.cumsum(0) for x in (log_weights, clipped))
    assert (after <= before + 1e-12).all()
    assert weights_kl(clipped) <= weights_kl(log_weights) + 1e-12
    assert effective_sample_size(clipped.exp()) >= effective_sample_size(log_weights.exp()) * (1 - 1e-12)
    achieved = beta_for_kl(log_weights, torch.zeros_like(log_weights), target_kl=0.7)
    weights = clip_log_weights(log_weights / achieved.beta, math.exp(bound))
    assert weights_kl(weights.log()) <= achieved.achieved + 1e-6  # fp32 weights


# --- Closed forms ----------------------------------------------------------------------------------------------------


def test_two_rows_by_hand():
    # p = σ(1/β) = ¾ at 1/β = log 3.
    zeros = f64(0.0, 0.0)
    found = beta_for_kl(f64(1.0, 0.0), zeros, target_kl=KL_OF_3_TO_1)
    assert_found(found, beta=1 / LOG_3, achieved=KL_OF_3_TO_1, is_reached=True)
    found = beta_for_ess(f64(1.0, 0.0), zeros, target_ess=ESS_OF_3_TO_1)
    assert_found(found, beta=1 / LOG_3, achieved=ESS_OF_3_TO_1, is_reached=True)


def normal_quantiles(num_rows: int) -> Tensor:
    return torch.from_numpy(norm.ppf((torch.arange(num_rows, dtype=torch.float64).numpy() + 0.5) / num_rows))


@pytest.mark.parametrize(("target_kl", "beta"), [(0.5, 1.0), (0.125, 2.0)])
def test_tilted_normal_has_its_kl(target_kl: float, beta: float):
    # The target of A ~ N(0, 1) is N(1/β, 1), so KL = 1/(2β²). Quantiles leave out the tail that the tilt weighs most:
    # N = 20,000 of them reach 4.06 and miss β by 6.4e-4 (1.2e-4 for β = 2), N = 2,000 by six times that, measured.
    errors = []
    for num_rows in (2_000, 20_000):
        advantages = normal_quantiles(num_rows)
        found = beta_for_kl(advantages, torch.zeros_like(advantages), target_kl=target_kl)
        assert found.is_reached
        errors.append(abs(found.beta / beta - 1))
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize(("target_ess", "beta"), [(math.exp(-1), 1.0), (math.exp(-0.25), 2.0)])
def test_tilted_normal_has_its_effective_sample_size(target_ess: float, beta: float):
    # E[w]²/E[w²] = e^{1/β²} / e^{2/β²}. The second moment reaches further into the tail: 3.4e-3 (3.1e-4 for β = 2).
    errors = []
    for num_rows in (2_000, 20_000):
        advantages = normal_quantiles(num_rows)
        found = beta_for_ess(advantages, torch.zeros_like(advantages), target_ess=target_ess)
        assert found.is_reached
        errors.append(abs(found.beta / beta - 1))
    assert errors[1] < 5e-3
    assert errors[1] < errors[0] / 3


# --- Properties ------------------------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 10_000), target_kl=st.floats(0.01, 2.0))
def test_the_kl_at_the_returned_beta_is_the_target(seed: int, target_kl: float):
    advantages, log_w_reg = random_batch(seed)
    for c in (torch.zeros_like(log_w_reg), log_w_reg):
        found = beta_for_kl(advantages, c, target_kl=target_kl)
        assert kl_at(advantages, c, found.beta) == pytest.approx(found.achieved, rel=1e-9)
        if found.is_reached:
            assert found.achieved == pytest.approx(target_kl, rel=1e-10)


@few
@example(seed=327, target_ess=0.125)
@given(seed=st.integers(0, 10_000), target_ess=st.floats(0.1, 0.99))
def test_the_share_at_the_returned_beta_is_the_target(seed: int, target_ess: float):
    advantages, _ = random_batch(seed)
    found = beta_for_ess(advantages, torch.zeros_like(advantages), target_ess=target_ess)
    assert found.is_reached
    # A share of 1/B needs a β near 0, at which exp(A/β) overflows; the share does not depend on the weights' scale.
    share = effective_sample_size(((advantages - advantages.max()) / found.beta).exp()).item() / len(advantages)
    assert share == pytest.approx(found.achieved, rel=1e-9)
    assert found.achieved == pytest.approx(target_ess, rel=1e-10)


@few
@given(seed=st.integers(0, 10_000))
def test_without_a_reference_a_larger_beta_is_a_smaller_step(seed: int):
    advantages, _ = random_batch(seed)
    zeros = torch.zeros_like(advantages)
    kls = [kl_at(advantages, zeros, beta) for beta in (0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0)]
    assert kls == sorted(kls, reverse=True)
    betas = [beta_for_kl(advantages, zeros, target_kl=target).beta for target in (0.05, 0.2, 0.5, 1.0)]
    assert betas == sorted(betas, reverse=True)
    betas = [beta_for_ess(advantages, zeros, target_ess=target).beta for target in (0.2, 0.5, 0.9)]
    assert betas == sorted(betas)


@few
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-8, 0.3, 1e5]), shift=st.floats(-10, 10))
def test_beta_follows_the_scale_of_the_advantages_and_ignores_their_shift(seed: int, scale: float, shift: float):
    advantages, log_w_reg = random_batch(seed)
    # c is only ever used up to a constant, so its own shift is ignored too.
    for found, moved in [
        (
            beta_for_kl(advantages, log_w_reg, target_kl=1.0),
            beta_for_kl(scale * (advantages + shift), log_w_reg - 7.0, target_kl=1.0),
        ),
        (
            beta_for_ess(advantages, torch.zeros_like(log_w_reg), target_ess=0.4),
            beta_for_ess(scale * (advantages + shift), torch.full_like(log_w_reg, 3.0), target_ess=0.4),
        ),
    ]:
        assert moved.beta == pytest.approx(scale * found.beta, rel=1e-10)
        assert moved.achieved == pytest.approx(found.achieved, rel=1e-10)
        assert moved.is_reached == found.is_reached


@few
@given(seed=st.integers(0, 10_000))
def test_order_of_the_rows_does_not_matter(seed: int):
    advantages, log_w_reg = random_batch(seed)
    order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(seed))
    found = beta_for_kl(advantages, log_w_reg, target_kl=0.5)
    shuffled = beta_for_kl(advantages[order], log_w_reg[order], target_kl=0.5)
    assert shuffled.beta == pytest.approx(found.beta, rel=1e-10)
    assert shuffled.is_reached == found.is_reached


def test_fp32_advantages_with_a_gradient_are_only_read():
    advantages = torch.tensor([1.0, 0.0], requires_grad=True)
    found = beta_for_kl(advantages, torch.zeros(2), target_kl=KL_OF_3_TO_1)
    assert found.beta == pytest.approx(1 / LOG_3, rel=1e-12)
    assert isinstance(found.beta, float)
    assert isinstance(found.achieved, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.beta = 1.0  # pyright: ignore[reportAttributeAccessIssue]


# --- Several β, or none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", [0.0, 0.5, 1.0, LOG_3 - 1e-6, LOG_3 + 1e-6, 2.0, 20.0])
def test_where_rewards_pull_against_c_the_kl_rises_through_the_target(against: float):
    # p = σ(1/β − k), so the KL falls until 1/β = k and then rises; p = ¾ at 1/β = k + log 3, and p = ¼ at k − log 3,
    # a second root as soon as k > log 3, when the KL at β = ∞ exceeds the target. The first root does not notice.
    advantages, log_w_reg = f64(1.0, 0.0), f64(-against, 0.0)
    assert (weights_kl(log_w_reg) > KL_OF_3_TO_1) == (against > LOG_3)
    for found in (
        beta_for_kl(advantages, log_w_reg, target_kl=KL_OF_3_TO_1),
        beta_for_ess(advantages, log_w_reg, target_ess=ESS_OF_3_TO_1),
    ):
        assert found.is_reached
        assert found.beta == pytest.approx(1 / (against + LOG_3), rel=1e-12)


def test_of_several_rises_the_one_of_the_largest_beta_is_taken():
    # As β falls the weight moves from rows 1–8 (equal) to row 9, then to rows 10–11, and at last to row 12: with one
    # row out of twelve the KL is log 12 = 2.48, with two log 6 = 1.79. It rises through 2 twice.
    advantages = torch.cat([torch.zeros(8), f64(1.0, 1.1, 1.1, 1.11)]).double()
    log_w_reg = torch.cat([torch.zeros(8), f64(0.0, -10.0, -10.0, -30.0)]).double()
    assert kl_at(advantages, log_w_reg, 1 / 50) > 2.0
    assert kl_at(advantages, log_w_reg, 1 / 500) < 2.0
    assert kl_at(advantages, log_w_reg, 1 / 5000) > 2.0
    found = beta_for_kl(advantages, log_w_reg, target_kl=2.0)
    assert found.is_reached
    assert found.beta > 1 / 50
    assert kl_at(advantages, log_w_reg, 1.01 * found.beta) < 2.0 < kl_at(advantages, log_w_reg, 0.99 * found.beta)


def test_c_beyond_the_target_with_rewards_that_agree_gives_the_largest_beta():
    found = beta_for_kl(f64(2.0, 0.0), f64(2.0, 0.0), target_kl=0.1)
    assert found.beta == pytest.approx(2e6, rel=1e-12)
    assert found.achieved == pytest.approx(weights_kl(f64(2.0, 0.0)).item(), rel=1e-5)
    assert found.achieved > 0.1
    assert not found.is_reached


def test_c_beyond_the_target_at_every_beta_gives_the_smallest_kl():
    # Rows 2 and 3 share what row 1 leaves as q = σ(5) to 1 − q, whatever β. KL = log 3 − H(p₁) − (1 − p₁) H(q) is
    # smallest at odds p₁ : 1 − p₁ = 1 : e^{H(q)}, with value log 3 − log(1 + e^{H(q)}); the odds are e^t : e⁵ + 1.
    q = 1 / (1 + math.exp(-5.0))
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    smallest, t = LOG_3 - math.log(1 + math.exp(entropy)), math.log(math.exp(5.0) + 1) - entropy
    advantages, log_w_reg = f64(1.0, 0.0, 0.0), f64(0.0, 5.0, 0.0)
    assert kl_at(advantages, log_w_reg, 1 / t) == pytest.approx(smallest, rel=1e-12)
    found = beta_for_kl(advantages, log_w_reg, target_kl=0.9 * smallest)
    assert not found.is_reached
    # Half a grid step is 10^(1/32) = 1.075.
    assert found.beta == pytest.approx(1 / t, rel=0.075)
    assert smallest <= found.achieved < 1.1 * smallest
    # A target just above is met on the rising side.
    met = beta_for_kl(advantages, log_w_reg, target_kl=1.2 * smallest)
    assert met.is_reached
    assert met.beta < 1 / t


@pytest.mark.parametrize(
    ("advantages", "log_w_reg", "limit"),
    [
        # log(N / number of maxima): two of three, then one of two.
        ([1.0, 1.0, -1.0], [0.0, 0.0, 0.0], math.log(1.5)),
        ([1.0, -1.0], [0.0, 0.0], math.log(2.0)),
        # The maxima share the weight as c says, ¾ to ¼: log 3 − H(¾).
        ([1.0, 1.0, -1.0], [LOG_3, 0.0, 0.0], LOG_3 + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        # At β = ∞ nearly all weight lies on row 3 and the KL is 1.02: it falls through the target and stays below.
        ([1.0, 1.0, -1.0], [0.0, 0.0, 5.0], math.log(1.5)),
    ],
)
def test_a_target_that_no_small_beta_exceeds_gives_the_smallest_beta(advantages, log_w_reg, limit: float):
    found = beta_for_kl(f64(*advantages), f64(*log_w_reg), target_kl=limit + 0.05)
    assert_found(found, beta=2e-6, achieved=limit, is_reached=False)
    assert beta_for_kl(f64(*advantages), f64(*log_w_reg), target_kl=limit - 0.05).is_reached


def test_fewer_effective_rows_than_the_best_ones_are_out_of_reach():
    found = beta_for_ess(f64(1.0, 1.0, -1.0), torch.zeros(3), target_ess=0.6)
    assert_found(found, beta=2e-6, achieved=2 / 3, is_reached=False)


def test_all_rows_effective_is_the_limit_of_a_large_beta():
    found = beta_for_ess(f64(1.0, -1.0), f64(0.0, 0.0), target_ess=1.0)
    assert_found(found, beta=2e6, achieved=1.0, is_reached=False)


@pytest.mark.parametrize("advantage", [0.0, -0.1, 1e6])
def test_equal_advantages_leave_beta_at_one(advantage: float):
    equal = f64(advantage, advantage)
    found = beta_for_kl(equal, f64(LOG_3, 0.0), target_kl=0.5)
    assert_found(found, beta=1.0, achieved=KL_OF_3_TO_1, is_reached=False)
    found = beta_for_ess(equal, f64(LOG_3, 0.0), target_ess=0.5)
    assert_found(found, beta=1.0, achieved=ESS_OF_3_TO_1, is_reached=False)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_kl", [0.0, -1.0, NAN, INF])
def test_impossible_kl_is_refused(target_kl: float):
    with pytest.raises(ValueError, match="target_kl must be a finite number of nats > 0"):
        beta_for_kl(f64(1.0, 0.0), f64(0.0, 0.0), target_kl=target_kl)


@pytest.mark.parametrize("target_ess", [0.0, -0.5, 1.5, NAN, INF])
def test_impossible_share_is_refused(target_ess: float):
    with pytest.raises(ValueError, match=r"target_ess is a share of the rows and must lie in \(0, 1\]"):
        beta_for_ess(f64(1.0, 0.0), f64(0.0, 0.0), target_ess=target_ess)


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_other_than_finite_numbers_are_refused(number: float):
    with pytest.raises(ValueError, match="log_weights must be finite, got 1 of 2"):
        weights_kl(f64(0.0, number))
    with pytest.raises(ValueError, match="advantages must be finite, got 1 of 2"):
        beta_for_kl(f64(0.0, number), f64(0.0, 0.0), target_kl=0.1)
    with pytest.raises(ValueError, match="log_w_reg must be finite, got 1 of 2"):
        beta_for_ess(f64(1.0, 0.0), f64(0.0, number), target_ess=0.5)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"advantages \[2\], log_w_reg \[3\]"):
        beta_for_kl(torch.zeros(2), torch.zeros(3), target_kl=0.1)
    with pytest.raises(ValueError, match=r"advantages must be one row of at least one number, got shape \[2, 2\]"):
        beta_for_ess(torch.zeros(2, 2), torch.zeros(2, 2), target_ess=0.5)
    with pytest.raises(ValueError, match=r"log_weights must be one row of at least one number, got shape \[0\]"):
        weights_kl(torch.zeros(0))
