"""The objectives on ρ: values, gradients, where the gradient vanishes, and the optima on policies one can enumerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, few, gradient, padded, random_rows
from torch import Tensor

from dar.objectives.policy_gradient import (
    cispo,
    clipped_surrogate,
    clipped_tokens,
    dao,
    dao_tokens,
    dppo,
    dual_step,
    gspo,
    kl_to_old,
    out_of_region,
    r2vpo,
    ratio_variance,
    sequence_clipped_surrogate,
)
from dar.ops import kl_k3

NAN, INF = math.nan, math.inf
EPS = {"clip_low": 0.2, "clip_high": 0.2}
# ρ = π_θ/π_t = (1.25, .8, 1.25, .8).
GOLDEN_LOGPROBS = torch.tensor([[0.5, 0.2, 0.1, 0.4]], dtype=torch.float64).log()
GOLDEN_OLD = torch.tensor([[0.4, 0.25, 0.08, 0.5]], dtype=torch.float64).log()
GOLDEN_ADVANTAGES = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
ONE_ROW = torch.ones(1, 4, dtype=torch.bool)


def tokens(ratios: list[float], advantages: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row per ratio: log π_θ (with gradient), log π_t, advantage, mask."""
    old = torch.full((len(ratios), 1), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log().unsqueeze(1)).requires_grad_()
    return logprobs, old, torch.tensor(advantages, dtype=torch.float64), torch.ones(len(ratios), 1, dtype=torch.bool)


def test_surrogate_of_the_golden_tokens():
    # −min(1.25, 1.2), −min(.8, .8), −min(−1.25, −1.2), −min(−.8, −.8); their mean is .05/4.
    losses = clipped_surrogate(GOLDEN_LOGPROBS, GOLDEN_OLD, GOLDEN_ADVANTAGES, ONE_ROW, **EPS)
    assert_close(losses, [[-1.2, -0.8, 1.25, 0.8]], rtol=1e-12)
    assert_close(losses.mean(), 0.0125, rtol=1e-12)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate, gspo])
def test_gradient_vanishes_exactly_where_moving_on_would_be_rewarded(surrogate):
    # d/dlogπ of −ρA is −ρA; it is cut where A > 0 and ρ > 1 + ε, or A < 0 and ρ < 1 − ε.
    ratios = [1.3, 0.7, 1.1, 1.3, 0.7, 0.9]
    advantages = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    logprobs, old, rows, mask = tokens(ratios, advantages)
    losses = surrogate(logprobs, old, rows, mask, **EPS)
    assert_close(losses.flatten(), [-2.4, -1.4, -2.2, 2.6, 1.6, 1.8], rtol=1e-12)
    assert_close(gradient(losses, logprobs).flatten(), [0.0, -1.4, -2.2, 2.6, 0.0, 1.8], rtol=1e-12)
    clipped = clipped_tokens(logprobs - old, rows.unsqueeze(1), **EPS)
    assert clipped.flatten().tolist() == [True, False, False, False, True, False]
    if surrogate is clipped_surrogate:
        # The same as tokens of one row, each with an advantage of its own.
        row = [values.detach().reshape(1, 6) for values in (logprobs, old, rows, mask)]
        assert_close(clipped_surrogate(*row, **EPS), losses.reshape(1, 6), rtol=0)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
def test_bounds_may_differ(surrogate):
    # ε_low = .1, ε_high = .28: 1.25 and .95 lie inside, 1.3 and .85 outside.
    logprobs, old, rows, mask = tokens([1.25, 1.3, 0.95, 0.85], [1.0, 1.0, -1.0, -1.0])
    losses = surrogate(logprobs, old, rows, mask, clip_low=0.1, clip_high=0.28)
    assert_close(losses.flatten(), [-1.25, -1.28, 0.95, 0.9], rtol=1e-12)
    assert_close(gradient(losses, logprobs).flatten(), [-1.25, 0.0, 0.95, 0.0], rtol=1e-12)
    clipped = clipped_tokens(logprobs - old, rows.unsqueeze(1), clip_low=0.1, clip_high=0.28)
    assert clipped.flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
