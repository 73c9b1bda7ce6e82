"""The frozen records that flow through a step, one type per stage.

    Prompt → Rollouts (sampled) → Batch (scored) → Weighted (what a method decided about it)

Shapes: P prompts, K completions per prompt, B rows, group-major (row p·K + k; B = P·K unless rows were left out), T
completion tokens, right-padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from itertools import compress, pairwise
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from dar.ops import require_positive

Message = dict[str, Any]
"""One chat message: {"role": …, "content": …}."""

FinishReason = Literal["eos", "length", "stop"]
"""Why a completion ended: it sampled an end-of-sequence token, it ran out of room, or its text held a stop string
(training has none)."""

DERIVED: Tensor = cast("Tensor", None)
"""Default of a field that the others determine."""

TABLE = {"is_table": True}
"""Marks a field that speaks of the whole batch, [P, K] whichever rows are here."""


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
class Rows:
    """A record of tensors whose first dimension is rows and whose second, if any, is tokens; and of further such
    records, tensors by name, and whatever else, which stays as it is."""

    def map(self, rows: Callable[[Tensor], Tensor], tables: Callable[[Tensor], Tensor] = lambda table: table) -> Self:
        """The same record with other tensors: each of rows, and each [P, K] table."""
        return replace(
            self,
            **{
                each.name: _mapped(getattr(self, each.name), tables if each.metadata == TABLE else rows)
                for each in fields(self)
            },
        )

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on another device."""
        return self.map(lambda rows: rows.to(device), lambda table: table.to(device))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    match value:
        case Tensor():
            return change(value)
        case Rows():
            return value.map(change)
        case Mapping():
            return {name: change(each) for name, each in value.items()}
    return value


def joined(parts: Sequence[Any]) -> Any:
    """Tensors of rows, and tuples, mappings and records of such (rollouts, say), one behind the other as one.

    Padded to the longest completion. None stays None.
    """
    first = parts[0]
    match first:
        case Tensor() if first.ndim > 1:
            width = max(part.shape[1] for part in parts)
            return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
        case Tensor():
            return torch.cat(list(parts))
        case tuple():
            return tuple(each for part in parts for each in part)
        case Mapping():
            return {name: joined([part[name] for part in parts]) for name in first}
        case Rows():
            names = [each.name for each in fields(first)]
            return replace(first, **{name: joined([getattr(part, name) for part in parts]) for name in names})
    return first


