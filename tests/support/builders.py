"""Batches made by hand: the maths reads log-probabilities, masks and rewards, and never the tokens themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from torch import Tensor

from dar.batch import Batch, TokenGroups, pad_rows

few = settings(max_examples=25, deadline=None)
"""Properties are checked on a few examples; the seeds in them are what hypothesis varies and shrinks."""


Values = Tensor | float | Sequence[float] | Sequence[Sequence[float]]


def f64(*values: float | Sequence[float]) -> Tensor:
    """Numbers, or rows of them, in double precision."""
    return torch.tensor(values, dtype=torch.float64)


def gradient(losses: Tensor, leaf: Tensor) -> Tensor:
    """d Σ losses / d leaf."""
    (grad,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    return grad


def assert_close(actual: Tensor, expected: Values, *, rtol: float, atol: float = 0.0) -> None:
    """Values within a stated tolerance; 1e-6 is eight ulp of fp32, and shapes must agree too."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), wanted.detach(), rtol=rtol, atol=atol)


def padded(
    rows: Sequence[Sequence[float]], *, padding: float = 0.0, extra: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Ragged rows as [B, T + extra], with `padding` wherever there is no token."""
    width = max(len(row) for row in rows) + extra
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=dtype)


def make_groups(lengths: Sequence[int], sizes: Sequence[int], prompts: Sequence[int], *, extra: int = 0) -> TokenGroups:
    """Completions of the given lengths in groups of the given sizes, for prompts of the given lengths.

    Every token id tells where it stands (row · 100 + column), so that a mix-up of rows shows.
    """
    ids, mask = pad_rows([[100 * row + t for t in range(length)] for row, length in enumerate(lengths)], pad_id=-1)
    return TokenGroups(
        prompt_ids=tuple(tuple(range(10 * index, 10 * index + length)) for index, length in enumerate(prompts)),
        group_sizes=tuple(sizes),
        completion_ids=torch.nn.functional.pad(ids, (0, extra), value=-1),
        mask=torch.nn.functional.pad(mask, (0, extra), value=False),
    )


def make_scored(
    rewards: Sequence[Sequence[float]],
    old: Sequence[Sequence[float]],
    ref: Sequence[Sequence[float]] | None = None,
    *,
    padding: float = 0.0,
    extra: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """A scored batch from ragged rows of token log-probabilities; padding and extra columns are not to be read."""
    num_prompts, num_generations = len(rewards), len(rewards[0])
    return Batch(
        groups=make_groups(
            [len(row) for row in old], [num_generations] * num_prompts, range(1, num_prompts + 1), extra=extra
        ),
        old_logprobs=padded(old, padding=padding, extra=extra, dtype=dtype),
        ref_logprobs=None if ref is None else padded(ref, padding=padding, extra=extra, dtype=dtype),
        rewards=torch.tensor(rewards, dtype=dtype),
        has_eos=torch.tensor([index % 2 == 0 for index in range(len(old))]),
    )


def golden_scored() -> Batch:
    """Two prompts with two completions each, of 2, 1, 3 and 2 tokens.

    LP_t = (−10, −11, −8, −15), LP_0 = (−12, −10, −8, −20), r = ((1, 3), (2, 2.5)).
    """
    return make_scored(
        rewards=[[1, 3], [2, 2.5]],
        old=[[-4, -6], [-11], [-1, -2, -5], [-7, -8]],
        ref=[[-7, -5], [-10], [-3, -1, -4], [-16, -4]],
    )


def random_rows(seed: int, num_rows: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Ragged rows of 1 to 6 token log-probabilities under π_θ, π_t and π₀, a little apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (num_rows,), generator=generator).tolist()
    current, old, ref = [], [], []
    for length in lengths:
        base = -3 * torch.rand(length, generator=generator)
        for rows in (current, old, ref):
            rows.append((base + 0.3 * torch.randn(length, generator=generator)).tolist())
    return current, old, ref


def random_rewards(seed: int, num_prompts: int, num_generations: int) -> list[list[float]]:
    """Gaussian rewards with a mean and a scale of each prompt's own."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.2 + torch.rand(num_prompts, 1, generator=generator)
    shift = torch.randn(num_prompts, 1, generator=generator)
    return (shift + scale * torch.randn(num_prompts, num_generations, generator=generator)).tolist()
