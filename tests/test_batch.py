"""The records that flow through a step: slicing, splitting, padding."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import few, golden_scored, make_groups, make_scored, random_rewards, random_rows
from support.handmade import make_rollouts

from dar.batch import Prompt, Rollouts, TokenGroups, Weighted, joined, pad_rows


def golden_weighted() -> Weighted:
    advantages, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    return golden_scored().weighted(advantages, weights, tokens={"returns": golden_scored().old_logprobs - 1})


# Rows of lengths (2, 4), (1), (3, 1, 2) under prompts of 3, 5 and 2 tokens.
RAGGED = make_groups([2, 4, 1, 3, 1, 2], [2, 1, 3], [3, 5, 2])


# --- token groups ----------------------------------------------------------------------------------------------------


def test_every_row_knows_its_prompt_and_its_length():
    first, second, third = RAGGED.prompt_ids
    assert RAGGED.num_rows == 6
    assert list(RAGGED.row_prompts()) == [first, first, second, third, third, third]
    assert RAGGED.lengths.tolist() == [2, 4, 1, 3, 1, 2]


def test_a_row_is_as_long_as_what_is_in_it_and_not_as_what_the_policy_chose():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    ids = torch.arange(8).reshape(2, 4)
    assert TokenGroups(((1,),), (2,), ids, mask).lengths.tolist() == [3, 2]
    longer = TokenGroups(((1,),), (2,), ids, mask, torch.tensor([4, 2]))
    assert longer.select(torch.tensor([True, False])).mask.shape == (1, 4)
    assert longer.select(torch.tensor([False, True])).mask.tolist() == [[False, True]]


def test_groups_that_do_not_match_their_sizes_are_an_error():
    broken = TokenGroups(RAGGED.prompt_ids, (2, 1), RAGGED.completion_ids, RAGGED.mask)
    with pytest.raises(ValueError, match="zip"):
        list(broken.row_prompts())


def test_selecting_groups_keeps_them_whole_and_trims_them():
    rows = RAGGED.rows_of(1, 3)
    assert rows.tolist() == [False, False, True, True, True, True]
    part = RAGGED.select(rows)
    assert part.prompt_ids == RAGGED.prompt_ids[1:]
    assert part.group_sizes == (1, 3)
    assert part.completion_ids.tolist() == [[200, -1, -1], [300, 301, 302], [400, -1, -1], [500, 501, -1]]
    assert part.mask.sum(1).tolist() == [1, 3, 1, 2]
    assert part.mask.shape == (4, 3)
    assert RAGGED.rows_of(2, 3).tolist() == [False, False, False, True, True, True]


def test_selecting_rows_leaves_ragged_groups_and_drops_empty_ones():
    part = RAGGED.select(torch.tensor([True, False, False, False, True, True]))
    assert part.prompt_ids == (RAGGED.prompt_ids[0], RAGGED.prompt_ids[2])
    assert part.group_sizes == (1, 2)
    assert part.completion_ids.tolist() == [[0, 1], [400, -1], [500, 501]]


def test_selecting_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        RAGGED.select(torch.zeros(6, dtype=torch.bool))


# --- rollouts and scored -----------------------------------------------------------------------------------------


def test_rollouts_say_how_many_completions_a_prompt_has_and_which_ended():
    rollouts = Rollouts(
        prompts=tuple(Prompt(position, "?", (1, 2), {}) for position in range(2)),
        groups=golden_scored().groups,
        texts=("a", "b", "c", "d"),
        logprobs=golden_scored().old_logprobs,
        finish_reasons=("eos", "length", "length", "eos"),
    )
    assert rollouts.num_generations == 2
    assert rollouts.has_eos.tolist() == [True, False, False, True]


def test_rollouts_and_rewards_make_a_batch():
    rollouts = make_rollouts([["a", "bb"], ["ccc", "d"]], finish_reasons=["eos", "length", "eos", "eos"])
    rollouts = replace(rollouts, labels={"impact": torch.tensor([[1.0, 1.0], [2.0, 2.0]])})
    rewards = torch.tensor([[1.0, math.nan], [3.0, 4.0]])
    batch = rollouts.scored(rewards, {"length": rewards}, ref_logprobs=rollouts.logprobs - 1)
    assert batch.groups is rollouts.groups
    assert batch.mask is batch.groups.mask
    assert batch.old_logprobs is rollouts.logprobs
    assert batch.has_eos.tolist() == [True, False, True, True]
    assert list(batch.labels) == ["length", "impact"]
    assert batch.values is None
    assert batch.places.tolist() == [0, 1, 2, 3]


def test_joined_rows_are_padded_to_the_longest():
    one = make_rollouts([["a", "bb"]], logprobs=[[-1], [-2, -3]])
    other = make_rollouts([["ccc", "d"]], logprobs=[[-4, -5, -6], [-7]], finish_reasons=["length", "eos"])
    one, other = (replace(each, labels={"x": each.logprobs[:, :1].T}) for each in (one, other))
    both = joined([one, other])
    assert both.groups.prompt_ids == ((1,), (1,))
    assert both.groups.group_sizes == (2, 2)
    assert both.groups.lengths.tolist() == [1, 2, 3, 1]
    assert both.groups.mask.sum(1).tolist() == [1, 2, 3, 1]
    assert both.logprobs.tolist() == [[-1, 0, 0], [-2, -3, 0], [-4, -5, -6], [-7, 0, 0]]
    assert both.texts == ("a", "bb", "ccc", "d")
    assert both.finish_reasons == ("eos", "eos", "length", "eos")
    assert both.labels["x"].tolist() == [[-1, -2], [-4, -7]]
    assert joined([None, None]) is None


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_denominator_must_be_positive(denominator: float):
    with pytest.raises(ValueError, match="denominator must be > 0"):
        golden_scored().weighted(torch.ones(4), torch.ones(4), denominator=denominator)


def test_selecting_takes_every_field_of_the_rows_and_keeps_what_is_the_batches():
    whole = golden_weighted()
    part = whole.select(torch.tensor([False, False, False, True]))
    assert part.ref_logprobs is not None
    assert part.groups.completion_ids.tolist() == [[300, 301]]
    assert part.groups.lengths.tolist() == [2]
    assert part.old_logprobs.tolist() == [[-7, -8]]
    assert part.ref_logprobs.tolist() == [[-16, -4]]
    assert part.tokens["returns"].tolist() == [[-8, -9]]
    assert part.advantages.tolist() == [4]
    assert part.weights.tolist() == pytest.approx([0.4])
    assert part.has_eos.tolist() == [False]
    # The reward is still where it was.
    assert part.denominator == 4.0
    assert part.rewards is whole.rewards
    assert part.to_rows(part.rewards).tolist() == [2.5]
    assert part.to_table(part.advantages, absent=0.0).tolist() == [[0, 0], [0, 4]]


def test_moving_to_a_device_moves_every_tensor():
    moved = replace(golden_weighted(), labels={"x": torch.ones(2, 2)}).to(torch.device("meta"))
    groups = moved.groups
    tensors = [moved.tokens["returns"], moved.labels["x"], *vars(moved).values(), *vars(groups).values()]
    kinds = [tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)]
    assert kinds == ["meta"] * 12
    assert moved.denominator == 4.0
    assert groups.prompt_ids == golden_scored().groups.prompt_ids


LOADS = torch.tensor([[0.1, 0.2, 0.0], [0.1, 0.0, 0.0], [2.0, 0.0, 1.0], [0.0, 4.0, 0.0]])


def test_rows_that_together_move_a_negligible_share_are_left_out():
    # Row by row .3, .1, 3, 4; the root of all squares is √(.01 + .04 + .01 + 4 + 1 + 16) = √21.06.
    batch, norm = golden_weighted(), math.sqrt(21.06)
    assert batch.carries_weight(LOADS, 0.0).tolist() == [True, True, True, True]
    assert batch.carries_weight(LOADS, 0.1 / norm - 1e-6).tolist() == [True, True, True, True]
    assert batch.carries_weight(LOADS, 0.1 / norm + 1e-6).tolist() == [True, False, True, True]
    assert batch.carries_weight(LOADS, 0.4 / norm - 1e-6).tolist() == [True, False, True, True]
    assert batch.carries_weight(LOADS, 0.4 / norm + 1e-6).tolist() == [False, False, True, True]


@pytest.mark.parametrize("loads", [LOADS, None])
def test_rows_of_weight_zero_carry_nothing(loads: torch.Tensor | None):
    batch = golden_scored().weighted(torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert batch.carries_weight(loads, 0.0).tolist() == [False, True, False, True]
    assert batch.carries_weight(loads, 1e-6).tolist() == [False, True, False, True]


def test_what_is_not_a_number_is_kept_for_the_loss_to_refuse():
    batch = golden_scored().weighted(torch.ones(4), torch.tensor([0.0, math.nan, 1.0, 1.0]))
    assert batch.carries_weight(None, 1e-4).tolist() == [False, True, True, True]
    assert batch.carries_weight(LOADS * math.nan, 1e-4).tolist() == [False, True, True, True]


# --- micro-batches ---------------------------------------------------------------------------------------------------


def parts(groups: TokenGroups, max_tokens: int) -> list[int]:
    """How many groups each micro-batch has."""
    return [len(groups.select(rows).group_sizes) for rows in groups.split(max_tokens)]


@pytest.mark.parametrize(
    ("max_tokens", "sizes"),
    # Each prompt once: group 0 has 3+2+4 = 9 tokens, group 1 has 5+1 = 6, group 2 has 2+3+1+2 = 8.
    [(1, [1, 1, 1]), (13, [1, 1, 1]), (14, [1, 2]), (15, [2, 1]), (22, [2, 1]), (23, [3])],
)
def test_micro_batches_at_known_budgets(max_tokens: int, sizes: list[int]):
    assert parts(RAGGED, max_tokens) == sizes


def test_a_closed_micro_batch_does_not_count_against_the_next():
    # After the long group 0 (1+9 = 10) is closed, 1 and 2 are 4 together, not 14.
    assert parts(make_groups([9, 1, 1], [1, 1, 1], [1, 1, 1]), 10) == [1, 2]


def test_what_others_said_takes_room_too():
    mask = RAGGED.mask.clone()
    mask[1, 1:3] = False
    assert parts(replace(RAGGED, mask=mask), 14) == [1, 2]


@few
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    prompts=st.lists(st.integers(1, 9), min_size=8, max_size=8),
    max_tokens=st.integers(1, 120),
)
def test_micro_batches_are_whole_groups_in_order_within_the_budget(
    lengths: list[int], prompts: list[int], max_tokens: int
):
    groups = make_groups([length for length in lengths for _ in range(2)], [2] * len(lengths), prompts[: len(lengths)])

    def tokens(start: int, stop: int) -> int:
        return sum(prompts[start:stop]) + 2 * sum(lengths[start:stop])

    bounds = list(pairwise(accumulate(parts(groups, max_tokens), initial=0)))
    assert torch.equal(torch.stack(groups.split(max_tokens)).sum(0), torch.ones(groups.num_rows, dtype=torch.int64))
    assert bounds[-1][1] == len(lengths)
    assert all(stop - start == 1 or tokens(start, stop) <= max_tokens for start, stop in bounds)
    # Greedy: the next group would not have fitted.
    assert all(tokens(start, stop + 1) > max_tokens for start, stop in bounds[:-1])


@few
@given(seed=st.integers(0, 10_000), num_prompts=st.integers(1, 5), max_tokens=st.integers(1, 100))
def test_micro_batches_together_are_the_whole(seed: int, num_prompts: int, max_tokens: int):
    _, old, ref = random_rows(seed, 3 * num_prompts)
    rows = torch.arange(3.0 * num_prompts)
    batch = make_scored(random_rewards(seed, num_prompts, 3), old, ref).weighted(rows, rows + 100)
    parts = [batch.select(rows) for rows in batch.groups.split(max_tokens)]
    groups = joined([part.groups for part in parts])
    assert groups.prompt_ids == batch.groups.prompt_ids
    assert torch.equal(groups.completion_ids[groups.mask], batch.groups.completion_ids[batch.mask])
    for name in ("old_logprobs", "ref_logprobs", "advantages", "weights", "places", "has_eos"):
        assert torch.equal(joined([getattr(part, name) for part in parts]), getattr(batch, name))
    assert {part.denominator for part in parts} == {batch.denominator}


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        RAGGED.split(0)


# --- padding ---------------------------------------------------------------------------------------------------------


def test_pad_rows_pads_on_the_right():
    ids, mask = pad_rows([[1, 2, 3], [4], []], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    assert ids.dtype == torch.int64
