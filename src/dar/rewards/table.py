"""What the rewards of a batch said, and how it adds up to the number that is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from dar.advantages import is_tied
from dar.config.reward import RewardSpec

FAILED_FRACTION = "/failed_fraction"
"""End of the metric that says which share of a batch a reward failed for."""


def contribution(spec: RewardSpec, values: Tensor) -> Tensor:
    """A reward's part of the sum: its values clipped or compared, standardised, and weighted, in this order.

    Returns:
        fp64, of the same shape; NaN (does not apply) stays so.
    """
    shaped = values.double()
    if spec.clip is not None:
        shaped = shaped.clamp(*spec.clip)
    if spec.threshold is not None:
        shaped = torch.where(shaped.isnan(), shaped, (shaped >= spec.threshold).double())
    if spec.standardize:
        shaped = _standardized(shaped)
    return spec.weight * shaped


def _standardized(values: Tensor) -> Tensor:
    present = values[~values.isnan()]
    if len(present) == 0:
        return values
    # Written so that NaN stays NaN; (a + a + a) / 3 need not be a, so equal values are told apart beforehand.
    if is_tied(present.reshape(1, -1)):
        return values * 0.0
    return (values - present.mean()) / present.std(correction=0)


@dataclass(frozen=True)
class RewardTable:
    """What the rewards said.

    total: [P, K] fp32, Σ contributions of the rewards that apply to the row; NaN where one of them failed.
    parts: per reward, [P, K] fp32 as the function gave them, NaN where it does not apply (a mark, never a value to
        compute with).
    reported: what is told beside the scores, by metric name: what the reward functions said, and how many groups were
        sampled for these (`sampling.resample_tied`).
    contributions: per reward, [P, K] fp32, what it adds to the total; NaN where it does not apply.
    specs: per reward, how the one becomes the other.
    logged, extra: what reward functions logged: metrics by name, with the values of all calls, of which the mean
        counts, and columns by `<reward>/<name>`, with a value per completion.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)
    contributions: dict[str, Tensor] = field(default_factory=dict)
    specs: Mapping[str, RewardSpec] = field(default_factory=dict)
    logged: Mapping[str, list[float]] = field(default_factory=dict)
    extra: Mapping[str, list[Any]] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """`reward`, `reward_std` and `rewards/<name>/mean|std`, as TRL's GRPO trainer defines them.

        `reward_std` is the mean of the groups' sample standard deviations (of the batch's with one completion per
        prompt); a part's mean and std are over the rows it applies to. Completions without a reward count nowhere.
        """
        scored = self.total[~self.total.isnan()]
        if self.total.shape[1] == 1:
            spread = _sample_std(scored)
        else:
            groups = [group[~group.isnan()] for group in self.total]
            spreads = [_sample_std(group) for group in groups if len(group)]
            spread = sum(spreads) / len(spreads)
        found = {"reward": float(scored.mean()), "reward_std": spread}
        for name, values in self.parts.items():
            applies = values[~values.isnan()]
            if len(applies):
                found[f"rewards/{name}/mean"] = float(applies.mean())
                found[f"rewards/{name}/std"] = _sample_std(applies)
        return found | {name: sum(values) / len(values) for name, values in self.logged.items()} | self.reported

    def select(self, keep: Tensor) -> RewardTable:
        """Only the groups where `keep` [P] is True; what is standardised is standardised again, over these."""
        parts = {name: values[keep] for name, values in self.parts.items()}
        rows = keep.repeat_interleave(self.total.shape[1]).tolist()
        extra = {name: list(compress(values, rows)) for name, values in self.extra.items()}
        table = tally(parts, self.total[keep].isnan(), self.specs, self.reported)
        return replace(table, logged=self.logged, extra=extra)


def tally(
    parts: dict[str, Tensor], failed: Tensor, specs: Mapping[str, RewardSpec], reported: dict[str, float]
) -> RewardTable:
    """Adds the rewards up.

    Args:
        parts: per reward, [P, K] fp32, NaN where it does not apply.
        failed: [P, K] bool, completions that have no reward.
        specs: per reward.
        reported: passed on.
    """
    contributions = {name: contribution(specs[name], values) for name, values in parts.items()}
    total = torch.zeros(failed.shape, dtype=torch.float64)
    for values in contributions.values():
        total += values.nan_to_num(nan=0.0)
    total[failed] = math.nan
    rounded = {name: values.float() for name, values in contributions.items()}
    return RewardTable(total.float(), parts, reported, rounded, specs)


def join_tables(tables: Sequence[RewardTable]) -> RewardTable:
    """The tables of all ranks as one; what is standardised is standardised again, over the whole."""
    if len(tables) == 1:
        return tables[0]
    first, total = tables[0], torch.cat([table.total for table in tables])
    parts = {name: torch.cat([table.parts[name] for table in tables]) for name in first.parts}
    # Counts and percentiles of one rank's requests say little of another's: the first rank's stand. Shares of
    # completions are the batch's.
    shares = [name for name in first.reported if name.endswith(FAILED_FRACTION)]
    failed = {name: sum(table.reported[name] * len(table.total) for table in tables) for name in shares}
    reported = first.reported | {name: count / len(total) for name, count in failed.items()}
    if not first.specs:
        return RewardTable(total, parts, reported)  # read from the data, and not added up from parts
    logged, extra = dict[str, list[float]](), dict[str, list[Any]]()
    for name in (name for table in tables for name in table.logged):
        logged[name] = [value for table in tables for value in table.logged.get(name, ())]
    for name in (name for table in tables for name in table.extra):
        extra[name] = [value for table in tables for value in table.extra.get(name, [None] * table.total.numel())]
    return replace(tally(parts, total.isnan(), first.specs, reported), logged=logged, extra=extra)


def _sample_std(values: Tensor) -> float:
    """The sample standard deviation; 0 for a single value, which has no spread."""
    return float(values.std()) if len(values) > 1 else 0.0
