"""Advantage estimators against their definitions, worked by hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, few, padded, random_rewards

from dar.advantages import (
    batch_standardized,
    gae,
    group_mean,
    group_standardized,
    leave_one_out,
    over_mean,
    tied_groups,
)
from dar.errors import RewardError

NAN = math.nan
GOLDEN = torch.tensor([[1.0, 3.0], [2.0, 2.5]], dtype=torch.float64)
SPREAD = torch.tensor([[1.0, 2.0, 4.0, 5.0]], dtype=torch.float64)
# In fp32 the mean of three 0.9 is not 0.9, so a tied group has to be recognised rather than computed.
TIED = torch.full((1, 3), 0.9)


def groups(seed: int, num_prompts: int, num_generations: int) -> torch.Tensor:
    return torch.tensor(random_rewards(seed, num_prompts, num_generations), dtype=torch.float64)


def test_group_mean_subtracts_each_prompts_own_mean():
    # Means 2 and 2.25.
    assert_close(group_mean(GOLDEN), [[-1.0, 1.0], [-0.25, 0.25]], rtol=0)


def test_group_mean_leaves_a_single_completion_its_reward():
    rewards = torch.tensor([[2.0], [5.0]])
    advantages = group_mean(rewards)
    assert_close(advantages, [[2.0], [5.0]], rtol=0)
    assert advantages.data_ptr() != rewards.data_ptr()


@pytest.mark.parametrize(
    "estimate",
    [
        group_mean,
        leave_one_out,
        lambda rewards: group_standardized(rewards, ddof=1, eps=1e-4),
        lambda rewards: group_standardized(rewards, ddof=1, eps=0.0),
        over_mean,
    ],
)
def test_tied_group_is_exactly_zero(estimate):
    assert TIED.mean() != TIED[0, 0]
    for tied in (torch.full((1, 3), 1.0), TIED):
        assert_close(estimate(torch.cat([tied, torch.tensor([[1.0, 2.0, 3.0]])]))[0], [0.0, 0.0, 0.0], rtol=0)


def test_leave_one_out_at_known_rewards():
    # 1 − (2+4+5)/3 = −8/3, 2 − 10/3 = −4/3, 4 − 8/3 = 4/3, 5 − 7/3 = 8/3.
    assert_close(leave_one_out(SPREAD), [[-8 / 3, -4 / 3, 4 / 3, 8 / 3]], rtol=1e-14)


@few
@given(seed=st.integers(0, 10_000), num_prompts=st.integers(1, 4), num_generations=st.integers(2, 6))
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(seed: int, num_prompts: int, num_generations: int):
    rewards = groups(seed, num_prompts, num_generations)
    others = (rewards.sum(1, keepdim=True) - rewards) / (num_generations - 1)
    assert_close(leave_one_out(rewards), rewards - others, rtol=1e-12, atol=1e-12)
    assert_close(leave_one_out(rewards).sum(1), torch.zeros(num_prompts), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [
        # Deviations (−2, −1, 1, 2) from 3, Σ² = 10: σ = √(10/4) = 1.58113883 or √(10/3) = 1.82574186.
        (0, [-1.2649110640673518, -0.6324555320336759, 0.6324555320336759, 1.2649110640673518]),
        (1, [-1.0954451150103321, -0.5477225575051661, 0.5477225575051661, 1.0954451150103321]),
    ],
)
def test_group_standardized_at_known_rewards(ddof: int, expected: list[float]):
    assert_close(group_standardized(SPREAD, ddof=ddof, eps=0.0), [expected], rtol=1e-12)


def test_group_standardized_adds_eps_to_the_standard_deviation():
    # σ = √2.5 with ddof 0; −2 / (√2.5 + 1).
    advantages = group_standardized(SPREAD, ddof=0, eps=1.0)
    assert_close(advantages[0, 0], -2 / (math.sqrt(2.5) + 1), rtol=1e-12)


def test_over_mean_of_success_and_failure_divides_by_the_share_of_successes():
    # Shares ¼, ½, 1 and 0: a success is worth 1/share − 1, a failure −1, and where all are equal nothing is.
    rewards = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
    expected = [[3.0, -1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [0.0] * 4, [0.0] * 4]
    assert_close(over_mean(rewards), expected, rtol=1e-15)


def test_over_mean_of_other_rewards_has_no_unit_and_counts_what_is_there():
    # Mean 3 of SPREAD, of (2, 4) where the others have no reward.
    assert_close(over_mean(SPREAD), [[-2 / 3, -1 / 3, 1 / 3, 2 / 3]], rtol=1e-15)
    assert_close(over_mean(1000 * SPREAD), over_mean(SPREAD), rtol=1e-15)
    found = over_mean(torch.tensor([[NAN, 2.0, NAN, 4.0], [NAN, NAN, 3.0, NAN], [NAN] * 4]))
    assert found[0].nan_to_num(9.0).tolist() == pytest.approx([9.0, -1 / 3, 9.0, 1 / 3])
    assert found[1:].nan_to_num(9.0).tolist() == [[9.0, 9.0, 0.0, 9.0], [9.0] * 4]


@pytest.mark.parametrize("rewards", [[[1.0, 0.0], [2.0, -0.5]], [[-0.5, NAN], [-0.25, -0.25]]])
def test_over_mean_refuses_rewards_below_zero(rewards: list[list[float]]):
    with pytest.raises(RewardError, match=r"need rewards ≥ 0, got -0.5: give the reward a `threshold`"):
        over_mean(torch.tensor(rewards))


@pytest.mark.parametrize("num_generations", [2, 3, 5])
def test_over_mean_estimates_the_truncated_likelihood_without_bias(num_generations: int):
    """Every group of K draws from a policy on four answers, two of them right, against the closed form."""
    logits = torch.tensor([0.3, -1.2, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    is_right = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    draws = torch.cartesian_prod(*[torch.arange(4)] * num_generations)
    groups = logprobs[draws]
    surrogate = groups.sum(1).exp().detach() * (over_mean(is_right[draws]) * groups).mean(1)
    (estimate,) = torch.autograd.grad(surrogate.sum(), logits, retain_graph=True)
    p = (logprobs.exp() * is_right).sum()
    (slope,) = torch.autograd.grad(p, logits)
    assert_close(estimate, (1 - (1 - p.detach()) ** (num_generations - 1)) / p.detach() * slope, rtol=1e-12, atol=1e-15)


def test_batch_standardized_at_known_advantages():
    # Mean 0, σ² = (1 + 1 + .0625 + .0625)/4 = .53125, σ = .72886899; ±1/σ and ±.25/σ.
    expected = [[-1.3719886811400708, 1.3719886811400708], [-0.3429971702850177, 0.3429971702850177]]
    assert_close(batch_standardized(group_mean(GOLDEN), eps=0.0), expected, rtol=1e-12)


def test_batch_standardized_subtracts_the_batch_mean():
    # K = 1 and A = r: mean 3, σ = √((4 + 1 + 1 + 4)/4) = √2.5.
    advantages = batch_standardized(group_mean(SPREAD.reshape(4, 1)), eps=0.0)
    assert_close(advantages.flatten() * math.sqrt(2.5), [-2.0, -1.0, 1.0, 2.0], rtol=1e-12)


def test_batch_standardized_divides_by_n_and_a_tiny_eps_unless_told():
    # ddof 0 and ε = 1e-8: with σ = 1e-8 the divisor is 2e-8, and half a standard deviation comes out.
    assert_close(batch_standardized(torch.tensor([-1e-8, 1e-8], dtype=torch.float64)), [-0.5, 0.5], rtol=1e-9)
    # ddof 1 divides by √2 instead of 1.
    pair = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert_close(batch_standardized(pair, ddof=1, eps=0.0) * math.sqrt(2), [-1.0, 1.0], rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.9, -7.3])
@pytest.mark.parametrize("shape", [(3, 1), (2, 4), (1, 1)])
def test_batch_standardized_of_equal_values_is_zero_and_not_nan(value: float, shape: tuple[int, int]):
    assert_close(batch_standardized(torch.full(shape, value), eps=0.0), torch.zeros(shape), rtol=0)


@few
@given(
    seed=st.integers(0, 10_000),
    num_prompts=st.integers(1, 4),
    num_generations=st.integers(2, 6),
    scale=st.floats(0.01, 100),
    shift=st.floats(-50, 50),
)
def test_shift_per_prompt_and_scale_of_rewards_do_not_matter(
    seed: int, num_prompts: int, num_generations: int, scale: float, shift: float
):
    rewards = groups(seed, num_prompts, num_generations)
    shifts = shift * torch.arange(1, num_prompts + 1, dtype=torch.float64).unsqueeze(1)
    moved = batch_standardized(group_mean(scale * rewards + shifts), eps=0.0)
    assert_close(moved, batch_standardized(group_mean(rewards), eps=0.0), rtol=1e-7, atol=1e-9)


@few
@given(seed=st.integers(0, 10_000), num_prompts=st.integers(1, 4), num_generations=st.integers(2, 6))
def test_leave_one_out_equals_group_mean_after_batch_standardisation(seed: int, num_prompts: int, num_generations: int):
    # They differ by the factor K/(K−1), which the standard deviation takes out.
    rewards = groups(seed, num_prompts, num_generations)
    without = batch_standardized(leave_one_out(rewards), eps=0.0)
    assert_close(without, batch_standardized(group_mean(rewards), eps=0.0), rtol=1e-10, atol=1e-12)


GAE_REWARDS = torch.tensor([[-0.1, -0.1, 0.9]], dtype=torch.float64)
GAE_VALUES = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
ALL_KEPT = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # δ = (−.1 + .3 − .2, −.1 + .5 − .3, .9 − .5) = (0, .1, .4).
        (0.0, [0.0, 0.1, 0.4]),
        # .1 + .95·.4 = .48 and 0 + .95·.48 = .456.
        (0.95, [0.456, 0.48, 0.4]),
        # Σ_{s≥t} R_s − V_t = (.7 − .2, .8 − .3, .9 − .5).
        (1.0, [0.5, 0.5, 0.4]),
    ],
)
def test_gae_at_known_rewards(lam: float, expected: list[float]):
    advantages = gae(GAE_REWARDS, GAE_VALUES, ALL_KEPT, gamma=1.0, lam=lam)
    assert_close(advantages, [expected], rtol=1e-12, atol=1e-15)


def test_gae_discounts_values_and_advantages():
    # γ = .5, λ = .5: δ = (−.1 + .15 − .2, −.1 + .25 − .3, .4) = (−.15, −.15, .4); γλ = .25:
    # Â_2 = −.15 + .25·.4 = −.05, Â_1 = −.15 − .25·.05 = −.1625.
    advantages = gae(GAE_REWARDS, GAE_VALUES, ALL_KEPT, gamma=0.5, lam=0.5)
    assert_close(advantages, [[-0.1625, -0.05, 0.4]], rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_residuals_and_never_reads_padding(seed: int, gamma: float, lam: float):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (3,), generator=generator).tolist()
    rewards = [torch.randn(length, dtype=torch.float64, generator=generator).tolist() for length in lengths]
    values = [torch.randn(length, dtype=torch.float64, generator=generator).tolist() for length in lengths]
    expected = []
    for row_rewards, row_values in zip(rewards, values, strict=True):
        following = [*row_values[1:], 0.0]
        deltas = [r + gamma * v_next - v for r, v_next, v in zip(row_rewards, following, row_values, strict=True)]
        expected.append(
            [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]
        )
    mask = padded([[1.0] * length for length in lengths]).bool()
    rewards, values = (padded(rows, padding=NAN, dtype=torch.float64) for rows in (rewards, values))
    advantages = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert_close(advantages, padded(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_tied_groups_are_those_with_equal_rewards():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0], [0.9, 0.9, 0.9]])
    assert tied_groups(rewards).tolist() == [True, False, True]
    # Of one completion each, the batch is the group.
    assert tied_groups(torch.tensor([[1.0], [2.0]])).tolist() == [False, False]
    assert tied_groups(torch.tensor([[2.0], [2.0]])).tolist() == [True, True]
    # A tie among those that have a reward is a tie.
    assert tied_groups(torch.tensor([[2.0, NAN, 2.0], [2.0, NAN, 3.0]])).tolist() == [True, False]


def test_what_rounding_changes_makes_no_advantage():
    # 8 units in the last place of fp32 at 1 are 2^-20; the larger of the two is a little more than 1.
    rounded, apart = (torch.tensor([[1.0, 1.0 + ulps * 2.0**-23]]).double() for ulps in (8, 9))
    assert batch_standardized(group_mean(rounded)).tolist() == [[0.0, 0.0]]
    assert_close(batch_standardized(group_mean(apart), eps=0.0), [[-1.0, 1.0]], rtol=1e-5)
    # One completion per prompt: the batch is what is standardised.
    assert batch_standardized(group_mean(rounded.T)).tolist() == [[0.0], [0.0]]
    assert_close(batch_standardized(group_mean(apart.T), eps=0.0), [[-1.0], [1.0]], rtol=1e-5)


@pytest.mark.parametrize(
    "estimate",
    [group_mean, leave_one_out, lambda rewards: group_standardized(rewards, ddof=0, eps=0.0), tied_groups],
)
@pytest.mark.parametrize("shape", [(4,), (0, 2), (2, 0), (1, 2, 3)])
def test_rewards_must_be_prompts_by_completions(estimate, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"rewards must be \[prompts, completions\] and not empty"):
        estimate(torch.zeros(shape))


def test_comparing_estimators_refuse_a_single_completion():
    with pytest.raises(ValueError, match="leave_one_out needs at least 2 completions"):
        leave_one_out(torch.ones(3, 1))
    with pytest.raises(ValueError, match="group_standardized needs at least 2 completions"):
        group_standardized(torch.ones(3, 1), ddof=0, eps=1e-4)


@pytest.mark.parametrize(("size", "ddof"), [(0, 0), (1, 1)])
def test_batch_standardized_needs_a_degree_of_freedom(size: int, ddof: int):
    with pytest.raises(ValueError, match=f"needs more than {ddof} values, got {size}"):
        batch_standardized(torch.ones(size), ddof=ddof)


@pytest.mark.parametrize(("gamma", "lam"), [(-0.1, 0.5), (1.1, 0.5), (0.5, -0.1), (0.5, 1.1), (math.nan, 0.5)])
def test_gae_refuses_factors_outside_the_unit_interval_and_other_shapes(gamma: float, lam: float):
    with pytest.raises(ValueError, match=r"gamma and lam must lie in \[0, 1\]"):
        gae(GAE_REWARDS, GAE_VALUES, ALL_KEPT, gamma=gamma, lam=lam)
    with pytest.raises(ValueError, match=r"rewards \[1, 3\], values \[1, 2\], mask \[1, 3\]"):
        gae(GAE_REWARDS, GAE_VALUES[:, :2], ALL_KEPT, gamma=1.0, lam=1.0)


# --- completions without a reward ------------------------------------------------------------------------------------

# Of the first prompt 1 and 5 remain (mean 3, sample variance 8); of the second 4 alone; of the third nothing.
SPARSE = torch.tensor([[1.0, NAN, 5.0], [NAN, 4.0, NAN], [NAN, NAN, NAN]])


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (group_mean, [-2.0, 2.0, 0.0]),
        (leave_one_out, [-4.0, 4.0, 0.0]),
        (partial(group_standardized, ddof=1, eps=0.0), [-(0.5**0.5), 0.5**0.5, 0.0]),
        (partial(group_standardized, ddof=0, eps=0.0), [-1.0, 1.0, 0.0]),
        # 1, 5 and 4: mean 10/3, population variance 26/9.
        (partial(batch_standardized, eps=0.0), [-7 / 26**0.5, 5 / 26**0.5, 2 / 26**0.5]),
    ],
)
def test_completions_without_a_reward_count_nowhere(estimate: Any, expected: list[float]):
    advantages = estimate(SPARSE)
    assert torch.equal(advantages.isnan(), SPARSE.isnan())
    assert advantages[~SPARSE.isnan()].tolist() == pytest.approx(expected)