@dataclass(frozen=True)
class TokenGroups(Rows):
    """Prompts and their completions as tokens: all that a log-prob pass needs.

    prompt_ids: one tuple of token ids per group.
    group_sizes: completions of each group; they sum to B.
    completion_ids: [B, T] int64, right-padded (what the padding holds is never read).
    mask: [B, T] bool, True on the policy's own choices, EOS included, and nowhere else: not on what a tool or a user
        said in between; at least one per row.
    lengths: [B] int64, how many tokens of a row exist, whosesoever; by default up to the policy's last one.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    group_sizes: tuple[int, ...]
    completion_ids: Tensor
    mask: Tensor
    lengths: Tensor = DERIVED

    is_discrete: ClassVar[bool] = True
    """A step is a choice among finitely many, whose logits a gradient's length is known in."""

    def __post_init__(self) -> None:
        if self.lengths is DERIVED:
            places = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
            object.__setattr__(self, "lengths", (self.mask * places).amax(1))

    @property
    def num_rows(self) -> int:
        return self.completion_ids.shape[0]

    def row_prompts(self) -> Iterator[tuple[int, ...]]:
        """The prompt's token ids of every row, in row order."""
        for prompt, size in zip(self.prompt_ids, self.group_sizes, strict=True):
            for _ in range(size):
                yield prompt

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
        prompts = tuple(ids for ids, size in zip(self.prompt_ids, sizes, strict=True) if size)
        kept = self.map(_selecting(keep, int(self.lengths[keep].max())))
        return replace(kept, prompt_ids=prompts, group_sizes=tuple(size for size in sizes if size))

    def split(self, max_tokens: int) -> list[Tensor]:
        """[B] bool each: the rows of micro-batches of whole groups, in order, by greedy choice.

        Each has at most `max_tokens` tokens, every prompt counted once. A group larger than that stands alone: its
        completions share a prompt and are not torn apart.

        Raises:
            ValueError: max_tokens < 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        bounds, total = [0], 0
        per_group = self.lengths.split(list(self.group_sizes))
        for index, (prompt, lengths) in enumerate(zip(self.prompt_ids, per_group, strict=True)):
            tokens = len(prompt) + int(lengths.sum())
            if total and total + tokens > max_tokens:
                bounds.append(index)
                total = 0
            total += tokens
        return [self.rows_of(*each) for each in pairwise([*bounds, len(self.group_sizes)])]


def _selecting(keep: Tensor, width: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows[keep] if rows.ndim == 1 else rows[keep, :width]


@dataclass(frozen=True)
class Rollouts(Rows):
    """What π_t sampled, or what the data brings in its place.

    prompts: P prompts.
    groups: the tokens, K completions per prompt.
    texts: B decoded completions, special tokens removed.
    logprobs: [B, T] fp32 nats under the distribution that sampled (temperature included), 0 where masked; NaN of the
        data's completions.
    finish_reasons: B of them.
    labels: [P, K] numbers that the data says of its completions, by name.
    versions: B names of the weights that sampled, as the engine was given them; none where the data had them.
    images: [B, C, H, W] fp32 in [−1, 1] (nearly), what the completions are where they are images, else None.
    """

    prompts: tuple[Prompt, ...]
    groups: TokenGroups
    texts: tuple[str, ...]
    logprobs: Tensor
    finish_reasons: tuple[FinishReason, ...]
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    versions: tuple[int, ...] = ()
    images: Tensor | None = None

    @property
    def num_generations(self) -> int:
        return self.groups.num_rows // len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the completions, and of each one's prompt."""
        return sum(map(len, self.groups.prompt_ids)) * self.num_generations + int(self.groups.lengths.sum())

    def select(self, keep: Tensor) -> Rollouts:
        """Only the groups where `keep` [P] is True. Raises ValueError where none is."""
        rows = keep.repeat_interleave(self.num_generations)
        groups, chosen = self.groups.select(rows), rows.tolist()
        return replace(
            self,
            prompts=tuple(compress(self.prompts, keep.tolist())),
            groups=groups,
            texts=tuple(compress(self.texts, chosen)),
            logprobs=self.logprobs[rows, : groups.mask.shape[1]],
            finish_reasons=tuple(compress(self.finish_reasons, chosen)),
            labels={name: table[keep] for name, table in self.labels.items()},
            versions=tuple(compress(self.versions, chosen)),
            images=None if self.images is None else self.images[rows],
        )

    @property
    def has_eos(self) -> Tensor:
        """[B] bool: the completion ended by itself."""
        return torch.tensor([reason == "eos" for reason in self.finish_reasons])

    def scored(
        self,
        rewards: Tensor,
        parts: Mapping[str, Tensor],
        *,
        ref_logprobs: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Batch:
        """With their rewards [P, K] (NaN where there is none), the parts these are made of, and what frozen passes
        said."""
        return Batch(
            groups=self.groups,
            old_logprobs=self.logprobs,
            ref_logprobs=ref_logprobs,
            rewards=rewards,
            has_eos=self.has_eos,
            values=values,
            labels={**parts, **self.labels},
        )


@dataclass(frozen=True)
class TokenOutputs:
    """What one forward pass says about sampled tokens.

    logprobs: [B, T] fp32 nats under π_θ, 0 where masked.
    values: [B, T] fp32, the critic's V(s_t), or None where the module has no critic.
    logits: [B, T] fp32, the sampled token's logit (divided by the temperature), or None where nobody asked for it.
    ref_kl: [B, T] fp32 nats, KL(π₀‖π_θ) of each token's distribution, or None where no row is held to π₀; 0 in the
        other rows.
    steps: further [B, T] quantities that a kind of policy knows of its steps, by name.
    """

    logprobs: Tensor
    values: Tensor | None = None
    logits: Tensor | None = None
    ref_kl: Tensor | None = None
    steps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch(Rows):
    """A scored batch: everything fixed before the update, nothing of it carries a gradient.

    groups: the tokens.
    old_logprobs: [B, T] fp32 nats under π_t, 0 where masked.
    ref_logprobs: [B, T] fp32 nats under π₀, or None for an algorithm that does not read the reference.
    rewards: [P, K] fp32, the weighted sum of the reward functions; NaN where a completion has none.
    has_eos: [B] bool.
    values: [B, T] fp32, the critic's V(s_t) before each token in reward units, or None for a method without a critic.
    labels: further [P, K] numbers of each completion by name: its single rewards, or what the data says of it.
    places: [B] int64, where in a [P, K] table each row is, counted row by row; by default all of it in order.

    A method is given only the rows that have a reward (`rewarded`). Tables are of the whole batch, whichever rows are
    here.
    """

    groups: TokenGroups
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rewards: Tensor = field(metadata=TABLE)
    has_eos: Tensor
    values: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict, metadata=TABLE)
    places: Tensor = DERIVED

    def __post_init__(self) -> None:
        if self.places is DERIVED:
            object.__setattr__(self, "places", torch.arange(self.groups.num_rows))

    @property
    def mask(self) -> Tensor:
        return self.groups.mask

    def to_rows(self, table: Tensor) -> Tensor:
        """[P, K] → [B]."""
        return table.flatten()[self.places]

    def to_table(self, rows: Tensor, *, absent: float = torch.nan) -> Tensor:
        """[B] → [P, K], `absent` where a row is not here."""
        table = rows.new_full(self.rewards.shape, absent)
        table.view(-1)[self.places] = rows
        return table

    def select(self, keep: Tensor) -> Self:
        """Only the rows where `keep` [B] is True; a denominator stays that of the global batch.

        Raises:
            ValueError: no row is kept.
        """
        groups = self.groups.select(keep)
        return replace(self.map(_selecting(keep, groups.mask.shape[1])), groups=groups)

    def rewarded(self) -> Self:
        """Only the rows that have a reward.

        Raises:
            ValueError: no row has one.
        """
        keep = ~self.to_rows(self.rewards).isnan()
        return self if keep.all() else self.select(keep)

    def weighted(
        self,
        advantages: Tensor,
        weights: Tensor,
        *,
        denominator: float | None = None,
        roles: Tensor | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> Weighted:
        """With what a method decided, in the words of `Weighted`; by default the rows' losses are averaged."""
        return Weighted(
            **vars(self),
            advantages=advantages,
            weights=weights,
            denominator=float(len(weights)) if denominator is None else denominator,
            roles=roles,
            tokens=tokens or {},
        )


class Role(IntEnum):
    """What a row is to a method that does not treat all alike."""

    NONE = 0
    CHOSEN = 1
    REJECTED = -1
    HELD = 2
    """To stay near π₀."""


@dataclass(frozen=True, kw_only=True)
class Weighted(Batch):
    """A batch and what a method decided about it: ready to train on.

    advantages: [B] fp32, or [B, T] where every token has its own.
    weights: [B] fp32, the factor of the row's loss, of either sign; a row of weight 0 contributes nothing.
    denominator: what the summed loss of the **global** batch is divided by; fixed before any backward pass.
    roles: [B] `Role` of each row, or None for a method that treats all alike.
    tokens: further [B, T] quantities a method has fixed, by name (PPO's returns, say).
    """

    advantages: Tensor
    weights: Tensor
    denominator: float
    roles: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(denominator=self.denominator)

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


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pads token rows to ([B, T] int64 ids, [B, T] bool mask)."""
    found = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=pad_id)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