def test_infinite_upper_bound_and_unit_lower_bound_never_clip(surrogate):
    ratios, advantages = [50.0, 0.01, 50.0, 0.01], [1.0, 1.0, -1.0, -1.0]
    logprobs, old, rows, mask = tokens(ratios, advantages)
    losses = surrogate(logprobs, old, rows, mask, clip_low=1.0, clip_high=INF)
    assert_close(losses.flatten(), [-50.0, -0.01, 50.0, 0.01], rtol=1e-12)
    assert_close(gradient(losses, logprobs).flatten(), losses.flatten(), rtol=1e-12)
    assert not clipped_tokens(logprobs - old, rows.unsqueeze(1), clip_low=1.0, clip_high=INF).any()


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 5))
def test_at_the_behaviour_policy_the_gradient_is_the_policy_gradient(seed: int, num_rows: int):
    # ρ = 1 lies inside both bounds, and (ρ − 1)² has no slope: −A on every sampled token, at token and sequence level.
    _, old, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in old]).bool()
    behaviour = padded(old, dtype=torch.float64)
    advantages = torch.randn(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = -advantages.unsqueeze(1) * mask
    surrogates = [partial(surrogate, **EPS) for surrogate in (clipped_surrogate, sequence_clipped_surrogate)]
    for surrogate in (*surrogates, *(partial(r2vpo, penalty=penalty) for penalty in (0.0, 10.0))):
        logprobs = behaviour.clone().requires_grad_()
        losses = surrogate(logprobs, behaviour, advantages, mask)
        assert_close(gradient(losses, logprobs), expected, rtol=1e-12)
    # The KL vanishes there, with its gradient.
    logprobs = behaviour.clone().requires_grad_()
    losses = kl_to_old(logprobs, behaviour, mask)
    assert_close(losses, torch.zeros(mask.shape), rtol=0)
    assert_close(gradient(losses, logprobs), torch.zeros(mask.shape), rtol=0)


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 4))
def test_clipped_tokens_are_those_without_gradient(seed: int, num_rows: int):
    current, old, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in old]).bool()
    logprobs, behaviour = padded(current, dtype=torch.float64).requires_grad_(), padded(old, dtype=torch.float64)
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grad = gradient(clipped_surrogate(logprobs, behaviour, advantages, mask, **EPS), logprobs)
    assert torch.equal((grad == 0)[mask], clipped_tokens(logprobs - behaviour, advantages, **EPS)[mask])


def test_sequence_ratio_is_the_product_of_the_token_ratios():
    # Ratios 1.15 and 1.15 lie inside 1.2 each; their product 1.3225 does not. 1.5 and .7 are outside; 1.05 is inside.
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    ratios = torch.tensor([[1.15, 1.15], [1.5, 0.7]], dtype=torch.float64)
    logprobs = (old + ratios.log()).requires_grad_()
    advantages, mask = torch.tensor([2.0, 2.0], dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
    losses = sequence_clipped_surrogate(logprobs, old, advantages, mask, **EPS)
    assert_close(losses, [-2.4, -2.1], rtol=1e-12)
    assert_close(gradient(losses, logprobs), [[0.0, 0.0], [-2.1, -2.1]], rtol=1e-12)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.2), (0.0, 0.0)])
def test_ratio_beyond_the_float_range_is_clipped_like_any_other(surrogate, advantage: float, loss: float):
    logprobs = torch.tensor([[100.0]], requires_grad=True)
    zeros, mask = torch.zeros(1, 1), torch.tensor([[True]])
    losses = surrogate(logprobs, zeros, torch.tensor([advantage]), mask, **EPS)
    assert_close(losses.flatten(), [loss], rtol=1e-6)
    assert_close(gradient(losses, logprobs), [[0.0]], rtol=0)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate, gspo, cispo])
@pytest.mark.parametrize(("clip_low", "clip_high"), [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (NAN, 0.2), (0.2, NAN)])
def test_impossible_bounds_are_refused(surrogate, clip_low: float, clip_high: float):
    with pytest.raises(ValueError, match=r"clip_low must lie in \[0, 1\] and clip_high be ≥ 0"):
        surrogate(*tokens([1.0], [1.0]), clip_low=clip_low, clip_high=clip_high)


# --- GSPO ------------------------------------------------------------------------------------------------------------


def test_length_normalised_ratio_is_the_geometric_mean_of_the_token_ratios():
    # √(1.44·1) = 1.2 and √(1.21·1) = 1.1 inside 1.25; √(1.44·1.69) = 1.56 outside; a row of one token of .5.
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    old = torch.full((4, 2), -1.0, dtype=torch.float64)
    ratios = torch.tensor([[1.44, 1.0], [1.21, 1.0], [1.44, 1.69], [0.5, NAN]], dtype=torch.float64)
    logprobs = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 1.0, 1.0], dtype=torch.float64)
    losses = gspo(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.25)
    assert_close(losses, [-1.2, 2.2, -1.25, -0.5], rtol=1e-12)
    # −s A / |y| on each token.
    expected = [[-0.6, -0.6], [1.1, 1.1], [0.0, 0.0], [-0.5, 0.0]]
    assert_close(gradient(losses, logprobs), expected, rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000), repeats=st.integers(1, 4))
