"""The columns of a table of completions: what is known of each, one row per completion."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dar.batch import Message, Rollouts, TokenGroups
from dar.rewards import RewardTable

TOKENS = ("tokens", "logprobs", "ref_logprobs")
"""The columns with a list in every row, an item for each token."""


def completion_columns(rollouts: Rollouts, rewards: RewardTable) -> dict[str, Any]:
    """One row per completion: prompt, text or image, length, ending, reward, its parts and what the data says of it."""
    prompts = [prompt for prompt in rollouts.prompts for _ in range(rollouts.num_generations)]
    known = {**rewards.parts, **rollouts.labels}
    return {
        "position": [prompt.position for prompt in prompts],
        "prompt": [prompt_text(prompt.content) for prompt in prompts],
        "completion": list(rollouts.texts),
        **({} if rollouts.images is None else {"image": pngs(rollouts.images)}),
        "length": rollouts.groups.lengths.tolist(),
        "finish_reason": list(rollouts.finish_reasons),
        "reward": rewards.total.flatten().tolist(),
        **{f"reward/{name}": values.flatten().tolist() for name, values in known.items()},
        **{f"contribution/{name}": values.flatten().tolist() for name, values in rewards.contributions.items()},
        **extra_columns(rewards),
    }


def sample_columns(
    rollouts: Rollouts,
    rewards: RewardTable,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    gold: RewardTable | None = None,
) -> dict[str, Any]:
    """As `completion_columns` and `token_columns`, each completion's drift, and what the held-out rewards said.

    Log-probabilities that are NaN (the data's, say) are nobody's knowledge, and left out.
    """
    columns = completion_columns(rollouts, rewards)
    logprobs = logprobs if logprobs is not None and logprobs.isfinite().all() else None
    if logprobs is not None and ref_logprobs is not None:
        columns["kl_ref"] = (logprobs - ref_logprobs).sum(1).tolist()
    if gold is not None:
        columns["gold"] = gold.total.flatten().tolist()
        columns |= {f"gold/{name}": values.flatten().tolist() for name, values in gold.parts.items()}
        columns |= extra_columns(gold)
    return columns | token_columns(rollouts.groups, logprobs, ref_logprobs, tokenizer)


def extra_columns(rewards: RewardTable) -> dict[str, list[Any]]:
    """What reward functions logged of each completion, `extra/<reward>/<name>`: truth values, numbers, or else text."""
    found = {f"extra/{name}": values for name, values in rewards.extra.items()}
    for name, values in found.items():
        kinds = {type(value) for value in values if value is not None}
        if not (kinds <= {bool} or kinds <= {int, float}):
            found[name] = [None if value is None else str(value).encode(errors="replace").decode() for value in values]
    return found


def token_columns(
    groups: TokenGroups, logprobs: Tensor | None, ref_logprobs: Tensor | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Each completion's tokens as text and what π_t and π₀ say of them, as far as that is known: lists of equal length.

    Args:
        groups: the completions, B rows.
        logprobs, ref_logprobs: [B, T] nats, or None.
        tokenizer: turns each token into its text behind another; one that is a part of a character becomes U+FFFD.
    """
    ids, mask = groups.completion_ids, groups.mask
    # Some tokenizers leave out the space that the first token of a text begins with.
    text = {
        token: str(tokenizer.decode([token, token])).removeprefix(str(tokenizer.decode([token])))
        for token in ids[mask].unique().tolist()
    }
    columns: dict[str, Any] = {
        "tokens": [[text[token] for token in row[keep].tolist()] for row, keep in zip(ids, mask, strict=True)]
    }
    for name, values in ("logprobs", logprobs), ("ref_logprobs", ref_logprobs):
        if values is not None:
            rows = [row[keep].tolist() for row, keep in zip(values, mask, strict=True)]
            columns[name] = pa.array(rows, type=pa.list_(pa.float32()))
    return columns


def pngs(images: Tensor) -> list[bytes]:
    """Each image of [B, C, H, W] in [−1, 1] as a PNG: in color where C is 3, else its channels' mean in grey."""
    from PIL import Image  # noqa: PLC0415 - comes with diffusers, whose models make images

    images = images if images.shape[1] == 3 else images.mean(1, keepdim=True)
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    files = [io.BytesIO() for _ in pixels]
    for file, each in zip(files, pixels, strict=True):
        Image.fromarray(each.squeeze(2).numpy()).save(file, "PNG")
    return [file.getvalue() for file in files]


def prompt_text(content: str | list[Message]) -> str:
    """A prompt for people: the string, or the conversation's last message."""
    return content if isinstance(content, str) else str(content[-1]["content"])
