"""The frozen records that flow through a step, one type per stage.

    Prompt → Rollouts (sampled) → Experience (scored) → Weighted (ready to train on)

Shapes: P prompts, K completions per prompt, B = P·K rows, group-major (row p·K + k), T completion tokens,
right-padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Message = dict[str, Any]
"""One chat message: {"role": …, "content": …}."""

FinishReason = Literal["eos", "length", "stop"]
"""Why a completion ended: it sampled an end-of-sequence token, it ran out of room, or its text held a stop string
(training has none)."""


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

    def rows_of(self, start: int, stop: int) -> Tensor:
        """[B] bool: the rows of groups start…stop−1."""
        rows = torch.zeros(self.num_rows, dtype=torch.bool)
        rows[sum(self.group_sizes[:start]) : sum(self.group_sizes[:stop])] = True
        return rows

    def select(self, keep: Tensor) -> TokenGroups:
        """Only the rows where `keep` [B] is True, groups without any left out, trimmed to the longest completion.

        Raises:
            ValueError: no row is kept.
        """
        if not keep.any():
            raise ValueError("a batch needs at least one row")
        sizes = [int(part.sum()) for part in keep.split(list(self.group_sizes))]
        mask = self.mask[keep]
        longest = int(mask.sum(1).max())
        return TokenGroups(
            prompt_ids=tuple(ids for ids, size in zip(self.prompt_ids, sizes, strict=True) if size),
            group_sizes=tuple(size for size in sizes if size),
            completion_ids=self.completion_ids[keep, :longest],
            mask=mask[:, :longest],
        )


@dataclass(frozen=True)
class Rollouts:
    """What π_t sampled.

    prompts: P prompts.
    groups: the tokens, K completions per prompt.
    texts: B decoded completions, special tokens removed.
    logprobs: [B, T] fp32 nats under the distribution that sampled (temperature included), 0 where masked.
    finish_reasons: B of them.
    versions: B names of the weights that sampled, as the engine was given them; none where the data had them.
    """

    prompts: tuple[Prompt, ...]
    groups: TokenGroups
    texts: tuple[str, ...]
    logprobs: Tensor
    finish_reasons: tuple[FinishReason, ...]
    versions: tuple[int, ...] = ()

    @property
    def num_generations(self) -> int:
        return self.groups.num_rows // len(self.prompts)

    @property
    def has_eos(self) -> Tensor:
        """[B] bool: the completion ended by itself."""
        return torch.tensor([reason == "eos" for reason in self.finish_reasons])


@dataclass(frozen=True)
class TokenOutputs:
    """What one forward pass says about sampled tokens.

    logprobs: [B, T] fp32 nats under π_θ, 0 where masked.
    values: [B, T] fp32, the critic's V(s_t), or None where the module has no critic.
    logits: [B, T] fp32, the sampled token's logit (divided by the temperature), or None where nobody asked for it.
    ref_kl: [B, T] fp32 nats, KL(π₀‖π_θ) of each token's distribution, or None where no row is held to π₀; 0 in the
        other rows.
    """

    logprobs: Tensor
    values: Tensor | None = None
    logits: Tensor | None = None
    ref_kl: Tensor | None = None


@dataclass(frozen=True)
class Experience:
    """A scored batch: everything fixed before the update, nothing of it carries a gradient.

    groups: the tokens.
    old_logprobs: [B, T] fp32 nats under π_t, 0 where masked.
    ref_logprobs: [B, T] fp32 nats under π₀, or None for an algorithm that does not read the reference.
    rewards: [P, K] fp32, the weighted sum of the reward functions; NaN where a completion has none.
    has_eos: [B] bool.
    values: [B, T] fp32, the critic's V(s_t) before each token in reward units, or None for a method without a critic.
    labels: further [P, K] numbers of each completion by name: its single rewards, or what the data says of it.

    A method is given only the rows that have a reward (`scored_only`): B then counts the rewards, NaN left out.
    """

    groups: TokenGroups
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rewards: Tensor
    has_eos: Tensor
    values: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        return self.groups.mask

    def to_rows(self, table: Tensor) -> Tensor:
        """[P, K] → [B]: the entries of completions that have a reward."""
        return table[~self.rewards.isnan()]

    def to_table(self, rows: Tensor) -> Tensor:
        """[B] → [P, K], NaN where a completion has no reward."""
        table = rows.new_full(self.rewards.shape, torch.nan)
        table[~self.rewards.isnan()] = rows
        return table

    def scored_only(self) -> Experience:
        """Without the rows that have no reward; the table of rewards stays as it is.

        Raises:
            ValueError: no row has a reward.
        """
        keep = ~self.rewards.isnan().reshape(-1)
        if keep.all():
            return self
        groups = self.groups.select(keep)
        width = groups.mask.shape[1]
        return replace(
            self,
            groups=groups,
            old_logprobs=self.old_logprobs[keep, :width],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[keep, :width],
            has_eos=self.has_eos[keep],
            values=None if self.values is None else self.values[keep, :width],
        )


@dataclass(frozen=True)
class Weighted:
    """What an objective consumes: rows with fixed quantities, ready to train on.

    groups, old_logprobs, ref_logprobs: as in the experience (perhaps fewer rows).
    advantages: [B] fp32, or [B, T] where every token has its own.
    weights: [B] fp32 ≥ 0, the factor of the row's loss; a row of weight 0 contributes nothing.
    denominator: what the summed loss of the **global** batch is divided by; fixed before any backward pass.
    tokens: further [B, T] quantities a method has fixed, by name (PPO's returns, say).
    """

    groups: TokenGroups
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    denominator: float
    tokens: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.denominator > 0:
            raise ValueError(f"denominator must be > 0, got {self.denominator}")

    @property
    def mask(self) -> Tensor:
        return self.groups.mask

    def to(self, device: torch.device) -> Weighted:
        """The same batch with its tensors on another device."""
        groups = replace(
            self.groups, completion_ids=self.groups.completion_ids.to(device), mask=self.groups.mask.to(device)
        )
        return replace(
            self,
            groups=groups,
            old_logprobs=self.old_logprobs.to(device),
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs.to(device),
            advantages=self.advantages.to(device),
            weights=self.weights.to(device),
            tokens={name: values.to(device) for name, values in self.tokens.items()},
        )

    def select(self, keep: Tensor) -> Weighted:
        """Only the rows where `keep` [B] is True (the denominator stays that of the global batch)."""
        groups = self.groups.select(keep)
        width = groups.mask.shape[1]
        return replace(
            self,
            groups=groups,
            old_logprobs=self.old_logprobs[keep, :width],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[keep, :width],
            advantages=self.advantages[keep] if self.advantages.ndim == 1 else self.advantages[keep, :width],
            weights=self.weights[keep],
            tokens={name: values[keep, :width] for name, values in self.tokens.items()},
        )

    def among(self, experience: Experience) -> Weighted:
        """These rows among all rows of the batch they were scored in: the others get weight and advantage 0."""
        keep = ~experience.rewards.isnan().reshape(-1)
        if keep.all():
            return self
        shape = experience.mask.shape

        def spread(rows: Tensor) -> Tensor:
            full = rows.new_zeros(shape[: rows.ndim])
            full[(keep,) if rows.ndim == 1 else (keep, slice(rows.shape[1]))] = rows
            return full

        return replace(
            self,
            groups=experience.groups,
            old_logprobs=experience.old_logprobs,
            ref_logprobs=experience.ref_logprobs,
            advantages=spread(self.advantages),
            weights=spread(self.weights),
            tokens={name: spread(values) for name, values in self.tokens.items()},
        )

    def group_slice(self, start: int, stop: int) -> Weighted:
        """Groups start…stop−1."""
        return self.select(self.groups.rows_of(start, stop))

    def carries_weight(self, loads: Tensor | None, negligible_share: float) -> Tensor:
        """[B] bool: all rows but those of weight 0, and but the lightest by what they move.

        What is left out together moves at most `negligible_share` of what the batch would move if its tokens' parts
        were at right angles: Σ loads left out ≤ share · √(Σ loads²).

        Args:
            loads: [B, T] ≥ 0, the length of each token's part of the gradient, or None where it is not known.
            negligible_share: in [0, 1).
        """
        # Written so that what is not a number is kept: the loss then says so.
        keep = self.weights != 0
        if loads is None or negligible_share == 0:
            return keep
        rows = loads.double().sum(1)
        order = rows.argsort()
        keep[order] &= ~(rows[order].cumsum(0) <= negligible_share * loads.double().norm())
        return keep

    def split_by_tokens(self, max_tokens: int) -> list[Weighted]:
        """Micro-batches of whole groups, in order, as `split_by_tokens` says."""
        return [self.group_slice(start, stop) for start, stop in split_by_tokens(self.groups, max_tokens)]


def split_by_tokens(groups: TokenGroups, max_tokens: int) -> list[tuple[int, int]]:
    """Greedy (start, stop) ranges of whole groups with at most `max_tokens` tokens, each prompt counted once.

    A group larger than the budget stands alone: its completions share a prompt and are not torn apart.

    Raises:
        ValueError: max_tokens < 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    bounds: list[tuple[int, int]] = []
    start, total, row = 0, 0, 0
    lengths = groups.lengths().tolist()
    for index, (prompt, size) in enumerate(zip(groups.prompt_ids, groups.group_sizes, strict=True)):
        tokens = len(prompt) + sum(lengths[row : row + size])
        row += size
        if total and total + tokens > max_tokens:
            bounds.append((start, index))
            start, total = index, 0
        total += tokens
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
