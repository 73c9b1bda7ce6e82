"""Rollouts and specs made by hand, for tests that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dar.batch import FinishReason, Message, Prompt, Rollouts, TokenGroups, pad_rows
from dar.config import RunSpec
from dar.recipe import build_spec


def make_spec(**changes: Any) -> RunSpec:
    """The smallest recipe there is, with some keys replaced."""
    minimal: dict[str, Any] = {
        "model": "some/model",
        "data": "prompts.jsonl",
        "rewards": ["sentiment"],
        "steps": 3,
        "output_dir": "run",
    }
    return build_spec(minimal | changes, where="recipe.yaml")


def make_rollouts(
    completions: Sequence[Sequence[str]],
    *,
    ids: Sequence[Sequence[int]] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    finish_reasons: Sequence[FinishReason] | None = None,
    contents: Sequence[str | list[Message]] | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
) -> Rollouts:
    """One group per inner sequence of texts; tokens default to one per character, all sampled with certainty."""
    texts = [text for group in completions for text in group]
    rows = ids or [[ord(character) for character in text] for text in texts]
    completion_ids, mask = pad_rows(rows, pad_id=0)
    found = torch.zeros(mask.shape)
    for index, row in enumerate(logprobs or []):
        found[index, : len(row)] = torch.tensor(row)
    by_themselves: list[FinishReason] = ["eos" for _ in texts]
    prompts = tuple(
        Prompt(
            position=index,
            content=contents[index] if contents else f"prompt {index}",
            token_ids=(index + 1,),
            columns=columns[index] if columns else {},
        )
        for index in range(len(completions))
    )
    return Rollouts(
        prompts=prompts,
        groups=TokenGroups(
            prompt_ids=tuple(prompt.token_ids for prompt in prompts),
            group_sizes=tuple(len(group) for group in completions),
            completion_ids=completion_ids,
            mask=mask,
        ),
        texts=tuple(texts),
        logprobs=found,
        finish_reasons=tuple(finish_reasons or by_themselves),
    )
