"""What a trainer of TRL sampled, as records of this library: so it has the same metrics and tables of completions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dar.batch import FinishReason, Prompt, Rollouts, TokenGroups, pad_rows
from dar.rewards import RewardTable


class Row(NamedTuple):
    """A completion as its process has it.

    keep, ids: which of its tokens the policy chose, and these; what tools and users said is no part of the rest.
    weight: DAR's, None of other methods.
    rewards, gold: of each function, NaN where it does not apply.
    logprobs, ref_logprobs: nats of `ids` under the policy and π₀, None where TRL has not computed them.
    """

    prompt: str
    text: str
    has_ended: bool
    keep: Tensor
    ids: list[int]
    advantage: float
    weight: float | None
    rewards: list[float]
    gold: list[float]
    logprobs: Tensor | None
    ref_logprobs: Tensor | None


def sampled(rows: Sequence[Row], size: int) -> tuple[Rollouts, Tensor | None]:
    """Groups of `size` rows one behind the other as rollouts, log π_t NaN where not known, and log π₀ or None."""
    ids, mask = pad_rows([row.ids for row in rows], 0)
    prompts = tuple(Prompt(place, row.prompt, (), {}) for place, row in enumerate(rows[::size]))
    groups = TokenGroups(((),) * len(prompts), (size,) * len(prompts), ids, mask)
    logprobs, reference = _padded([row.logprobs for row in rows]), _padded([row.ref_logprobs for row in rows])
    logprobs = torch.full(ids.shape, math.nan) if logprobs is None else logprobs
    ends: tuple[FinishReason, ...] = tuple("eos" if row.has_ended else "length" for row in rows)
    return Rollouts(prompts, groups, tuple(row.text for row in rows), logprobs, ends), reference


def table(values: Sequence[list[float]], weights: Mapping[str, float], size: int) -> RewardTable:
    """Rewards by row and function, as TRL adds them up: with weights, over those that apply."""
    parts = dict(zip(weights, torch.tensor(values).T.reshape(len(weights), -1, size), strict=True))
    added = {name: weight * parts[name] for name, weight in weights.items()}
    each = torch.stack(list(added.values()))
    return RewardTable(torch.where(each.isnan().all(0), math.nan, each.nansum(0)), parts, contributions=added)


def shown(said: str | list[dict[str, Any]]) -> str:
    """A text or a message's text; where there is more (tools, images), each message as JSON on a line."""
    if isinstance(said, str):
        return said
    if len(said) == 1 and said[0].keys() == {"role", "content"} and isinstance(said[0]["content"], str):
        return said[0]["content"]
    return "\n".join(json.dumps(each, ensure_ascii=False, default=lambda _: "…") for each in said)


def _padded(rows: list[Any]) -> Tensor | None:
    return None if any(row is None for row in rows) else pad_sequence(rows, batch_first=True)
