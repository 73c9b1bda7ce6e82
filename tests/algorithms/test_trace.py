"""TRACE from a batch of verdicts to the loss of each row; what every method promises is in tests/test_algorithms.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import assert_close, make_scored, padded, random_rows
from torch import Tensor

from dar.algorithms.base import Terms
from dar.algorithms.realignment import IMPACT, TRACE
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.realignment import TRACESpec
from dar.objectives.preference import dpo, npo
from dar.ops import Mean, masked_sum

INVERT, PUNISH, RETAIN, BOTH = [0, 1], [0, 0], [1, 0], [1, 1]


def batch_of(
    verdicts: Sequence[Sequence[float]], *, seed: int = 0, impact: Sequence[float] | None = None, **padding: Any
) -> tuple[Tensor, Tensor, Batch]:
    """log π_θ, KL(π₀‖π_θ) of each token, and a scored batch in fp64; all weights equal unless given."""
    current, old, ref = random_rows(seed, 2 * len(verdicts))
    scored = make_scored(verdicts, old, ref, dtype=torch.float64, **padding)
    weights = [1.0] * len(verdicts) if impact is None else impact
    labels = {IMPACT: torch.tensor([[weight, weight] for weight in weights], dtype=torch.float64)}
    logprobs = padded(current, dtype=torch.float64, **padding)
    return logprobs, 0.2 * logprobs.square(), replace(scored, labels=labels)


def terms_of(algorithm: TRACE, logprobs: Tensor, kl: Tensor, batch: Weighted) -> Terms:
    """The loss of each row; the KL is 0 in rows that are not held, as the module gives it."""
    held = algorithm.held_rows(batch)
    return algorithm.terms(TokenOutputs(logprobs, ref_kl=kl * held.unsqueeze(1) if held.any() else None), batch)


def test_rows_get_the_signs_of_their_triage():
    _, _, scored = batch_of([INVERT, PUNISH, RETAIN, BOTH])
    batch, metrics = TRACE(TRACESpec()).weigh(scored)
    assert_close(batch.advantages, [-1, 1, -1, -1, 0, 0, 0, 0], rtol=0)
    # Two conflicting pairs, and α_KL over two retained ones, of which only the chosen completion is held.
    assert_close(batch.weights, [0.5, 0.5, 0.5, 0.5, 0.05, 0, 0.05, 0], rtol=1e-7)
    assert batch.denominator == 1.0
    assert TRACE(TRACESpec()).held_rows(batch).tolist() == [False] * 4 + [True, False, True, False]
    assert metrics == {"trace/invert_fraction": 0.25, "trace/punish_fraction": 0.25, "trace/retain_fraction": 0.5}


def test_loss_is_the_formula():
    """Σ w_i ℓ_i over the conflicting pairs' mean, α_KL · the mean over retained completions of their mean KL."""
    impact = [1.5, 0.5, 0.0, 0.0]
    logprobs, kl, scored = batch_of([INVERT, PUNISH, RETAIN, BOTH], impact=impact)
    algorithm = TRACE(TRACESpec(beta=0.4, kl_coef=0.3))
    batch, _ = algorithm.weigh(scored)
    assert scored.ref_logprobs is not None
    sums, ref = (masked_sum(each, scored.mask) for each in (logprobs, scored.ref_logprobs))
    swapped = dpo(sums[1:2], sums[0:1], ref[1:2], ref[0:1], beta=0.4).sum()
    punished = npo(sums[2:4], ref[2:4], beta=0.4).sum()
    lengths = scored.mask.sum(1)
    means = masked_sum(kl, scored.mask) / lengths
    expected = (1.5 * swapped + 0.5 * punished) / 2 + 0.3 * (means[4] + means[6]) / 2
    terms = terms_of(algorithm, logprobs, kl, batch)
    assert_close(terms.losses.sum() / batch.denominator, expected, rtol=1e-7)
    h = sums - ref
    margin = 0.4 * float(h[1] - h[0])
    assert terms.means["rewards/margins"].value == pytest.approx(margin, rel=1e-6)
    assert terms.means["rewards/chosen"].value == pytest.approx(0.4 * float(h[1]), rel=1e-6)
    assert terms.means["rewards/rejected"].value == pytest.approx(0.4 * float(h[0]), rel=1e-6)
    assert terms.means["rewards/accuracies"] == Mean(float(margin > 0), 1.0)
    assert terms.means["trace/punish_log_ratio"].value == pytest.approx(float(h[2:4].mean()), rel=1e-6)
    assert terms.means["trace/retain_kl"].value == pytest.approx(float((means[4] + means[6]) / 2), rel=1e-6)


@pytest.mark.parametrize(
    ("verdicts", "loss"), [(INVERT, math.log(2)), (PUNISH, 2 * math.log(2)), (RETAIN, 0.0), (BOTH, 0.0)]
)
def test_start_of_training(verdicts: list[int], loss: float):
    """At π_θ = π₀: log 2 a term, and no KL."""
    _, _, scored = batch_of([verdicts])
    algorithm = TRACE(TRACESpec())
    batch, _ = algorithm.weigh(scored)
    assert scored.ref_logprobs is not None
    terms = terms_of(algorithm, scored.ref_logprobs, torch.zeros_like(scored.ref_logprobs), batch)
    assert_close(terms.losses.sum(), loss, rtol=1e-7)


