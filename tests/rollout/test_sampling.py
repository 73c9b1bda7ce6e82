"""The counter-based stream of seeds, and the draw that survives rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import few

from dar.rollout.sampling import SamplingKey, draw, exponentials


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
    ("key", "prompt", "completion", "words"),
    [
        (SamplingKey(0), 0, 0, [0, 0]),
        (SamplingKey(1234, "heldout", 7), 5, 3, [1234, (1 << 56) + 7]),
        (SamplingKey(2**62 + 1, "sample", 3), 2, 1, [2**62 + 1, (2 << 56) + 3]),
    ],
)
def test_the_stream_never_changes(key: SamplingKey, prompt: int, completion: int, words: list[int]):
    # A block of four per counter value, counted from 1.
    blocks = [philox_4x64([index, 0, completion, prompt], words) for index in (1, 2)]
    seeds = [bits % 2**64 for bits in key.seeds(prompt, completion, 5).tolist()]
    assert seeds == [bits for block in blocks for bits in block][:5]


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
    numbers = key.seeds(prompt, completion, short + more)
    assert numbers.shape == (short + more,)
    assert numbers.dtype == torch.int64
    assert torch.equal(numbers[:short], SamplingKey(seed, "train", step).seeds(prompt, completion, short))


def test_every_part_of_the_key_gives_its_own_numbers():
    length = 2000
    streams = [
        key.seeds(prompt, completion, length)
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
    # Two streams that were one stream shifted would share numbers; 16 000 draws of 2⁶⁴ values share none by chance.
    everything = torch.cat(streams)
    assert everything.unique().numel() == everything.numel()
    # The correlation of independent streams has standard error 1/√n; 28 pairs stay within 4 of them.
    correlations = torch.corrcoef(torch.stack(streams).double()) - torch.eye(len(streams))
    assert correlations.abs().max() < 4 / math.sqrt(length)
    # Signed 64-bit numbers have mean −½ and standard deviation 2⁶⁴/√12.
    assert abs(everything.double().mean().item()) < 4 * 2**64 / math.sqrt(12 * everything.numel())


def test_training_is_the_purpose_and_zero_the_step_unless_said():
    assert torch.equal(SamplingKey(9).seeds(1, 2, 3), SamplingKey(9, "train", 0).seeds(1, 2, 3))


# --- the draw --------------------------------------------------------------------------------------------------------


def splitmix(seed: int, number: int) -> float:
    """Output `number` (from 0) of SplitMix64 seeded with `seed`, as an Exp(1) variable, in plain integers."""
    word = 2**64 - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return -math.log1p(-((z ^ (z >> 31)) // 2**12 + 0.5) * 2.0**-52)


def test_exponentials_are_those_of_splitmix():
    # SplitMix64 seeded with 0 begins with 0xE220A8397B1DCDAF (its published test vector).
    assert splitmix(0, 0) == -math.log1p(-(0xE220A8397B1DC + 0.5) * 2.0**-52)
    seeds, numbers = [0, 1, -1, -(2**63), 2**63 - 1], [0, 1, 255, 2**32, 2**32 + 191]
    found = exponentials(torch.tensor(seeds), torch.tensor(numbers))
    expected = [[splitmix(seed, number) for number in numbers] for seed in seeds]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def reference_draw(probabilities: list[float], seed: int) -> int:
    """The definition: the block whose sum over its own exponential is largest, then the token in it."""
    blocks = [probabilities[start : start + 256] for start in range(0, len(probabilities), 256)]
    block = max(range(len(blocks)), key=lambda b: math.fsum(blocks[b]) / splitmix(seed, 2**32 + b))
    tokens = range(256 * block, 256 * block + len(blocks[block]))
    return max(tokens, key=lambda token: probabilities[token] / splitmix(seed, token))


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 512, 1000])
def test_draws_agree_with_the_definition(vocabulary: int):
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = torch.softmax(3 * torch.randn(64, vocabulary, generator=generator), 1)
    seeds = SamplingKey(vocabulary).seeds(0, 0, 64)
    rows = zip(probabilities.tolist(), seeds.tolist(), strict=True)
    assert draw(probabilities, seeds).tolist() == [reference_draw(row, seed) for row, seed in rows]


@few
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(1, 800), density=st.floats(0.002, 1))
def test_tokens_without_probability_are_never_drawn(seed: int, vocabulary: int, density: float):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(40, vocabulary, generator=generator)
    probabilities[torch.rand(40, vocabulary, generator=generator) > density] = 0
    # Rows that do not sum to 1 are allowed, down to one smallest number that fp32 has.
    probabilities[torch.arange(40), torch.randint(vocabulary, (40,), generator=generator)] += 1.5e-45
    drawn = draw(probabilities, SamplingKey(seed).seeds(0, 0, 40))
    assert (probabilities[torch.arange(40), drawn] > 0).all()


def test_a_row_draws_the_same_token_alone_and_in_company():
    generator = torch.Generator().manual_seed(4)
    probabilities = torch.softmax(torch.randn(20, 1000, generator=generator), 1)
    seeds = SamplingKey(4).seeds(0, 0, 20)
    alone = [draw(probabilities[row : row + 1], seeds[row : row + 1]).item() for row in range(20)]
    assert draw(probabilities, seeds).tolist() == alone


def test_rounding_hardly_ever_draws_another_token():
    # Logits off by 1e-3: only draws whose best two perturbed log-probabilities are that near change, about one in a
    # thousand (37 of 40,000 with eight seeds). The inverse of the cumulative distribution changed 1,812 of these.
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(5_000, 2_000, generator=generator)
    noisy = logits + 1e-3 * torch.randn(logits.shape, generator=generator)
    seeds = SamplingKey(5).seeds(0, 0, len(logits))
    before, after = (draw(torch.softmax(values, 1), seeds) for values in (logits, noisy))
    assert 0 < (before != after).sum() < 20


def test_draws_follow_the_distribution():
    # χ² with 599 degrees of freedom has mean 599 and standard deviation √1198 = 34.6; the seed is fixed.
    vocabulary, draws = 600, 60_000
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.rand(vocabulary, generator=generator) + 0.2
    probabilities /= probabilities.sum()
    seeds = SamplingKey(0).seeds(0, 0, draws)
    drawn = torch.cat([draw(probabilities.expand(len(part), -1), part) for part in seeds.split(10_000)])
    expected = draws * probabilities.double()
    statistic = ((torch.bincount(drawn, minlength=vocabulary) - expected).square() / expected).sum().item()
    assert abs(statistic - (vocabulary - 1)) < 4 * math.sqrt(2 * (vocabulary - 1))