def test_gspo_does_not_depend_on_length(seed: int, repeats: int):
    # The same token ratios said `repeats` times: the same s, while the ratio of the sequence is its power.
    current, behaviour, _ = random_rows(seed, 1)
    logprobs, old = (torch.tensor(rows, dtype=torch.float64) for rows in (current, behaviour))
    once = gspo(logprobs, old, torch.ones(1).double(), torch.ones_like(old).bool(), clip_low=1.0, clip_high=INF)
    longer = old.repeat(1, repeats)
    again = gspo(
        logprobs.repeat(1, repeats),
        longer,
        torch.ones(1).double(),
        torch.ones_like(longer).bool(),
        clip_low=1.0,
        clip_high=INF,
    )
    assert_close(again, once, rtol=1e-12)


def test_gspo_of_a_row_without_tokens_is_finite():
    losses = gspo(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([3.0]), torch.zeros(1, 2).bool(), **EPS)
    assert_close(losses, [-3.0], rtol=0)


# --- CISPO and DPPO --------------------------------------------------------------------------------------------------


def test_cispo_bounds_the_weight_and_leaves_every_token_its_gradient():
    # The gradient is −clip(ρ, .8, 1.2)·A, whatever the sign of A; the value is that times log π_θ.
    ratios, advantages = [1.3, 0.7, 1.1, 1.3, 0.7, 0.9], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    logprobs, old, rows, mask = tokens(ratios, advantages)
    losses = cispo(logprobs, old, rows, mask, **EPS)
    expected = [-2.4, -1.6, -2.2, 2.4, 1.6, 1.8]
    assert_close(gradient(losses, logprobs).flatten(), expected, rtol=1e-12)
    assert_close(losses.flatten(), [e * (-2 + math.log(r)) for e, r in zip(expected, ratios, strict=True)], rtol=1e-12)


def test_cispo_without_bounds_is_the_importance_sampled_policy_gradient():
    logprobs, old, rows, mask = tokens([50.0, 0.01, 50.0, 0.01], [1.0, 1.0, -1.0, -1.0])
    found = gradient(cispo(logprobs, old, rows, mask, clip_low=1.0, clip_high=INF), logprobs)
    assert_close(found.flatten(), [-50.0, -0.01, 50.0, 0.01], rtol=1e-12)
    capped = gradient(cispo(logprobs, old, rows, mask, clip_low=1.0, clip_high=4.0), logprobs)
    assert_close(capped.flatten(), [-5.0, -0.01, 5.0, 0.01], rtol=1e-12)


# π_θ, π_t and A of tokens: within δ = .15; risen by .2 with A > 0 (out) and with A < 0; fallen by .2 with A < 0 (out)
# and with A > 0; and rare tokens with ratios of 100 and .01, which a clip would stop and which have hardly moved.
MOVED = [(0.5, 0.4, 1.0), (0.5, 0.3, 1.0), (0.5, 0.3, -1.0), (0.3, 0.5, -2.0), (0.3, 0.5, 2.0)]
MOVED += [(0.01, 0.0001, 1.0), (0.001, 0.1, -1.0)]
WEIGHTS = [1.25, 0.0, 5 / 3, 0.0, 0.6, 100.0, 0.01]


@pytest.mark.parametrize("max_ratio", [INF, 20.0, 1.5])
def test_dppo_cuts_the_gradient_by_probabilities_and_not_by_ratios(max_ratio: float):
    current, before, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*MOVED, strict=True))
    logprobs, old = current.log().unsqueeze(1).requires_grad_(), before.log().unsqueeze(1)
    mask = torch.ones(7, 1, dtype=torch.bool)
    losses = dppo(logprobs, old, advantages, mask, max_shift=0.15, max_ratio=max_ratio)
    weights = torch.tensor([min(weight, max_ratio) for weight in WEIGHTS])
    assert_close(gradient(losses, logprobs).flatten(), -weights * advantages, rtol=1e-7)
    assert_close(losses.flatten(), -weights * advantages * current.log(), rtol=1e-7)
    is_out = out_of_region(logprobs, old, advantages.unsqueeze(1), max_shift=0.15)
    assert is_out.flatten().tolist() == [False, True, False, True, False, False, False]
    assert not is_out.requires_grad


