"""Specs of the methods on logits: LCO."""

from __future__ import annotations

from typing import Literal

from dar.config.algorithm import GroupSpec
from dar.config.base import Positive


class LCOSpec(GroupSpec):
    """Logits convex optimization (arXiv:2603.00963), with the completion's advantage on the sampled token.

    One update per batch, as in the authors' code: the target is then known from the sampled token alone.
    """

    type: Literal["lco"] = "lco"
    loss: Literal["kld", "mse", "logcosh"] = "kld"
    """KL to the target distribution, or squared or log-cosh distance of the sampled token's logit from its target."""
    beta: Positive = 2.0
    """Temperature of the target, π* ∝ π_t·exp(A/β)."""


AnyLogits = LCOSpec
