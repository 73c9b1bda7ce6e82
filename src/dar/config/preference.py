"""Specs of the methods that compare two completions, online and offline."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dar.config.algorithm import AlgorithmSpec, GroupSpec, LoggedKind
from dar.config.base import Count, Positive


class PairedSpec(GroupSpec):
    """What methods that make pairs of their own samples share."""

    beta: Positive = 0.1
    """Scale of the log-ratio margin."""
    pairs: Literal["best_vs_worst", "first_two"] = "best_vs_worst"
    """Which two completions of a prompt are compared by reward. A tied pair is left out."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class OnlineDPOSpec(PairedSpec):
    """Online DPO (Guo et al. 2024, arXiv:2402.04792)."""

    type: Literal["online_dpo"] = "online_dpo"


class OnlineIPOSpec(PairedSpec):
    """IPO's loss on pairs of own samples."""

    type: Literal["online_ipo"] = "online_ipo"


class OnlineSLiCSpec(PairedSpec):
    """SLiC's hinge loss on pairs of own samples."""

    type: Literal["online_slic"] = "online_slic"


class LoggedPairsSpec(AlgorithmSpec):
    """What methods on the data's pairs share."""

    logged: ClassVar[LoggedKind | None] = "preferences"

    beta: Positive = 0.1
    """Scale of the log-ratio margin."""


class DPOSpec(LoggedPairsSpec):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    type: Literal["dpo"] = "dpo"


class IPOSpec(LoggedPairsSpec):
    """IPO (Azar et al. 2023, arXiv:2310.12036), on sums of log-probabilities."""

    type: Literal["ipo"] = "ipo"
    beta: Positive = 0.1
    """The margin is drawn to 1/(2β)."""


class SLiCSpec(LoggedPairsSpec):
    """The hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on the log-ratio margin."""

    type: Literal["slic"] = "slic"


class ChiPOSpec(LoggedPairsSpec):
    """χPO (Huang et al. 2024, arXiv:2407.13399): DPO with a link that also bounds the χ² divergence."""

    type: Literal["chi_po"] = "chi_po"
    beta: Positive = 0.05
    """Scale of the margin."""
    max_reward: Annotated[float, Field(gt=0)] = math.inf
    """The margin is clipped to ±2 of these; `.inf` = not."""


AnyPreference = OnlineDPOSpec | OnlineIPOSpec | OnlineSLiCSpec | DPOSpec | IPOSpec | SLiCSpec | ChiPOSpec