def test_dppo_with_a_region_of_everything_is_cispo_without_a_lower_bound():
    logprobs = GOLDEN_LOGPROBS.clone().requires_grad_()
    rest = (GOLDEN_OLD, GOLDEN_ADVANTAGES, ONE_ROW)
    whole = dppo(logprobs, *rest, max_shift=1.0, max_ratio=1.2)
    assert_close(whole, cispo(logprobs, *rest, clip_low=1.0, clip_high=0.2), rtol=1e-12)
    # Shifts .1, −.05, .02, −.1 and A = 1, 1, −1, −1: the first and the last go with A, and a δ of 0 takes them.
    found = gradient(dppo(logprobs, *rest, max_shift=0.0, max_ratio=INF), logprobs)
    assert_close(found, [[0.0, -0.8, 1.25, 0.0]], rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000), size=st.integers(2, 6))
def test_a_tokens_shift_bounds_the_total_variation_from_below(seed: int, size: int):
    generator = torch.Generator().manual_seed(seed)
    current, before = torch.randn(2, size, dtype=torch.float64, generator=generator).softmax(-1)
    total = 0.5 * (current - before).abs().sum()
    is_out = out_of_region(current.log(), before.log(), (current - before).sign(), max_shift=float(total) + 1e-12)
    assert not is_out.any()


@pytest.mark.parametrize(("max_shift", "max_ratio"), [(-0.1, 20.0), (1.1, 20.0), (NAN, 20.0), (0.15, 0.9), (0.15, NAN)])
def test_impossible_regions_are_refused(max_shift: float, max_ratio: float):
    with pytest.raises(ValueError, match=r"max_shift must lie in \[0, 1\] and max_ratio be ≥ 1, got"):
        dppo(*tokens([1.0], [1.0]), max_shift=max_shift, max_ratio=max_ratio)


def verl_cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """verl's `compute_policy_loss_cispo` (core_algos.py at 018f23b)."""
    ratio = (logprobs - old).clamp(-20, 20).exp()
    return -ratio.clamp(1 - low, 1 + high).detach() * advantages * logprobs


def verl_dppo_tv(logprobs: Tensor, old: Tensor, advantages: Tensor, delta: float, cap: float) -> Tensor:
    """verl's `compute_policy_loss_dppo_tv` (core_algos.py at 018f23b) with equal bounds."""
    ratio = (logprobs - old).clamp(-20, 20).exp()
    shift = logprobs.exp() - old.exp()
    is_valid = torch.where(advantages > 0, shift <= delta, shift >= -delta)
    return -advantages * ratio.clamp(max=cap).detach() * logprobs * is_valid.detach()


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 4), width=st.sampled_from([0.05, 0.2, 1.0]))
def test_cispo_and_dppo_are_verls(seed: int, num_rows: int, width: float):
    current, old, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in old]).bool()
    behaviour = padded(old, dtype=torch.float64)
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for ours, theirs in (
        (partial(cispo, clip_low=width, clip_high=width), partial(verl_cispo, low=width, high=width)),
        (partial(dppo, max_shift=width / 4, max_ratio=1.2), partial(verl_dppo_tv, delta=width / 4, cap=1.2)),
    ):
        leaves = [padded(current, dtype=torch.float64).requires_grad_() for _ in range(2)]
        found, wanted = ours(leaves[0], behaviour, advantages, mask), theirs(leaves[1], behaviour, advantages) * mask
        assert_close(found, wanted, rtol=1e-12)
        assert_close(gradient(found, leaves[0]), gradient(wanted, leaves[1]), rtol=1e-12)


# --- DAO -------------------------------------------------------------------------------------------------------------

# Two completions: ρ = (1.25·.8, 2·—), π_t/π_0 = (2·1, 2·—).
DAO_MASK = torch.tensor([[True, True], [True, False]])
DAO_LOGPROBS = torch.tensor([[0.5, 0.2], [0.5, NAN]], dtype=torch.float64).log()
DAO_OLD = torch.tensor([[0.4, 0.25], [0.25, NAN]], dtype=torch.float64).log()
DAO_REF = torch.tensor([[0.2, 0.25], [0.125, NAN]], dtype=torch.float64).log()
DAO_ADVANTAGES = torch.tensor([-1.0, 1.0], dtype=torch.float64)
DUAL = {"alpha": 0.4, "beta": 0.5}
LN2, LN125 = math.log(2.0), math.log(1.25)


