"""Masked reductions, KL estimators, effective sample size and the mean that adds exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, few

from dar.ops import Mean, effective_sample_size, kl_k1, kl_k3, masked_mean, masked_sum

NAN = math.nan
RAGGED = torch.tensor([[1.0, 2.0, 3.0], [10.0, NAN, math.inf]], dtype=torch.float64)
RAGGED_MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_masked_sum_never_reads_padding():
    assert_close(masked_sum(RAGGED, RAGGED_MASK), [6.0, 10.0], rtol=0)


def test_masked_mean_is_over_tokens_and_not_over_rows():
    # (1 + 2 + 3 + 10) / 4 = 4; the mean of the row means would be (2 + 10) / 2 = 6.
    assert_close(masked_mean(RAGGED, RAGGED_MASK), 4.0, rtol=0)


def test_masked_reductions_send_no_gradient_into_padding():
    for reduce, kept in ((masked_sum, 1.0), (masked_mean, 0.25)):
        values = RAGGED.clone().requires_grad_()
        reduce(values, RAGGED_MASK).sum().backward()
        assert values.grad is not None
        assert_close(values.grad, RAGGED_MASK.double() * kept, rtol=0)


@few
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 5), width=st.integers(1, 5))
def test_reducing_with_a_mask_equals_reducing_what_is_kept(seed: int, rows: int, width: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, width, generator=generator) < 0.5
    mask[0, 0] = True
    dirty = values.masked_fill(~mask, NAN)
    assert_close(masked_sum(dirty, mask).sum(), values[mask].sum(), rtol=1e-12, atol=1e-12)
    assert_close(masked_mean(dirty, mask), values[mask].mean(), rtol=1e-12, atol=1e-12)


def test_masked_reductions_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"shapes must agree: values \[2, 3\], mask \[2, 2\]"):
        masked_sum(RAGGED, RAGGED_MASK[:, :2])
    with pytest.raises(ValueError, match=r"shapes must agree: values \[2, 3\], mask \[1, 3\]"):
        masked_mean(RAGGED, RAGGED_MASK[:1])
    with pytest.raises(ValueError, match="masked_mean of an empty selection"):
        masked_mean(RAGGED, torch.zeros_like(RAGGED_MASK))


@pytest.mark.parametrize(
    ("u", "k1", "k3"),
    [
        # k1 = −u, k3 = e^u − u − 1: e^−1 + 1 − 1 = .36787944 and e^.5 − 1.5 = .14872127.
        (-1.0, 1.0, 0.36787944117144233),
        (0.5, -0.5, 0.14872127070012822),
        (0.0, 0.0, 0.0),
    ],
)
def test_kl_estimators_at_known_log_ratios(u: float, k1: float, k3: float):
    logprobs = torch.tensor([-2.0], dtype=torch.float64)
    other = logprobs + u
    assert_close(kl_k1(logprobs, other), [k1], rtol=1e-12)
    assert_close(kl_k3(logprobs, other), [k3], rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000), size=st.integers(2, 8))
def test_k1_and_k3_average_to_the_kl(seed: int, size: int):
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = torch.log_softmax(2 * torch.randn(2, size, dtype=torch.float64, generator=generator), 1)
    p = log_p.exp()
    # E_p[e^u − 1] = Σ p·q/p − 1 = 0, so both estimators have the expectation Σ p log(p/q).
    kl = (p * (log_p - log_q)).sum()
    assert_close((p * kl_k1(log_p, log_q)).sum(), kl, rtol=1e-10, atol=1e-12)
    assert_close((p * kl_k3(log_p, log_q)).sum(), kl, rtol=1e-10, atol=1e-12)
    assert (kl_k3(log_p, log_q) >= 0).all()


def test_k3_keeps_its_digits_where_the_policies_nearly_agree():
    # e^u − u − 1 = u²/2 + u³/6 + …; e^u − 1 taken as written would leave 1e-16 / 5e-13 = 2e-4 of error.
    u = 1e-6
    value = kl_k3(torch.zeros(1, dtype=torch.float64), torch.tensor([u], dtype=torch.float64))
    assert_close(value, [u**2 / 2 + u**3 / 6], rtol=1e-8)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_refuse_other_shapes(estimator):
    with pytest.raises(ValueError, match=r"shapes must agree: logprobs \[2\], other_logprobs \[1\]"):
        estimator(torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0),
        ([0.0, 5.0, 0.0], 1.0),
        ([0.0, 0.0, 0.0, 0.0], 0.0),
        # (1 + 2 + 3)² / (1 + 4 + 9) = 36/14.
        ([1.0, 2.0, 3.0], 36 / 14),
        # The squares would leave fp32.
        ([1e30, 2e30, 3e30], 36 / 14),
        ([1e-30, 2e-30, 3e-30], 36 / 14),
        # The golden batch at β = 1: (Σ w)² / Σ w² = 6.12986671² / 20.26874.
        ([0.20763185794803, 4.35789298895754, 0.70964021963693, 0.85470164025223], 1.853879920138132),
    ],
)
def test_effective_sample_size_at_known_weights(weights: list[float], size: float):
    assert_close(effective_sample_size(torch.tensor(weights)), size, rtol=1e-6)


@few
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8).filter(any))
def test_effective_sample_size_lies_between_one_and_the_number_of_rows(weights: list[float]):
    size = effective_sample_size(torch.tensor(weights)).item()
    assert 1 - 1e-5 <= size <= len(weights) * (1 + 1e-5)


def test_mean_adds_to_the_mean_of_the_whole():
    # A mean of means would be (2 + 10) / 2 = 6.
    parts = Mean.of(torch.tensor([1.0, 2.0, 3.0])) + Mean.of(torch.tensor([10.0]))
    assert parts == Mean.of(RAGGED, RAGGED_MASK) == Mean(16.0, 4.0)
    assert parts.value == 4.0
    assert Mean.of(torch.tensor([True, False, False, True])).value == 0.5


def test_mean_sums_in_float64():
    # 2²⁴ + 1 has no fp32 neighbour of its own: an fp32 sum would lose both ones.
    assert Mean.of(torch.tensor([2.0**24, 1.0, 1.0])).total == 2.0**24 + 2


def test_empty_mean_is_an_error_and_neutral_in_a_sum():
    with pytest.raises(ValueError, match="the mean of nothing is undefined"):
        _ = Mean().value
    assert (Mean() + Mean(3.0, 2.0)).value == 1.5
