"""Drawing tokens: seeds from a counter-based stream, and the largest of the perturbed probabilities.

One seed per token, keyed by what the token *is* — (seed, purpose and step, prompt, completion, position) — and not
by when it was drawn: the same numbers whatever the batch's composition, the number of ranks, or the point a run was
resumed from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_PURPOSES = {"train": 0, "heldout": 1, "sample": 2, "calibration": 3}
_BLOCK = 256
_FIRST_BLOCK = 1 << 32
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""SplitMix64's increment and multipliers, as int64."""


@dataclass(frozen=True)
class SamplingKey:
    """Names a stream of random numbers.

    seed: of the run.
    purpose: training and evaluation never share numbers.
    step: the batch; held-out evaluations keep one step, so that before and after use the same numbers.
    """

    seed: int
    purpose: Literal["train", "heldout", "sample", "calibration"] = "train"
    step: int = 0

    def seeds(self, prompt: int, completion: int, length: int) -> Tensor:
        """[length] int64, any 64 bits: the seeds of completion `completion` of the prompt at stream position `prompt`,
        one per token position.

        Philox 4×64 (Salmon et al. 2011), keyed by (seed, purpose and step), its counter started at (prompt,
        completion): a longer request begins with the same numbers.
        """
        key = np.array([self.seed, (_PURPOSES[self.purpose] << 56) | self.step], dtype=np.uint64)
        counter = np.array([0, 0, completion, prompt], dtype=np.uint64)
        return torch.from_numpy(np.random.Philox(key=key, counter=counter).random_raw(length).view(np.int64))


def draw(probabilities: Tensor, seeds: Tensor) -> Tensor:
    """One token per row, from its distribution: argmax_i p_i / E_i with an exponential E_i for every token i.

    That is Gumbel-max (log p_i − log E_i is log p_i plus Gumbel noise), done in two levels, which is exact all the
    same: the block is the argmax of (Σ p_i over its 256 tokens) / E_block, then the token that of p_i / E_i in it. So
    a row costs a few hundred exponentials and not one for every token. Rounding of the probabilities, as another batch
    shape brings it, turns the choice only where the best two are that near; the inverse of the cumulative distribution
    moves every boundary by the rounding of all tokens before it.

    Args:
        probabilities: [R, V] ≥ 0, fp32; rows need not sum to exactly 1.
        seeds: [R] int64.

    Returns:
        [R] int64 token ids. A token of probability 0 is never drawn.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary % _BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, -vocabulary % _BLOCK))
    blocks = probabilities.view(rows, -1, _BLOCK)
    numbers = torch.arange(blocks.shape[1], device=seeds.device)
    # Tokens and blocks are numbered apart, so that none shares its exponential with another.
    block = (blocks.sum(-1) / exponentials(seeds, numbers + _FIRST_BLOCK)).argmax(1, keepdim=True)
    token = block * _BLOCK + torch.arange(_BLOCK, device=seeds.device)
    inside = blocks[torch.arange(rows, device=seeds.device), block.squeeze(1)]
    return token.gather(1, (inside / exponentials(seeds, token)).argmax(1, keepdim=True)).squeeze(1)


def exponentials(seeds: Tensor, numbers: Tensor) -> Tensor:
    """Independent Exp(1) variables, each a function of its row's seed and its number alone.

    SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195) from the row's seed; of its output the upper 52
    bits are a uniform u in (0, 1), and E = −log(1 − u).

    Args:
        seeds: [R] int64.
        numbers: [N], or [R, N]: int64 ≥ 0.

    Returns:
        [R, N] float64 in (0, 37): as exact near 0, where they decide, as anywhere.
    """
    bits = seeds.unsqueeze(1) + (numbers + 1) * _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    bits = _shifted(bits ^ _shifted(bits, 31), 12)
    return -torch.log1p(-(bits.double() + 0.5) * 2.0**-52)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """A logical shift to the right; that of a signed integer would draw its sign along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