def test_dao_of_two_completions():
    # Row 1: ρ = 1, so log ρ = 0 and log π_θ/π₀ = ln 2:  1 + .2·ln 2.
    # Row 2: ρ = 2, log π_θ/π₀ = 2 ln 2:  −2 + .2·2·2 ln 2 + .3·2·ln 2 = −2 + 1.4 ln 2.
    logprobs = DAO_LOGPROBS.clone().requires_grad_()
    losses = dao(logprobs, DAO_OLD, DAO_REF, DAO_ADVANTAGES, DAO_MASK, **DUAL)
    assert_close(losses, [1 + 0.2 * LN2, -2 + 1.4 * LN2], rtol=1e-12)
    # d/dΣlog π_θ = L + ρ·(αβ + (1−α)β): the product rule on ρ · (…).
    first, second = 1 + 0.2 * LN2 + 0.5, -2 + 1.4 * LN2 + 2 * 0.5
    assert_close(gradient(losses, logprobs), [[first, first], [second, 0.0]], rtol=1e-12)


def test_dao_tokens_of_two_completions():
    # ρ = (1.25, .8 | 2), log ρ = (ln 1.25, −ln 1.25 | ln 2), log π_θ/π₀ = (ln 2.5, −ln 1.25 | 2 ln 2), A = −1 | 1.
    logprobs = DAO_LOGPROBS.clone().requires_grad_()
    losses = dao_tokens(logprobs, DAO_OLD, DAO_REF, DAO_ADVANTAGES, DAO_MASK, **DUAL)
    first = 1.25 + 0.2 * 1.25 * (LN125 + LN2) + 0.3 * 1.25 * LN125
    second = 0.8 - 0.2 * 0.8 * LN125 - 0.3 * 0.8 * LN125
    assert_close(losses, [[first, second], [-2 + 1.4 * LN2, 0.0]], rtol=1e-12)
    expected = [[first + 1.25 * 0.5, second + 0.8 * 0.5], [-2 + 1.4 * LN2 + 2 * 0.5, 0.0]]
    assert_close(gradient(losses, logprobs), expected, rtol=1e-12)


@pytest.mark.parametrize("objective", [dao, dao_tokens])
def test_alpha_zero_does_not_read_the_reference(objective: Callable[..., Tensor]):
    arguments = (DAO_ADVANTAGES, DAO_MASK)
    without = objective(DAO_LOGPROBS, DAO_OLD, None, *arguments, alpha=0.0, beta=0.5)
    nowhere = torch.full_like(DAO_OLD, NAN)
    assert_close(without, objective(DAO_LOGPROBS, DAO_OLD, nowhere, *arguments, alpha=0.0, beta=0.5), rtol=0)
    # Second row: −2 + .5·2·ln 2.
    assert_close(without[1].sum(), -2 + LN2, rtol=1e-12)


@pytest.mark.parametrize("objective", [dao, dao_tokens])
def test_beta_zero_is_the_importance_sampled_policy_gradient(objective: Callable[..., Tensor]):
    logprobs = DAO_LOGPROBS.clone().requires_grad_()
    surrogate = sequence_clipped_surrogate if objective is dao else clipped_surrogate
    unclipped = surrogate(logprobs, DAO_OLD, DAO_ADVANTAGES, DAO_MASK, clip_low=1.0, clip_high=INF)
    losses = objective(logprobs, DAO_OLD, DAO_REF, DAO_ADVANTAGES, DAO_MASK, alpha=0.4, beta=0.0)
    assert_close(losses, unclipped, rtol=1e-12)
    assert_close(gradient(losses, logprobs), gradient(unclipped, logprobs), rtol=1e-12)


@pytest.mark.parametrize("objective", [dao, dao_tokens])
@pytest.mark.parametrize("log_ratio", [90.0, 20.5, -20.5, -90.0])
def test_overflow_guard_bounds_the_ratio_and_not_the_penalty(objective: Callable[..., Tensor], log_ratio: float):
    # ρ stays at e^±20; the factor log ρ keeps its value and its gradient ρβ, which points back towards π_t.
    logprobs = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    zeros, mask = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[True]])
    advantages = torch.tensor([3.0], dtype=torch.float64)
    losses = objective(logprobs, zeros, zeros, advantages, mask, alpha=0.4, beta=0.5)
    ratio = math.exp(math.copysign(20.0, log_ratio))
    assert_close(losses.sum(), ratio * (0.5 * log_ratio - 3.0), rtol=1e-12)
    assert_close(gradient(losses, logprobs), [[ratio * 0.5]], rtol=1e-12)
    assert objective(logprobs.float(), zeros, zeros, advantages, mask, alpha=0.4, beta=0.5).isfinite().all()


