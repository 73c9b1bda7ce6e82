"""Rollouts and specs made by hand, and a model's log-probabilities by definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dar.batch import FinishReason, Message, Prompt, Rollouts, TokenGroups, pad_rows
from dar.config.recipe import build_spec
from dar.config.run import RunSpec


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


def small_groups() -> TokenGroups:
    """Two prompts of 3 and 2 tokens, with completions of 4, 2 and 5."""
    ids, mask = pad_rows([[70, 71, 72, 0], [80, 81], [90, 91, 92, 93, 0]], pad_id=1)
    return TokenGroups(((10, 11, 12), (13, 14)), (2, 1), ids, mask)


def plain_logprobs(model: Any, groups: TokenGroups, temperature: float) -> torch.Tensor:
    """By definition: one row at a time, the model's own logits, no padding; 0 where the policy chose nothing."""
    result = torch.zeros(groups.mask.shape)
    for row, prompt in enumerate(groups.row_prompts()):
        length = int(groups.lengths[row])
        completion = groups.completion_ids[row, :length]
        ids = torch.cat([torch.tensor(prompt), completion]).unsqueeze(0)
        logprobs = (model(input_ids=ids, use_cache=False).logits[0].float() / temperature).log_softmax(-1)
        result[row, :length] = logprobs[len(prompt) - 1 : -1].gather(1, completion.unsqueeze(1)).squeeze(1)
    return result * groups.mask
