"""The counter-based stream of uniforms, and the inverse of the cumulative distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import few
from torch import Tensor

from dar.rollout.sampling import SamplingKey, inverse_cdf

NEARLY_ONE = 1 - 2.0**-53
"""The largest float64 below 1, and the largest uniform there is."""


def philox_4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox 4×64 on one counter (Salmon et al. 2011, fig. 4 and table 2), in plain integers."""
    word = 2**64 - 1
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ low, second & word, (first >> 64) ^ d ^ high, first & word
        low, high = (low + 0x9E3779B97F4A7C15) & word, (high + 0xBB67AE8584CAA73B) & word
    return [a, b, c, d]


def test_the_reference_philox_gives_its_authors_known_answer():
    # Random123's kat_vectors: philox4x64 10, counter 0, key 0.
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_4x64([0, 0, 0, 0], [0, 0]) == answer


@pytest.mark.parametrize(
    ("key", "prompt", "completion", "words", "expected"),
    [
        (SamplingKey(0), 0, 0, [0, 0],
         [0.011546754286331562, 0.24154919656271812, 0.11142585551493822, 0.5644146216071337, 0.5023796042735054]),
        (SamplingKey(1234, "heldout", 7), 5, 3, [1234, (1 << 56) + 7],
         [0.10437929670778201, 0.23545766072962226, 0.7801135428294614, 0.24615300105949212, 0.23492271589132208]),
        (SamplingKey(2**62 + 1, "sample", 3), 2, 1, [2**62 + 1, (2 << 56) + 3],
         [0.8290730331469603, 0.5485268432704586, 0.043234911156622036, 0.2197223341332769, 0.8435565010311656]),
    ],
)  # fmt: skip
def test_the_stream_never_changes(
    key: SamplingKey, prompt: int, completion: int, words: list[int], expected: list[float]
):
    # A block of four per counter value, counted from 1; the upper 53 bits of a word are the number.
    assert key.uniforms(prompt, completion, 5).tolist() == expected
    blocks = [philox_4x64([index, 0, completion, prompt], words) for index in (1, 2)]
    assert [(bits >> 11) * 2.0**-53 for block in blocks for bits in block][:5] == expected


@few
@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**6),
    prompt=st.integers(0, 10**9),
    completion=st.integers(0, 1000),
    short=st.integers(0, 40),
    more=st.integers(0, 40),
)
def test_longer_request_begins_with_the_same_numbers(
    seed: int, step: int, prompt: int, completion: int, short: int, more: int
):
    key = SamplingKey(seed, "train", step)
    numbers = key.uniforms(prompt, completion, short + more)
    assert numbers.shape == (short + more,)
    assert numbers.dtype == torch.float64
    assert torch.equal(numbers[:short], SamplingKey(seed, "train", step).uniforms(prompt, completion, short))
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_every_part_of_the_key_gives_its_own_numbers():
    length = 2000
    streams = [
        key.uniforms(prompt, completion, length)
        for key, prompt, completion in [
            (SamplingKey(5, "train", 2), 3, 1),
            (SamplingKey(6, "train", 2), 3, 1),
            (SamplingKey(5, "heldout", 2), 3, 1),
            (SamplingKey(5, "sample", 2), 3, 1),
            (SamplingKey(5, "train", 3), 3, 1),
            (SamplingKey(5, "train", 2), 4, 1),
            (SamplingKey(5, "train", 2), 3, 2),
            (SamplingKey(5, "train", 2), 1, 3),
        ]
    ]
    # Two streams that were one stream shifted would share numbers; 16 000 draws of 2⁵³ values share none by chance.
    everything = torch.cat(streams)
    assert everything.unique().numel() == everything.numel()
    # The correlation of independent streams has standard error 1/√n; 28 pairs stay within 4 of them.
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlations.abs().max() < 4 / math.sqrt(length)
    # Mean ½ with standard error √(1/12n).
    assert abs(everything.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / everything.numel())


def test_training_is_the_purpose_and_zero_the_step_unless_said():
    assert torch.equal(SamplingKey(9).uniforms(1, 2, 3), SamplingKey(9, "train", 0).uniforms(1, 2, 3))


# --- inverse CDF -----------------------------------------------------------------------------------------------------