@pytest.mark.parametrize("objective", [dao, dao_tokens])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, r"alpha is a share and must lie in \[0, 1\], got -0.1"),
        ({"alpha": 1.1}, r"alpha is a share and must lie in \[0, 1\], got 1.1"),
        ({"alpha": NAN}, r"alpha is a share and must lie in \[0, 1\], got nan"),
        ({"beta": -0.1}, r"beta must be ≥ 0 and finite, got -0.1"),
        ({"beta": NAN}, r"beta must be ≥ 0 and finite, got nan"),
        ({"beta": INF}, r"beta must be ≥ 0 and finite, got inf"),
        ({"ref_logprobs": None}, r"alpha = 0.4 regularises towards π₀ and needs ref_logprobs, got None"),
    ],
)
def test_dao_refuses_what_it_cannot_use(objective: Callable[..., Tensor], changes: dict, message: str):
    given = {"ref_logprobs": DAO_REF, **DUAL, **changes}
    with pytest.raises(ValueError, match=message):
        objective(DAO_LOGPROBS, DAO_OLD, advantages=DAO_ADVANTAGES, mask=DAO_MASK, **given)


# --- DAO on a policy of three outcomes: π₀ = (.5, .3, .2), π_t = (.2, .5, .3), A = (1, 0, −1), α = .4, β = .5 -------

PI_0 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PI_T = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
OUTCOMES = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
ONE_TOKEN = torch.ones(3, 1, dtype=torch.bool)


def expected_dao(
    logits: Tensor, advantages: Tensor, *, objective: Callable[..., Tensor] = dao, alpha: float = 0.4, beta: float = 0.5
) -> Tensor:
    """E_{y~π_t} of the loss for the policy softmax(logits), every outcome a completion of one token."""
    columns = (values.unsqueeze(1) for values in (torch.log_softmax(logits, 0), PI_T.log(), PI_0.log()))
    losses = objective(*columns, advantages, ONE_TOKEN, alpha=alpha, beta=beta)
    return (PI_T * losses.flatten()).sum()


def descended(loss: Callable[[Tensor], Tensor], *, rate: float) -> Tensor:
    """The policy that 200 exact steps from π_t reach: natural gradient, ∇/π, under which each outcome moves alone."""
    logits = PI_T.log()
    for _ in range(200):
        leaf = logits.clone().requires_grad_()
        logits = torch.log_softmax(logits - rate * gradient(loss(leaf), leaf) / logits.exp(), 0)
    return logits.exp()


