"""Distillation on own samples: closed forms, every outcome of a small language, and TRL's losses."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import make_scored
from torch import Tensor

from dar.algorithms.policy_gradient import Distill
from dar.batch import TokenOutputs, Weighted
from dar.config.policy_gradient import DistillSpec
from dar.objectives.policy_gradient import dao_tokens, reverse_kl

NAN = math.nan
V = 3


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


OLD, TEACHER, CURRENT = rows([-1.0, -2.0, -0.5]), rows([-0.5, -2.5, -0.5]), rows([-0.7, -2.0, -1.0])
MASK = torch.ones(1, 3, dtype=torch.bool)


def test_value_and_slope_by_hand():
    current = CURRENT.clone().requires_grad_()
    found = reverse_kl(current, OLD, TEACHER, MASK)
    # ρ = e^.3, 1, e^−.5 and log(π_θ/π_T) = −.2, .5, −.5: L = ρ·log(π_θ/π_T) − (ρ − 1), of slope ρ·log(π_θ/π_T).
    ratio = rows([math.exp(0.3), 1.0, math.exp(-0.5)])
    drift = rows([-0.2, 0.5, -0.5])
    torch.testing.assert_close(found, ratio * drift - (ratio - 1))
    (slope,) = torch.autograd.grad(found.sum(), current)
    torch.testing.assert_close(slope, ratio * drift)


def test_at_the_policy_it_is_the_policy_gradient_of_the_teachers_advantage():
    """−Σ_t (log π_T − log π_t) ∇log π, and a value that is k1's estimate of the KL."""
    current = OLD.clone().requires_grad_()
    found = reverse_kl(current, OLD, TEACHER, MASK)
    torch.testing.assert_close(found, OLD - TEACHER)
    (slope,) = torch.autograd.grad(found.sum(), current)
    torch.testing.assert_close(slope, -(TEACHER - OLD))


def test_without_its_rewards_dao_has_the_same_loss_but_for_the_ratio():
    """DAO per token with α = β = 1 is ρ log(π_θ/π₀): its slope has a term ρ more, whose mean is 0."""
    slopes = []
    current = CURRENT.clone().requires_grad_()
    plain = dao_tokens(current, OLD, TEACHER, torch.zeros(1), MASK, alpha=1.0, beta=1.0)
    for loss in (plain, reverse_kl(current, OLD, TEACHER, MASK)):
        slopes += torch.autograd.grad(loss.sum(), current)
    torch.testing.assert_close(slopes[0] - slopes[1], (CURRENT - OLD).exp())


def test_padding_is_not_read():
    current = torch.cat((CURRENT, rows([NAN, 1e4])), 1).requires_grad_()
    others = [torch.cat((each, rows([NAN, -1e4])), 1) for each in (OLD, TEACHER)]
    found = reverse_kl(current, others[0], others[1], torch.tensor([[True] * 3 + [False] * 2]))
    assert found[:, 3:].tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(found[:, :3], reverse_kl(CURRENT, OLD, TEACHER, MASK))
    (slope,) = torch.autograd.grad(found.sum(), current)
    assert slope[:, 3:].tolist() == [[0.0, 0.0]]
    assert slope.isfinite().all()


def test_shapes_are_compared():
    with pytest.raises(ValueError, match="shape"):
        reverse_kl(CURRENT, OLD, TEACHER[:, :1], MASK)


# --- every outcome of a language of three tokens and completions of two ----------------------------------------------