def test_retained_pairs_alone_are_pure_kl():
    logprobs, kl, scored = batch_of([RETAIN, BOTH])
    algorithm = TRACE(TRACESpec())
    batch, _ = algorithm.weigh(scored)
    logprobs.requires_grad_()
    kl = kl.clone().requires_grad_()
    terms = terms_of(algorithm, logprobs, kl, batch)
    by_logprobs, by_kl = torch.autograd.grad(terms.losses.sum(), [logprobs, kl])
    assert (by_logprobs == 0).all()
    lengths = scored.mask.sum(1, keepdim=True)
    expected = torch.where(scored.mask, 0.1 / 2 / lengths, 0.0) * torch.tensor([[1.0], [0], [1], [0]])
    assert_close(by_kl, expected, rtol=1e-7)


def test_kl_coef_zero_holds_nobody():
    logprobs, kl, scored = batch_of([INVERT, RETAIN])
    algorithm = TRACE(TRACESpec(kl_coef=0.0))
    batch, _ = algorithm.weigh(scored)
    assert batch.weights.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert not algorithm.held_rows(batch).any()
    assert "trace/retain_kl" not in terms_of(algorithm, logprobs, kl, batch).means


def test_mean_over_batches_is_the_sum_over_all_conflicting_pairs():
    """Every draw of two of five pairs, three of them conflicting: the mean over draws with conflicts is Σ w_i ℓ_i."""
    verdicts, weights = [INVERT, PUNISH, RETAIN, INVERT, RETAIN], [0.5, 0.2, 0.0, 0.3, 0.0]
    impact = [3 * weight for weight in weights]
    algorithm = TRACE(TRACESpec(kl_coef=0.0))

    def loss(chosen: list[int]) -> float:
        current, old, ref = random_rows(3, 10)
        rows = [row for index in chosen for row in (2 * index, 2 * index + 1)]
        part = make_scored(
            [verdicts[i] for i in chosen], [old[r] for r in rows], [ref[r] for r in rows], dtype=torch.float64
        )
        labels = {IMPACT: torch.tensor([[impact[i]] * 2 for i in chosen], dtype=torch.float64)}
        batch, _ = algorithm.weigh(replace(part, labels=labels))
        logprobs = padded([current[r] for r in rows], dtype=torch.float64)
        return float(algorithm.terms(TokenOutputs(logprobs), batch).losses.sum())

    draws = [[i, j] for i in range(5) for j in range(i + 1, 5)]
    by_count: dict[int, list[float]] = {}
    for draw in draws:
        by_count.setdefault(sum(weights[i] > 0 for i in draw), []).append(loss(draw))
    whole = loss([0, 1, 3])
    assert by_count[0] == [0.0]
    for count in (1, 2):
        assert sum(by_count[count]) / len(by_count[count]) == pytest.approx(whole, rel=1e-6)


def test_pairs_without_impact_are_left_out_whole():
    logprobs, kl, scored = batch_of([INVERT, PUNISH, INVERT], impact=[0.0, 3.0, 0.0])
    algorithm = TRACE(TRACESpec())
    batch, _ = algorithm.weigh(scored)
    assert batch.carries_weight(None, 0.0).tolist() == [False, False, True, True, False, False]
    # All are still counted where the mean is taken.
    assert_close(batch.weights, [0, 0, 1, 1, 0, 0], rtol=1e-7)
    rest = batch.select(batch.carries_weight(None, 0.0))
    keep, width = batch.carries_weight(None, 0.0), rest.mask.shape[1]
    whole = terms_of(algorithm, logprobs, kl, batch)
    part = terms_of(algorithm, logprobs[keep, :width], kl[keep, :width], rest)
    assert_close(part.losses, whole.losses[keep], rtol=1e-12)


def test_rows_that_only_take_part_have_no_loss_but_a_graph():
    logprobs, kl, scored = batch_of([INVERT], impact=[0.0])
    algorithm = TRACE(TRACESpec())
    batch, _ = algorithm.weigh(scored)
    keep = torch.tensor([True, False])
    one = batch.select(keep)
    logprobs = logprobs[keep, : one.mask.shape[1]].requires_grad_()
    terms = terms_of(algorithm, logprobs, kl[keep, : one.mask.shape[1]], one)
    assert terms.losses.tolist() == [0.0]
    assert terms.means == {}
    terms.losses.sum().backward()
    assert logprobs.grad is not None


def test_what_trace_cannot_do_without():
    logprobs, _, scored = batch_of([RETAIN])
    algorithm = build_algorithm(TRACESpec(), max_completion_length=8)
    assert isinstance(algorithm, TRACE)
    assert (algorithm.needs_reference, algorithm.reads_rows_together, algorithm.updates) == (True, True, 1)
    with pytest.raises(ValueError, match="reads the reference, but the batch has no ref_logprobs"):
        algorithm.weigh(replace(scored, ref_logprobs=None))
    with pytest.raises(ValueError, match="verdicts on two completions per prompt, got 1"):
        algorithm.weigh(replace(scored, rewards=torch.ones(2, 1)))
    with pytest.raises(ValueError, match="holds retained completions to π₀ by their KL, and got none"):
        algorithm.terms(TokenOutputs(logprobs), algorithm.weigh(scored)[0])
