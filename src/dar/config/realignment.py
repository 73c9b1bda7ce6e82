"""Spec of the method that realigns old preference pairs to new rules."""

from __future__ import annotations

from typing import ClassVar, Literal

from dar.config.algorithm import AlgorithmSpec, LoggedKind
from dar.config.base import FunctionPath, NotNegative, Positive
from dar.config.data import SourceSpec


class TRACESpec(AlgorithmSpec):
    """TRACE (arXiv:2511.02623): old preference pairs, sorted by what new rules say of them."""

    logged: ClassVar[LoggedKind | None] = "verdicts"

    type: Literal["trace"] = "trace"
    beta: Positive = 0.3
    """KL weight of DPO on inverted and of NPO on punished pairs."""
    kl_coef: NotNegative = 0.1
    """Weight of KL(π₀‖π_θ) on retained pairs."""
    oracle: FunctionPath | None = None
    """`package.module:function`, called once with every completion, as a reward is: True where it complies with the new
    rules. Without one, the columns `chosen_complies` and `rejected_complies` say it."""
    gold: SourceSpec | None = None
    """Pairs that are right under the new rules (prompt, chosen, rejected): a conflicting pair weighs as much as its
    gradient agrees with theirs. Without them all weigh the same."""


AnyRealignment = TRACESpec
