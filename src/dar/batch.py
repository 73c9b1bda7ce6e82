"""The frozen records that flow through a step, one type per stage.

    Prompt → Rollouts (sampled) → Experience (scored) → Weighted (ready to train on)

Shapes: P prompts, K completions per prompt, B = P·K rows, group-major (row p·K + k), T completion tokens,
right-padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Message = dict[str, Any]
"""One chat message: {"role": …, "content": …}."""

FinishReason = Literal["eos", "length"]
"""Why a completion ended: it sampled an end-of-sequence token, or it ran out of room."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised.

    position: its place in the prompt stream (counting from 0 over all epochs); keys the sampler's random numbers.
    content: as the data had it, a string or a list of messages.
    token_ids: what the model reads, the chat template applied.
    columns: the data row's other columns, handed to reward functions.
    """

    position: int
    content: str | list[Message]
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class TokenGroups:
    """Prompts and their completions as tokens: all that a log-prob pass needs.

    prompt_ids: one tuple of token ids per group.
    group_sizes: completions of each group; they sum to B.
    completion_ids: [B, T] int64, right-padded (what the padding holds is never read).
    mask: [B, T] bool, True on sampled tokens, EOS included; at least one per row.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    group_sizes: tuple[int, ...]
    completion_ids: Tensor
    mask: Tensor

    @property
    def num_rows(self) -> int:
        return self.completion_ids.shape[0]

    def row_prompts(self) -> Iterator[tuple[int, ...]]:
        """The prompt's token ids of every row, in row order."""
        for prompt, size in zip(self.prompt_ids, self.group_sizes, strict=True):
            for _ in range(size):
                yield prompt

    def lengths(self) -> Tensor:
        """[B] completion tokens per row."""
        return self.mask.sum(1)

    def group_slice(self, start: int, stop: int) -> tuple[TokenGroups, slice]:
        """Groups start…stop−1 with their rows' slice, trimmed to their longest completion."""
        rows = slice(sum(self.group_sizes[:start]), sum(self.group_sizes[:stop]))
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        groups = TokenGroups(
            prompt_ids=self.prompt_ids[start:stop],
            group_sizes=self.group_sizes[start:stop],
            completion_ids=self.completion_ids[rows, :longest],
            mask=mask[:, :longest],
        )
        return groups, rows


@dataclass(frozen=True)
class Rollouts:
    """What π_t sampled.

    prompts: P prompts.
    groups: the tokens, K completions per prompt.
    texts: B decoded completions, special tokens removed.
    logprobs: [B, T] fp32 nats under the distribution that sampled (temperature included), 0 where masked.
    finish_reasons: B of them.
    """

    prompts: tuple[Prompt, ...]
    groups: TokenGroups
    texts: tuple[str, ...]
    logprobs: Tensor
    finish_reasons: tuple[FinishReason, ...]

    @property
    def num_generations(self) -> int:
        return self.groups.num_rows // len(self.prompts)

    @property
    def has_eos(self) -> Tensor:
        """[B] bool: the completion ended by itself."""
        return torch.tensor([reason == "eos" for reason in self.finish_reasons])


@dataclass(frozen=True)
class Experience:
    """A scored batch: everything fixed before the update, nothing of it carries a gradient.

    groups: the tokens.
    old_logprobs: [B, T] fp32 nats under π_t, 0 where masked.
    ref_logprobs: [B, T] fp32 nats under π₀, or None for an algorithm that does not read the reference.
    rewards: [P, K] fp32, the weighted sum of the reward functions.
    has_eos: [B] bool.
    """

    groups: TokenGroups
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rewards: Tensor
    has_eos: Tensor

    @property
    def mask(self) -> Tensor:
        return self.groups.mask


@dataclass(frozen=True)
class Weighted:
    """An experience with the fixed per-row quantities an objective consumes.

    advantages: [B] fp32.
    weights: [B] fp32 ≥ 0, the factor of the row's loss; a row of weight 0 contributes nothing.
    denominator: what the summed loss of the **global** batch is divided by; fixed before any backward pass.
    """

    experience: Experience
    advantages: Tensor
    weights: Tensor
    denominator: float

    def __post_init__(self) -> None:
        if not self.denominator > 0:
            raise ValueError(f"denominator must be > 0, got {self.denominator}")

    def to(self, device: torch.device) -> Weighted:
        """The same batch with its tensors on another device."""
        seen = self.experience
        groups = replace(
            seen.groups, completion_ids=seen.groups.completion_ids.to(device), mask=seen.groups.mask.to(device)
        )
        experience = Experience(
            groups=groups,
            old_logprobs=seen.old_logprobs.to(device),
            ref_logprobs=None if seen.ref_logprobs is None else seen.ref_logprobs.to(device),
            rewards=seen.rewards.to(device),
            has_eos=seen.has_eos.to(device),
        )
        return Weighted(experience, self.advantages.to(device), self.weights.to(device), self.denominator)

    def group_slice(self, start: int, stop: int) -> Weighted:
        """Groups start…stop−1 (the denominator stays that of the global batch)."""
        whole = self.experience
        groups, rows = whole.groups.group_slice(start, stop)
        width = groups.mask.shape[1]
        sizes = whole.rewards.shape[1]
        part = Experience(
            groups=groups,
            old_logprobs=whole.old_logprobs[rows, :width],
            ref_logprobs=None if whole.ref_logprobs is None else whole.ref_logprobs[rows, :width],
            rewards=whole.rewards.reshape(-1)[rows].reshape(-1, sizes),
            has_eos=whole.has_eos[rows],
        )
        return Weighted(part, self.advantages[rows], self.weights[rows], self.denominator)

    def split_by_tokens(self, max_tokens: int) -> list[Weighted]:
        """Micro-batches of whole groups, in order, each of at most `max_tokens` padded tokens.

        A group larger than the budget stands alone: its completions share a prompt and are not torn apart.
        """
        bounds = split_by_tokens(self.experience.groups, max_tokens)
        return [self.group_slice(start, stop) for start, stop in bounds]


def split_by_tokens(groups: TokenGroups, max_tokens: int) -> list[tuple[int, int]]:
    """Greedy (start, stop) group ranges whose padded size rows × (prompt + completion) stays within `max_tokens`.

    Raises:
        ValueError: max_tokens < 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    bounds: list[tuple[int, int]] = []
    start, rows, longest_prompt, longest_completion, row = 0, 0, 0, 0, 0
    lengths = groups.lengths().tolist()
    for index, (prompt, size) in enumerate(zip(groups.prompt_ids, groups.group_sizes, strict=True)):
        completion = max(lengths[row : row + size])
        row += size
        grown = (max(longest_prompt, len(prompt)), max(longest_completion, completion))
        if rows and (rows + size) * sum(grown) > max_tokens:
            bounds.append((start, index))
            start, rows, grown = index, 0, (len(prompt), completion)
        rows += size
        longest_prompt, longest_completion = grown
    bounds.append((start, len(groups.group_sizes)))
    return bounds


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pads token rows to ([B, T] int64 ids, [B, T] bool mask)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return ids, mask