class Language:
    """Two tokens, the second's distribution depending on the first: logits [V] and [V, V]."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((V,), (V, V))]

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.logits[0].log_softmax(-1), self.logits[1].log_softmax(-1)

    def of(self, texts: list[tuple[int, int]]) -> Tensor:
        """[N, 2]"""
        first, second = self.tables()
        return torch.stack([torch.stack((first[a], second[a, b])) for a, b in texts])


TEXTS = [(one, other) for one, other in product(range(V), repeat=2)]


@pytest.mark.parametrize("behaviour", [1, 3], ids=["the policy itself", "an earlier policy"])
def test_over_all_texts_it_is_the_kl_of_each_prefix_that_was_sampled(behaviour: int):
    """E_{y~π_t}[Σ_t L_t] = Σ_prefix π_t(prefix) KL(π_θ(·|prefix)‖π_T(·|prefix)), and so are their gradients."""
    policy, teacher, old = Language(1), Language(2), Language(behaviour)
    for logits in policy.logits:
        logits.requires_grad_()
    sampled = old.of(TEXTS).detach()
    losses = reverse_kl(policy.of(TEXTS), sampled, teacher.of(TEXTS), torch.ones(len(TEXTS), 2, dtype=torch.bool))
    expected = (sampled.sum(1).exp() * losses.sum(1)).sum()
    reach = (torch.ones(()), old.tables()[0].detach().exp())
    kls = [(one.exp() * (one - other)).sum(-1) for one, other in zip(policy.tables(), teacher.tables(), strict=True)]
    exact = torch.stack([(weight * kl).sum() for weight, kl in zip(reach, kls, strict=True)]).sum()
    torch.testing.assert_close(expected, exact)
    found, wanted = (torch.autograd.grad(each, policy.logits, retain_graph=True) for each in (expected, exact))
    for one, other in zip(found, wanted, strict=True):
        assert other.norm() > 0.01
        torch.testing.assert_close(one, other)


def test_trl_s_divergence_over_the_vocabulary_has_the_expected_gradient():
    """TRL's `beta=1` sums over the vocabulary what is sampled here: on all tokens of a position they are the same."""
    trainer: Any = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    logits, teacher = (torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    logits.requires_grad_()
    logprobs, other = logits.log_softmax(0), teacher.log_softmax(0)
    theirs = trainer._jsd_divergence(logprobs[None], other[None], 1).sum()
    old = logprobs.detach()[:, None]
    losses = reverse_kl(logprobs[:, None], old, other[:, None], torch.ones(V, 1, dtype=torch.bool))
    ours = (old.exp() * losses).sum()
    torch.testing.assert_close(ours, theirs)
    found, wanted = (torch.autograd.grad(each, logits, retain_graph=True) for each in (ours, theirs))
    torch.testing.assert_close(found, wanted)


# --- the method ------------------------------------------------------------------------------------------------------


def weighed(old: list[list[float]], teacher: list[list[float]], **keys: Any) -> Weighted:
    return Distill(DistillSpec()).weigh(make_scored([[NAN] * len(old)], old, teacher, dtype=torch.float64, **keys))[0]


RAGGED = ([[-1.0, -2.0, -0.5], [-1.5]], [[-0.5, -2.5, -0.5], [-0.25]])


def test_the_loss_is_the_mean_over_all_tokens_whatever_was_rewarded():
    batch = weighed(*RAGGED, padding=NAN)
    torch.testing.assert_close(batch.advantages, rows([0.5, -0.5, 0.0], [1.25, 0.0, 0.0]))
    assert (batch.weights.tolist(), batch.denominator) == ([1.0, 1.0], 4.0)
    losses = Distill(DistillSpec()).terms(TokenOutputs(batch.old_logprobs), batch).losses
    # −Σ A of each row
    torch.testing.assert_close(losses, torch.tensor([0.0, -1.25], dtype=torch.float64))


def test_the_gradient_is_of_the_log_probabilities_that_stand_for_the_policy():
    """In the first update those are the trainer's, and the sampler's of `weigh` no longer count."""
    batch = weighed([[-1.0, -2.0, -0.5]], [[-0.7, -2.0, -0.5]])
    own = batch.ref_logprobs.clone().requires_grad_()  # pyright: ignore[reportOptionalMemberAccess]
    batch = Weighted(**{**vars(batch), "old_logprobs": own.detach()})
    losses = Distill(DistillSpec()).terms(TokenOutputs(own), batch).losses
    (slope,) = torch.autograd.grad(losses.sum(), own)
    assert (losses.detach().tolist(), slope.tolist()) == ([0.0], [[0.0, 0.0, 0.0]])


def test_trl_s_sampled_loss_without_its_weights_has_the_same_gradient():
    """TRL 1.16's IW-OPD with γ = 0: −mean_t A_t log π_θ(y_t), of samples of the policy as it is."""
    trainer: Any = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    generator = torch.Generator().manual_seed(6)
    logits, teacher = (torch.randn(2, 3, V, dtype=torch.float64, generator=generator) for _ in range(2))
    tokens = torch.tensor([[0, 1, 2], [2, 0, 0]])
    mask = torch.tensor([[True] * 3, [True, False, False]])

    def taken(scores: Tensor) -> Tensor:
        return scores.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    logits.requires_grad_()
    this: Any = SimpleNamespace(temperature=1.0, iw_opd_gamma=0.0, iw_opd_epsilon=1e-8)
    this.model, this._metrics = SimpleNamespace(training=True), {"train": _Lists()}
    theirs = trainer.IWOPDTrainer._compute_iw_opd_loss(
        this, logits, tokens, tokens.masked_fill(~mask, -100), taken(teacher)
    )
    lists = [[row[keep].tolist() for row, keep in zip(each.detach(), mask)] for each in (taken(logits), taken(teacher))]
    batch = weighed(*lists)
    ours = Distill(DistillSpec()).terms(TokenOutputs(taken(logits)), batch).losses.sum() / batch.denominator
    found, wanted = (torch.autograd.grad(each, logits)[0] for each in (ours, theirs))
    torch.testing.assert_close(found, wanted)


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])