@few
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1), beta=st.floats(0, 2))
def test_dao_is_minus_the_objective_of_dar_in_expectation(seed: int, alpha: float, beta: float):
    # E_t[ρ f] = E_θ[f], for f = −A + αβ log(π_θ/π₀) + (1−α)β log(π_θ/π_t): values and gradients agree.
    logits = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    log_policy = torch.log_softmax(logits, 0)
    penalty = alpha * (log_policy - PI_0.log()) + (1 - alpha) * (log_policy - PI_T.log())
    negative = (log_policy.exp() * (beta * penalty - OUTCOMES)).sum()
    loss = expected_dao(logits, OUTCOMES, alpha=alpha, beta=beta)
    assert_close(loss, negative, rtol=1e-12, atol=1e-14)
    assert_close(gradient(loss, logits), gradient(negative, logits), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("objective", [dao, dao_tokens])
def test_exact_ascent_on_dao_reaches_the_optimum_of_dar(objective: Callable[..., Tensor]):
    # π* ∝ π₀^.4 π_t^.6 e^(A/.5) = (2.13203811, .40759656, .03452199) / 2.57415665. For one token the two forms agree.
    best = descended(lambda logits: expected_dao(logits, OUTCOMES, objective=objective), rate=1.0)
    assert_close(best, torch.softmax(0.4 * PI_0.log() + 0.6 * PI_T.log() + OUTCOMES / 0.5, 0), rtol=1e-12)
    assert_close(best, [0.82824723, 0.15834178, 0.01341099], rtol=4e-7)
    # Without advantages ∝ π₀^.4 π_t^.6 = (.28853998, .40759656, .25508489) / .95122144.
    best = descended(lambda logits: expected_dao(logits, torch.zeros(3).double(), objective=objective), rate=1.0)
    assert_close(best, [0.30333629, 0.42849808, 0.26816563], rtol=4e-8)
    # With one of its references alone.
    for alpha, prior in ((0.0, PI_T), (1.0, PI_0)):
        loss = partial(expected_dao, advantages=OUTCOMES, objective=objective, alpha=alpha)
        assert_close(descended(loss, rate=1.0), torch.softmax(prior.log() + OUTCOMES / 0.5, 0), rtol=1e-12)


def test_at_the_behaviour_policy_dao_is_the_policy_gradient_of_a_reward_with_kl():
    # E_t[−(A − αβ log(π_t/π₀)) ∇log π]: RLOO with the KL coefficient αβ. The term in π_t contributes a constant per
    # row, of mean 0.
    logits = PI_T.log().requires_grad_()
    shaped = OUTCOMES - 0.4 * 0.5 * (PI_T / PI_0).log()
    policy_gradient = -(PI_T * shaped * torch.log_softmax(logits, 0)).sum()
    grad = gradient(expected_dao(logits, OUTCOMES), logits)
    assert_close(grad, gradient(policy_gradient, logits), rtol=1e-12)
    # The closed form: π_t ∘ (E[shaped] − shaped).
    assert_close(grad, PI_T * ((PI_T * shaped).sum() - shaped), rtol=1e-12)


# --- R2VPO -----------------------------------------------------------------------------------------------------------


def test_r2vpo_of_the_golden_tokens():
    # λ = .5: −ρA + .5 (ρ − 1)² = (−1.25 + .03125, −.8 + .02, 1.25 + .03125, .8 + .02), mean .025625; the Lagrangian's
    # −λδ = −.5·.04 makes it .005625. Gradient −ρ(A − 2λ(ρ − 1)).
    logprobs = GOLDEN_LOGPROBS.clone().requires_grad_()
    losses = r2vpo(logprobs, GOLDEN_OLD, GOLDEN_ADVANTAGES, ONE_ROW, penalty=0.5)
    assert_close(losses, [[-1.21875, -0.78, 1.28125, 0.82]], rtol=1e-12)
    assert_close(losses.mean() - 0.5 * 0.04, 0.005625, rtol=1e-12)
    assert_close(gradient(losses, logprobs), [[-0.9375, -0.96, 1.5625, 0.64]], rtol=1e-12)
    variance = ratio_variance(logprobs, GOLDEN_OLD, ONE_ROW)
    assert_close(variance, [[0.0625, 0.04, 0.0625, 0.04]], rtol=1e-12)
    assert_close(variance.mean(), 0.05125, rtol=1e-12)
    assert not variance.requires_grad


def test_gradient_of_r2vpo_changes_sign_at_the_soft_clip():
    # λ = 2.5: ρ* = 1 + A/(2λ) = 1.2 for A = 1 and .8 for A = −1.
    logprobs, old, rows, mask = tokens([1.1, 1.2, 1.3, 0.9, 0.8, 0.7], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    grad = gradient(r2vpo(logprobs, old, rows, mask, penalty=2.5), logprobs).flatten()
    assert_close(grad, [-0.55, 0.0, 0.65, 0.45, 0.0, -0.35], rtol=1e-12, atol=1e-14)


@few
@given(seed=st.integers(0, 10_000))
def test_without_penalty_r2vpo_is_the_unclipped_surrogate(seed: int):
    current, old, _ = random_rows(seed, 3)
    mask = padded([[1.0] * len(row) for row in old]).bool()
    logprobs, behaviour = padded(current, dtype=torch.float64).requires_grad_(), padded(old, dtype=torch.float64)
    rows = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    losses = r2vpo(logprobs, behaviour, rows, mask, penalty=0.0)
    unclipped = clipped_surrogate(logprobs, behaviour, rows, mask, clip_low=1.0, clip_high=INF)
    assert_close(losses, unclipped, rtol=1e-12)
    assert_close(gradient(losses, logprobs), gradient(unclipped, logprobs), rtol=1e-12)


# E_t[A] = .4 + .2 − .6 = 0 under π_t = (.2, .5, .3), and Var(A) = .8 + .08 + 1.2 = 2.08.
CENTRED = torch.tensor([2.0, 0.4, -2.0], dtype=torch.float64)


def expected_r2vpo(logits: Tensor, penalty: float) -> Tensor:
    losses = r2vpo(
        torch.log_softmax(logits, 0).unsqueeze(1), PI_T.log().unsqueeze(1), CENTRED, ONE_TOKEN, penalty=penalty
    )
    return (PI_T * losses.flatten()).sum()


def variance_of(policy: Tensor) -> float:
    variances = ratio_variance(policy.log().unsqueeze(1), PI_T.log().unsqueeze(1), ONE_TOKEN)
    return float((PI_T * variances.flatten()).sum())


@pytest.mark.parametrize(
    ("penalty", "best"),
    [
        # ρ* = 1 + A/2.5 = (1.8, 1.16, .2), times π_t.
        (1.25, [0.36, 0.58, 0.06]),
        # ρ* = 1 + A/5 = (1.4, 1.08, .6).
        (2.5, [0.28, 0.54, 0.18]),
    ],
)
def test_optimum_of_r2vpo_is_linear_in_the_advantage(penalty: float, best: list[float]):
    policy = descended(lambda logits: expected_r2vpo(logits, penalty), rate=1 / (2 * penalty))
    assert_close(policy, best, rtol=1e-12)
    # Var ρ* = Var(A)/(4λ²), so that δ = Var ρ* is allowed exactly by λ = sd(A)/(2√δ).
    assert variance_of(policy) == pytest.approx(2.08 / (4 * penalty**2), rel=1e-12)
    assert math.sqrt(2.08) / (2 * math.sqrt(variance_of(policy))) == pytest.approx(penalty, rel=1e-12)


def test_dual_ascent_finds_the_penalty_of_the_allowed_variance():
    # δ = .0832 belongs to λ = 2.5: the inner optimum is π_t (1 + A/(2λ)). Near it λ + 15·(.52/λ² − .0832) has slope
    # 1 − 15·1.04/λ³ = .0016.
    penalty = 1.25
    for _ in range(20):
        penalty = dual_step(penalty, variance_of(PI_T * (1 + CENTRED / (2 * penalty))), target=0.0832, rate=15.0)
    assert penalty == pytest.approx(2.5, rel=1e-9)


@pytest.mark.parametrize(
    ("penalty", "variance", "rate", "expected"),
    [
        (0.5, 0.05125, 1.0, 0.51125),
        (0.5, 0.03, 1.0, 0.49),
        (0.5, 0.05125, 10.0, 0.6125),
        (0.5, 0.04, 10.0, 0.5),
        (0.01, 0.0, 1.0, 0.0),
        (0.5, 7.0, 0.0, 0.5),
    ],
)
def test_dual_step_at_a_target_of_four_hundredths(penalty: float, variance: float, rate: float, expected: float):
    assert dual_step(penalty, variance, target=0.04, rate=rate) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["penalty", "variance", "target", "rate"])
@pytest.mark.parametrize("number", [-0.1, NAN, INF])
def test_dual_step_refuses_what_is_no_variance(name: str, number: float):
    arguments = {"penalty": 1.0, "variance": 1.0, "target": 1.0, "rate": 1.0, name: number}
    with pytest.raises(ValueError, match=f"{name} must be ≥ 0 and finite, got {number}"):
        dual_step(**arguments)


@pytest.mark.parametrize("penalty", [-0.1, NAN, INF])
def test_r2vpo_refuses_other_penalties(penalty: float):
    with pytest.raises(ValueError, match=f"penalty must be ≥ 0 and finite, got {penalty}"):
        r2vpo(GOLDEN_LOGPROBS, GOLDEN_OLD, GOLDEN_ADVANTAGES, ONE_ROW, penalty=penalty)


# --- the KL to the behaviour policy ----------------------------------------------------------------------------------


def test_kl_to_old_of_the_golden_tokens():
    # 1.25 ln 1.25 − .25 and .8 ln .8 + .2; the gradient is ρ ln ρ.
    logprobs = GOLDEN_LOGPROBS.clone().requires_grad_()
    losses = kl_to_old(logprobs, GOLDEN_OLD, ONE_ROW)
    high, low = 1.25 * LN125, -0.8 * LN125
    assert_close(losses, [[high - 0.25, low + 0.2, high - 0.25, low + 0.2]], rtol=1e-12)
    assert_close(gradient(losses, logprobs), [[high, low, high, low]], rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000))
def test_kl_to_old_is_unbiased_under_the_behaviour_policy_and_never_negative(seed: int):
    logits = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    current, old = torch.log_softmax(logits, 1).unsqueeze(2).unbind()
    terms = kl_to_old(current, old, torch.ones(6, 1, dtype=torch.bool))
    assert_close((old.exp() * terms).sum(), (current.exp() * (current - old)).sum(), rtol=1e-11)
    assert (terms >= 0).all()
    # k3, the estimator under π_θ, times the ratio that moves it to π_t.
    assert_close(terms, (current - old).exp() * kl_k3(current, old), rtol=1e-10)
