"""The ragged shared-prefix layout: one row of tokens, every prompt once, no padding.

    prompt₁  y₁₁ y₁₂ … y₁K  prompt₂  y₂₁ …

Position ids restart after the prompt for each completion. A completion's last token is left out: nothing reads the
state after it. Linear layers run on the flat row; only attention needs to know who sees whom, and looks at the same
tokens as a padded batch of *segments* (prompts, completions).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    group_rows: (start, stop) completion rows of each prompt.
    sources: [M] flat index of the state that predicts each sampled token, row-major over the mask.
    targets: [M] the sampled tokens.
    """

    ids: Tensor
    positions: Tensor
    prompts: Segments
    completions: Segments
    group_rows: tuple[tuple[int, int], ...]
    sources: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


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
    sources: list[int] = []
    group_rows: list[tuple[int, int]] = []
    row = 0
    for prompt, size in zip(groups.prompt_ids, groups.group_sizes, strict=True):
        prompt_spans.append((len(ids), len(prompt)))
        ids += prompt
        positions += range(len(prompt))
        prompt_end = len(ids) - 1
        group_rows.append((row, row + size))
        for _ in range(size):
            fed = lengths[row] - 1
            start = len(ids)
            row_spans.append((start, fed))
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
        group_rows=tuple(group_rows),
        sources=torch.tensor(sources),
        targets=groups.completion_ids[groups.mask],
    )


def pack_prompts(prompts: Sequence[Sequence[int]]) -> PackedGroups:
    """Prompts alone as one row: what the sampler reads first. `sources` are the prompts' last tokens."""
    starts = [0, *itertools.accumulate(len(prompt) for prompt in prompts)]
    nothing = Segments(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))
    return PackedGroups(
        ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.cat([torch.arange(len(prompt)) for prompt in prompts]),
        prompts=_segments([(start, len(prompt)) for start, prompt in zip(starts, prompts)]),
        completions=nothing,
        group_rows=((0, 0),) * len(prompts),
        sources=torch.tensor(starts[1:]) - 1,
        targets=torch.zeros(0, dtype=torch.int64),
    )


def packed_length(groups: TokenGroups) -> list[int]:
    """Tokens each group takes in the packed layout."""
    lengths, row, result = groups.lengths.tolist(), 0, []
    for prompt, size in zip(groups.prompt_ids, groups.group_sizes, strict=True):
        result.append(len(prompt) + sum(lengths[row : row + size]) - size)
        row += size
    return result


def _segments(spans: list[tuple[int, int]]) -> Segments:
    width = max(length for _, length in spans)
    starts = torch.tensor([start for start, _ in spans]).unsqueeze(1)
    lengths = torch.tensor([length for _, length in spans]).unsqueeze(1)
    offsets = torch.arange(width).unsqueeze(0)
    valid = offsets < lengths
    # An empty segment at the end of the row starts one past it; its padding must still point somewhere.
    last = max(start + length for start, length in spans) - 1
    return Segments((starts + torch.where(valid, offsets, 0)).clamp(max=last), valid)
