"""What each token moves, by the method's own loss, and where only rows of weight 0 may be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import assert_close, make_scored
from torch import Tensor

from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch
from dar.config.actor_critic import PPOSpec
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.logits import LCOSpec
from dar.config.policy_gradient import (
    BNPOSpec,
    CISPOSpec,
    DAOSpec,
    DPPOSpec,
    DrGRPOSpec,
    GRPOSpec,
    GSPOSpec,
    MaxRLSpec,
    R2VPOSpec,
    RLOOSpec,
)
from dar.config.regression import DARSpec, TPOSpec
from dar.config.squared import PMDMeanSpec

# Two prompts; the second's completions have the same reward.
OLD = [[-0.1, -2.0, -1.0], [-3.0], [-0.5, -0.25], [-1.5]]
REF = [[-0.3, -1.0, -1.5], [-3.5], [-0.5, -0.75], [-1.0]]
REWARDS = [[1.0, 0.0], [2.0, 2.0]]
A = 0.5 / (0.5**0.5 + 1e-4)
"""The standardised advantage of the first completion."""


def scored() -> Batch:
    return make_scored(REWARDS, OLD, REF, dtype=torch.float64)


def loads_of(spec: Any, given: Batch | None = None) -> Tensor | None:
    algorithm = build_algorithm(spec, max_completion_length=8)
    batch, _ = algorithm.weigh(given or scored())
    return algorithm.loads(batch)


def expected(slopes: list[list[float]]) -> Tensor:
    """|slope| · (1 − p) of each token."""
    rows = torch.zeros(4, 3, dtype=torch.float64)
    for row, (slope, old) in enumerate(zip(slopes, OLD, strict=True)):
        rows[row, : len(old)] = torch.tensor(slope) * (1 - torch.tensor(old, dtype=torch.float64).exp())
    return rows


@pytest.mark.parametrize(
    ("spec", "slopes"),
    [
        (RLOOSpec(beta=0.0), [[1.0] * 3, [1.0], [0.0] * 2, [0.0]]),
        (DrGRPOSpec(), [[0.5] * 3, [0.5], [0.0] * 2, [0.0]]),
        (PMDMeanSpec(updates=1), [[0.5] * 3, [0.5], [0.0] * 2, [0.0]]),
        (BNPOSpec(), [[A] * 3, [A], [0.0] * 2, [0.0]]),
        (GRPOSpec(beta=0.0), [[A / 3] * 3, [A], [0.0] * 2, [0.0]]),
        (GSPOSpec(), [[A / 3] * 3, [A], [0.0] * 2, [0.0]]),
        (CISPOSpec(updates=1), [[A] * 3, [A], [0.0] * 2, [0.0]]),
        (DPPOSpec(updates=1), [[A] * 3, [A], [0.0] * 2, [0.0]]),
        (MaxRLSpec(), [[1.0] * 3, [1.0], [0.0] * 2, [0.0]]),
    ],
    ids=lambda spec: getattr(spec, "type", ""),
)
def test_a_token_moves_its_share_of_the_advantage(spec: Any, slopes: list[list[float]]):
    assert_close(loads_of(spec), expected(slopes), rtol=1e-5, atol=1e-9)  # pyright: ignore[reportArgumentType]


def test_a_tied_row_moves_what_its_kl_does():
    """β (1 − π₀/π_t) / |y| is the slope of k3; π₀ and π_t say the same of the third row's first token."""
    loads = loads_of(GRPOSpec(beta=0.2))
    assert loads is not None
    slopes = [0.0, 0.1 * (1 - torch.tensor(-0.5).exp()), 0.2 * (torch.tensor(0.5).exp() - 1)]
    rooms = [1 - torch.tensor(old).exp() for old in (-0.5, -0.25, -1.5)]
    wanted = [float(slope * room) for slope, room in zip(slopes, rooms, strict=True)]
    assert_close(torch.stack([*loads[2, :2], loads[3, 0]]), wanted, rtol=1e-5, atol=1e-12)


def test_a_weighted_row_moves_its_weight():
    algorithm = build_algorithm(DARSpec(beta=0.5), max_completion_length=8)
    batch, _ = algorithm.weigh(scored())
    loads = algorithm.loads(batch)
    assert loads is not None
    assert_close(loads, expected([[w] * len(old) for w, old in zip(batch.weights.tolist(), OLD, strict=True)]),
                 rtol=1e-5)  # fmt: skip
    halved = algorithm.loads(replace(batch, weights=batch.weights / 2))
    assert halved is not None
    assert_close(halved, loads / 2, rtol=1e-9)


def test_a_logit_moves_by_itself():
    loads = loads_of(LCOSpec(loss="mse", beta=2.0))
    assert loads is not None
    # d/dz (z − z_t − A/β)² at z_t, without a factor of the token's probability.
    assert_close(loads, [[A] * 3, [A, 0, 0], [0] * 3, [0] * 3], rtol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        PPOSpec(updates=1),
        GRPOSpec(updates=2),
        DAOSpec(),
        DARSpec(updates=2),
        DARSpec(normalize_weights="group"),
        TPOSpec(),
        R2VPOSpec(updates=1, replay=1),
        CISPOSpec(),
        DPPOSpec(),
        MaxRLSpec(updates=2),
        *(spec() for name, spec in ALGORITHM_SPECS.items() if name.startswith("online_")),
    ],
    ids=lambda spec: spec.type,
)
def test_what_is_not_known_is_not_guessed(spec: Any):
    full = scored()
    assert loads_of(spec, replace(full, values=torch.zeros_like(full.old_logprobs))) is None


def test_nobody_knows_what_data_was_sampled_with():
    full = scored()
    unknown = replace(full, old_logprobs=torch.full_like(full.old_logprobs, torch.nan))
    for name in ("sft", "var", "qrpo"):
        assert loads_of(ALGORITHM_SPECS[name](), unknown) is None


def test_what_the_padding_holds_is_not_read():
    ragged = make_scored(REWARDS, OLD, REF, padding=torch.nan, extra=2, dtype=torch.float64)
    found, wanted = loads_of(GRPOSpec(), ragged), loads_of(GRPOSpec())
    assert found is not None
    assert wanted is not None
    assert_close(found, torch.nn.functional.pad(wanted, (0, 2)), rtol=1e-12)