def reference_draw(probabilities: Tensor, uniforms: Tensor) -> list[int]:
    """The definition in float64: the first token whose cumulative probability exceeds u · total."""
    cdf = np.cumsum(probabilities.double().numpy(), axis=1)
    thresholds = uniforms.numpy() * cdf[:, -1]
    return [int(np.searchsorted(row, u, side="right")) for row, u in zip(cdf, thresholds, strict=True)]


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 512, 1000])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_draws_agree_exactly_with_the_definition(vocabulary: int, zeros: float):
    # Whole numbers that sum to 2²⁰ add without rounding in fp32, so equality can be asked for on the boundaries too.
    generator = torch.Generator().manual_seed(vocabulary)
    counts = torch.randint(1, 1000, (64, vocabulary), generator=generator).double()
    counts[torch.rand(64, vocabulary, generator=generator) < zeros] = 0
    heaviest = torch.randint(vocabulary, (64,), generator=generator)
    counts[torch.arange(64), heaviest] += 2**20 - counts.sum(1)
    uniforms = torch.rand(64, dtype=torch.float64, generator=generator)
    boundaries = counts.cumsum(1)[torch.arange(64), torch.randint(vocabulary, (64,), generator=generator)] / 2**20
    just_below = torch.nextafter(boundaries, torch.zeros_like(boundaries))
    edges = torch.tensor([0.0, NEARLY_ONE], dtype=torch.float64).repeat(32)
    for u in (uniforms, boundaries.where(boundaries < 1, 0.0), just_below, edges):
        drawn = inverse_cdf(counts.float(), u)
        assert drawn.tolist() == reference_draw(counts, u)
        assert drawn.dtype == torch.int64


def test_draws_agree_with_the_definition_on_fp32_softmaxes():
    # The running sums differ by fp32 rounding, some 1e-7 of the total: only a uniform that near a boundary may differ.
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(500, 1000, generator=generator), 1)
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    cdf = probabilities.double().cumsum(1)
    distance = (cdf - uniforms.unsqueeze(1) * cdf[:, -1:]).abs().amin(1)
    safe = distance > 1e-6
    assert safe.sum() > 450
    drawn = inverse_cdf(probabilities, uniforms)
    assert drawn[safe].tolist() == reference_draw(probabilities[safe], uniforms[safe])


@few
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(1, 800), density=st.floats(0.002, 1))
def test_tokens_without_probability_are_never_drawn(seed: int, vocabulary: int, density: float):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(40, vocabulary, generator=generator)
    probabilities[torch.rand(40, vocabulary, generator=generator) > density] = 0
    probabilities[torch.arange(40), torch.randint(vocabulary, (40,), generator=generator)] += 0.1
    # Rows that do not sum to 1 are allowed.
    for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-24, NEARLY_ONE):
        drawn = inverse_cdf(probabilities, torch.full((40,), u, dtype=torch.float64))
        assert (probabilities[torch.arange(40), drawn] > 0).all()


@pytest.mark.parametrize("vocabulary", [200, 256, 600])
def test_uniform_next_to_one_draws_the_last_token_that_has_probability(vocabulary: int):
    # A block's fp32 sum may exceed the exact sum of its tokens, and so leave no token above the threshold.
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(100, vocabulary, generator=generator) + 0.01
    probabilities[:, -20:] = 0
    assert (probabilities.sum(1).double() > probabilities.double().sum(1)).any()
    drawn = inverse_cdf(probabilities, torch.full((100,), NEARLY_ONE, dtype=torch.float64))
    assert drawn.tolist() == [vocabulary - 21] * 100


def test_scale_of_a_row_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.rand(50, 300, generator=generator)
    uniforms = torch.rand(50, dtype=torch.float64, generator=generator)
    assert torch.equal(inverse_cdf(probabilities / 1024, uniforms), inverse_cdf(probabilities, uniforms))


def test_boundary_belongs_to_the_next_token():
    probabilities = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.5, 0.25]])
    uniforms = torch.tensor([0.9, 0.1, 0.25], dtype=torch.float64)
    # Cumulative (.25, .75, 1): .25 itself already belongs to the second token.
    assert inverse_cdf(probabilities, uniforms).tolist() == [0, 2, 1]


def test_a_row_draws_the_same_token_alone_and_in_company():
    generator = torch.Generator().manual_seed(4)
    probabilities = torch.softmax(torch.randn(20, 1000, generator=generator), 1)
    uniforms = torch.rand(20, dtype=torch.float64, generator=generator)
    alone = [inverse_cdf(probabilities[row : row + 1], uniforms[row : row + 1]).item() for row in range(20)]
    assert inverse_cdf(probabilities, uniforms).tolist() == alone


def test_draws_follow_the_distribution():
    # χ² with 599 degrees of freedom has mean 599 and standard deviation √1198 = 34.6; the seed is fixed.
    vocabulary, draws = 600, 60_000
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.rand(vocabulary, generator=generator) + 0.2
    probabilities /= probabilities.sum()
    uniforms = SamplingKey(0).uniforms(0, 0, draws)
    drawn = torch.cat([inverse_cdf(probabilities.expand(len(part), -1), part) for part in uniforms.split(10_000)])
    expected = draws * probabilities.double()
    statistic = ((torch.bincount(drawn, minlength=vocabulary) - expected).square() / expected).sum().item()
    assert abs(statistic - (vocabulary - 1)) < 4 * math.sqrt(2 * (vocabulary - 1))
