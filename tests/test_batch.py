"""The records that flow through a step: slicing, splitting, padding."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import few, golden_experience, make_experience, make_groups, random_rewards, random_rows

from dar.batch import Experience, Prompt, Rollouts, TokenGroups, Weighted, pad_rows, split_by_tokens


def weighted(
    experience: Experience, advantages: torch.Tensor, weights: torch.Tensor, denominator: float = 4.0
) -> Weighted:
    return Weighted(
        groups=experience.groups,
        old_logprobs=experience.old_logprobs,
        ref_logprobs=experience.ref_logprobs,
        advantages=advantages,
        weights=weights,
        denominator=denominator,
    )


def golden_weighted() -> Weighted:
    return weighted(golden_experience(), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.2, 0.3, 0.4]))


# Rows of lengths (2, 4), (1), (3, 1, 2) under prompts of 3, 5 and 2 tokens.
RAGGED = make_groups([2, 4, 1, 3, 1, 2], [2, 1, 3], [3, 5, 2])


# --- token groups ----------------------------------------------------------------------------------------------------


def test_every_row_knows_its_prompt_and_its_length():
    first, second, third = RAGGED.prompt_ids
    assert RAGGED.num_rows == 6
    assert list(RAGGED.row_prompts()) == [first, first, second, third, third, third]
    assert RAGGED.lengths().tolist() == [2, 4, 1, 3, 1, 2]


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


# --- rollouts and experience -----------------------------------------------------------------------------------------


def test_rollouts_say_how_many_completions_a_prompt_has_and_which_ended():
    rollouts = Rollouts(
        prompts=tuple(Prompt(position, "?", (1, 2), {}) for position in range(2)),
        groups=golden_experience().groups,
        texts=("a", "b", "c", "d"),
        logprobs=golden_experience().old_logprobs,
        finish_reasons=("eos", "length", "length", "eos"),
    )
    assert rollouts.num_generations == 2
    assert rollouts.has_eos.tolist() == [True, False, False, True]


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_denominator_must_be_positive(denominator: float):
    with pytest.raises(ValueError, match="denominator must be > 0"):
        weighted(golden_experience(), torch.ones(4), torch.ones(4), denominator)


def test_weighted_slice_takes_every_field_of_its_rows():
    part = golden_weighted().group_slice(1, 2)
    assert part.ref_logprobs is not None
    assert part.groups.completion_ids.tolist() == [[200, 201, 202], [300, 301, -1]]
    assert part.old_logprobs.tolist() == [[-1, -2, -5], [-7, -8, 0]]
    assert part.ref_logprobs.tolist() == [[-3, -1, -4], [-16, -4, 0]]
    assert part.advantages.tolist() == [3, 4]
    assert part.weights.tolist() == pytest.approx([0.3, 0.4])


def test_weighted_slice_keeps_the_global_denominator():
    assert golden_weighted().group_slice(0, 1).denominator == 4.0


def test_weighted_slice_trims_log_probabilities_with_the_tokens():
    seen = golden_weighted().group_slice(0, 1)
    assert seen.ref_logprobs is not None
    assert seen.old_logprobs.tolist() == [[-4, -6], [-11, 0]]
    assert seen.ref_logprobs.tolist() == [[-7, -5], [-10, 0]]
    assert seen.mask.tolist() == [[True, True], [True, False]]


def test_weighted_slice_without_a_reference():
    whole = weighted(make_experience([[1, 2]], [[-1], [-2]]), torch.ones(2), torch.ones(2), 2.0)
    assert whole.group_slice(0, 1).ref_logprobs is None


@pytest.mark.parametrize("with_reference", [True, False])
def test_moving_to_a_device_moves_every_tensor(with_reference: bool):
    batch = golden_experience() if with_reference else make_experience([[1, 2]], [[-1], [-2]])
    moved = weighted(batch, torch.ones(4), torch.ones(4)).to(torch.device("meta"))
    records = [*vars(moved).values(), *vars(moved.groups).values()]
    tensors = [value for value in records if isinstance(value, torch.Tensor)]
    assert len(tensors) == (6 if with_reference else 5)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.denominator == 4.0
    assert moved.groups.prompt_ids == batch.groups.prompt_ids


def test_moving_to_the_same_device_changes_nothing():
    whole = golden_weighted()
    same = whole.to(torch.device("cpu"))
    for name in ("weights", "advantages", "old_logprobs", "ref_logprobs", "mask"):
        assert torch.equal(getattr(same, name), getattr(whole, name))
    assert torch.equal(same.groups.completion_ids, whole.groups.completion_ids)


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
    batch = weighted(golden_experience(), torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert batch.carries_weight(loads, 0.0).tolist() == [False, True, False, True]
    assert batch.carries_weight(loads, 1e-6).tolist() == [False, True, False, True]


def test_what_is_not_a_number_is_kept_for_the_loss_to_refuse():
    batch = weighted(golden_experience(), torch.ones(4), torch.tensor([0.0, math.nan, 1.0, 1.0]))
    assert batch.carries_weight(None, 1e-4).tolist() == [False, True, True, True]
    assert batch.carries_weight(LOADS * math.nan, 1e-4).tolist() == [False, True, True, True]


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "bounds"),
    [
        # Each prompt once: group 0 has 3+2+4 = 9 tokens, group 1 has 5+1 = 6, group 2 has 2+3+1+2 = 8.
        (1, [(0, 1), (1, 2), (2, 3)]),
        (13, [(0, 1), (1, 2), (2, 3)]),
        (14, [(0, 1), (1, 3)]),
        (15, [(0, 2), (2, 3)]),
        (22, [(0, 2), (2, 3)]),
        (23, [(0, 3)]),
    ],
)
def test_micro_batches_at_known_budgets(max_tokens: int, bounds: list[tuple[int, int]]):
    assert split_by_tokens(RAGGED, max_tokens) == bounds


def test_a_closed_micro_batch_does_not_count_against_the_next():
    # After the long group 0 (1+9 = 10) is closed, 1 and 2 are 4 together, not 14.
    groups = make_groups([9, 1, 1], [1, 1, 1], [1, 1, 1])
    assert split_by_tokens(groups, 10) == [(0, 1), (1, 3)]


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

    bounds = split_by_tokens(groups, max_tokens)
    assert [bounds[0][0], bounds[-1][1]] == [0, len(lengths)]
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    assert all(stop - start == 1 or tokens(start, stop) <= max_tokens for start, stop in bounds)
    # Greedy: the next group would not have fitted.
    assert all(tokens(start, stop + 1) > max_tokens for start, stop in bounds[:-1])


@few
@given(seed=st.integers(0, 10_000), num_prompts=st.integers(1, 5), max_tokens=st.integers(1, 100))
def test_micro_batches_together_are_the_whole(seed: int, num_prompts: int, max_tokens: int):
    _, old, ref = random_rows(seed, 3 * num_prompts)
    batch = make_experience(random_rewards(seed, num_prompts, 3), old, ref)
    rows = torch.arange(3.0 * num_prompts)
    parts = weighted(batch, rows, rows + 100, 7.0).split_by_tokens(max_tokens)
    assert torch.equal(torch.cat([part.advantages for part in parts]), rows)
    assert torch.equal(torch.cat([part.weights for part in parts]), rows + 100)
    assert [ids for part in parts for ids in part.groups.prompt_ids] == list(batch.groups.prompt_ids)
    for name in ("old_logprobs", "ref_logprobs"):
        kept = [getattr(part, name)[part.mask] for part in parts]
        assert torch.equal(torch.cat(kept), getattr(batch, name)[batch.mask])
    tokens = [part.groups.completion_ids[part.mask] for part in parts]
    assert torch.equal(torch.cat(tokens), batch.groups.completion_ids[batch.mask])
    assert {part.denominator for part in parts} == {7.0}


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        split_by_tokens(RAGGED, 0)


# --- padding ---------------------------------------------------------------------------------------------------------


def test_pad_rows_pads_on_the_right():
    ids, mask = pad_rows([[1, 2, 3], [4], []], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    assert ids.dtype == torch.int64


def test_mask_of_an_experience_is_that_of_its_tokens():
    batch: Experience = golden_experience()
    assert batch.mask is batch.groups.mask
