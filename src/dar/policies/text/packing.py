"""The ragged shared-prefix layout: one row of tokens, every prompt once, no padding.

    prompt₁  y₁₁ y₁₂ … y₁K  prompt₂  y₂₁ …

Position ids restart after the prompt for each completion. A completion's last token is left out: nothing reads the
state after it. Linear layers run on the flat row; only attention needs to know who sees whom, and looks at the same
tokens as a padded batch of *segments* (prompts, completions).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dar.batch import Rows, TokenGroups

Sight = Callable[[Tensor, Tensor], Tensor]
"""(positions of queries, of keys) -> which keys they see in their own row. In its place, None: all up to themselves."""


@dataclass(frozen=True)
class Segments(Rows):
    """Some stretches of the flat row as a right-padded batch.

    gather: [S, L] index into the flat row; padding points at the stretch's first token (its value is never used).
    valid: [S, L] bool, False on padding.
    """

    gather: Tensor
    valid: Tensor

    def pad(self, flat: Tensor) -> Tensor:
        """[N, …] → [S, L, …]."""
        return flat[self.gather]


@dataclass(frozen=True)
class PackedGroups(Rows):
    """A `TokenGroups` laid out as one row.

    ids, positions: [N] token ids and position ids.
    prompts: the P prompts as segments.
    completions: the B completions as segments (one that has a single token has an empty segment).
    starts: [N] flat index at which each token's prompt or completion begins.
    prefix_starts, prefix_lengths: [N] where the prompt of a completion's token lies; of a prompt's token, length 0.
    group_rows: (start, stop) completion rows of each prompt.
    longest: of the position ids, plus one.
    sources: [M] flat index of the state that predicts each sampled token, row-major over the mask.
    targets: [M] the sampled tokens.
    seen: who sees whom, in whatever form attention wants it; the same for all layers with one rule.
    """

    ids: Tensor
    positions: Tensor
    prompts: Segments
    completions: Segments
    starts: Tensor
    prefix_starts: Tensor
    prefix_lengths: Tensor
    group_rows: tuple[tuple[int, int], ...]
    longest: int
    sources: Tensor
    targets: Tensor
    seen: dict[tuple[Any, Sight | None], Any] = field(default_factory=dict, compare=False)

    @property
    def parts(self) -> tuple[Segments, Segments]:
        return self.prompts, self.completions

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def kept(self, make: Callable[[PackedGroups, Sight | None], Any], sight: Sight | None) -> Any:
        """`make(self, sight)`, made for the first layer that asks."""
        if (make, sight) not in self.seen:
            self.seen[make, sight] = make(self, sight)
        return self.seen[make, sight]

    def aligned(self, multiple: int) -> PackedGroups:
        """With tokens behind the others that only see each other and that nothing reads: the length is a multiple of
        `multiple`, and at least twice that, so that a compiled kernel meets few kinds of shapes."""
        missing = max(2 * multiple, -(-self.num_tokens // multiple) * multiple) - self.num_tokens
        fill = {"ids": 0, "positions": 0, "starts": self.num_tokens, "prefix_starts": 0, "prefix_lengths": 0}
        return replace(
            self, **{name: functional.pad(getattr(self, name), (0, missing), value=n) for name, n in fill.items()}
        )


def pack(groups: TokenGroups) -> PackedGroups:
    """Lays prompts and completions out as one row.

    Args:
        groups: B rows in P groups.

    Returns:
        N = Σ_p |prompt_p| + Σ_i (|y_i| − 1) tokens.
    """
    lengths, masks = groups.lengths.tolist(), groups.mask.tolist()
    completions = groups.completion_ids.tolist()
    ids: list[int] = []
    positions: list[int] = []
    prompt_spans: list[tuple[int, int]] = []
    row_spans: list[tuple[int, int]] = []
    # Of prompts and completions, in the order of the row.
    spans: list[tuple[int, int]] = []
    prefixes: list[tuple[int, int]] = []
    sources: list[int] = []
    group_rows: list[tuple[int, int]] = []
    row = 0
    for prompt, size in zip(groups.prompt_ids, groups.group_sizes, strict=True):
        prompt_span = (len(ids), len(prompt))
        prompt_spans.append(prompt_span)
        spans.append(prompt_span)
        prefixes.append((0, 0))
        ids += prompt
        positions += range(len(prompt))
        prompt_end = len(ids) - 1
        group_rows.append((row, row + size))
        for _ in range(size):
            fed = lengths[row] - 1
            start = len(ids)
            row_spans.append((start, fed))
            spans.append((start, fed))
            prefixes.append(prompt_span)
            ids += completions[row][:fed]
            positions += range(len(prompt), len(prompt) + fed)
            # The prompt's last state predicts the first token, each fed token's state the one after it.
            sources += itertools.compress([prompt_end, *range(start, start + fed)], masks[row])
            row += 1
    return PackedGroups(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        prompts=_segments(prompt_spans),
        completions=_segments(row_spans),
        **_places(spans, prefixes),
        group_rows=tuple(group_rows),
        longest=max(positions) + 1,
        sources=torch.tensor(sources),
        targets=groups.completion_ids[groups.mask],
    )


def pack_prompts(prompts: Sequence[Sequence[int]]) -> PackedGroups:
    """Prompts alone as one row: what the sampler reads first. `sources` are the prompts' last tokens."""
    starts = [0, *itertools.accumulate(len(prompt) for prompt in prompts)]
    spans = [(start, len(prompt)) for start, prompt in zip(starts, prompts)]
    nothing = Segments(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))
    return PackedGroups(
        ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.cat([torch.arange(len(prompt)) for prompt in prompts]),
        prompts=_segments(spans),
        completions=nothing,
        **_places(spans, [(0, 0)] * len(spans)),
        group_rows=((0, 0),) * len(prompts),
        longest=max(length for _, length in spans),
        sources=torch.tensor(starts[1:]) - 1,
        targets=torch.zeros(0, dtype=torch.int64),
    )


def _places(spans: list[tuple[int, int]], prefixes: list[tuple[int, int]]) -> dict[str, Any]:
    """What `PackedGroups` says of every token's own stretch and of its prompt's."""
    lengths = torch.tensor([length for _, length in spans])
    columns = [start for start, _ in spans], [start for start, _ in prefixes], [length for _, length in prefixes]
    names = ("starts", "prefix_starts", "prefix_lengths")
    return {name: torch.tensor(column).repeat_interleave(lengths) for name, column in zip(names, columns)}


def _segments(spans: list[tuple[int, int]]) -> Segments:
    width = max(length for _, length in spans)
    starts = torch.tensor([start for start, _ in spans]).unsqueeze(1)
    lengths = torch.tensor([length for _, length in spans]).unsqueeze(1)
    offsets = torch.arange(width).unsqueeze(0)
    valid = offsets < lengths
    # An empty segment at the end of the row starts one past it; its padding must still point somewhere.
    last = max(start + length for start, length in spans) - 1
    return Segments((starts + torch.where(valid, offsets, 0)).clamp(max=last), valid)
