"""Preference pairs as text: the same rows the offline methods read, with a margin where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from dar.config.data import DataSpec, SourceSpec
from dar.errors import DataError
from dar.reward_model.pairs import read_pairs

SPEC = DataSpec(train=SourceSpec(path="rows.jsonl"))
ROW: dict[str, Any] = {"prompt": "Say: ", "chosen": "yes", "rejected": "no", "lead": 2}


def test_margin_is_read_where_a_column_is_named():
    (with_margin,) = read_pairs([ROW], SPEC, margin_column="lead", where="rows")
    (without,) = read_pairs([ROW], SPEC, where="rows")
    assert (with_margin.margin, without.margin) == (2.0, 0.0)


@pytest.mark.parametrize("margin", ["2", " 2.0", 2, 2.0])
def test_margin_may_be_a_number_or_the_text_of_one(margin: Any):
    (pair,) = read_pairs([{**ROW, "lead": margin}], SPEC, margin_column="lead", where="rows")
    assert pair.margin == 2.0


@pytest.mark.parametrize("margin", [None, "much", "true", "", True, float("nan"), float("inf")])
def test_margin_that_is_no_finite_number_is_refused(margin: Any):
    with pytest.raises(DataError, match="row 1: the margin in column 'lead' must be a finite number"):
        read_pairs([ROW, {**ROW, "lead": margin}], SPEC, margin_column="lead", where="rows")


def test_prompt_of_whole_conversations_is_their_common_beginning():
    start = [{"role": "user", "content": "Well?"}]
    row = {name: [*start, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (pair,) = read_pairs([row], SPEC, where="rows")
    assert (pair.prompt, pair.chosen["content"], pair.rejected["content"]) == (start, "chosen", "rejected")


def test_empty_completion_and_missing_column_are_refused():
    with pytest.raises(DataError, match="row 0 has an empty completion"):
        read_pairs([{**ROW, "rejected": " "}], SPEC, where="rows")
    with pytest.raises(DataError, match="row 0 has no column 'rejected'; preferences need prompt, chosen, rejected"):
        read_pairs([{"prompt": "p", "chosen": "c"}], SPEC, where="rows")
