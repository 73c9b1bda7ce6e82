"""HH transcripts and labelled pairs as rows of preferences, and parts of the rows by a hash."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import make_tokenizer
from support.handmade import make_spec

from dar.config.data import DataSpec, SourceSpec
from dar.data.logged import prepare_logged
from dar.data.prompts import prepare_prompts
from dar.data.sources import load_rows
from dar.data.splits import part_of
from dar.errors import ConfigError, DataError
from dar.policies.text.rendering import prompt_ids
from dar.reward_model.pairs import read_pairs

DATA = Path(os.environ.get("DAR_TEST_DATA", "no-such-folder"))
"""Public data sets that are no part of the library: hh_rlhf/, tldr/, …"""
HH = DATA / "hh_rlhf" / "harmless-base.test.jsonl.gz"
TLDR = DATA / "tldr" / "tldr_pairs.jsonl.gz"
real_data = pytest.mark.skipif(not HH.exists(), reason="DAR_TEST_DATA does not name the folder with public data sets")
PARTS = dict(a="test", b="train", c="validation", d="train", h="test", k="train")
BEFORE = "\n\nHuman: Is it raining?\n\nAssistant: No.\n\nHuman: And now?\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "And now?"},
]


def source(**settings: Any) -> SourceSpec:
    return make_spec(data={"train": {"path": "rows.jsonl", **settings}}).data.train


def hh_row(chosen: str = " Yes.", rejected: str = " Who knows?", before: str = BEFORE) -> dict[str, Any]:
    return {"chosen": before + chosen, "rejected": BEFORE + rejected}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- HH --------------------------------------------------------------------------------------------------------------


def test_hh_rows_are_preferences_with_the_conversation_as_prompt():
    row = {**hh_row(), "id": 7}
    assert load_rows(source(format="hh"), [row]) == [
        {"prompt": MESSAGES, "chosen": said("Yes."), "rejected": said("Who knows?"), "id": 7}
    ]


def test_hh_rows_serve_the_offline_methods_online_prompts_and_reward_models_alike():
    rows = load_rows(source(format="hh"), [hh_row()])
    spec, tokenizer = DataSpec(train=source(format="hh")), cast(Any, make_tokenizer())
    logged = prepare_logged(
        rows, tokenizer, spec, kind="preferences", eos_token_ids=(0,), max_prompt_length=None,
        max_completion_length=50, where="rows",
    )  # fmt: skip
    (group,) = logged.groups
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(group.prompt.token_ids) == expected
    assert [completion.text for completion in group.completions] == ["Yes.", "Who knows?"]
    online = prepare_prompts(rows, partial(prompt_ids, tokenizer), spec, max_prompt_length=None, where="rows")
    assert online.prompts[0].token_ids == group.prompt.token_ids
    (pair,) = read_pairs(rows, spec, where="rows")
    assert (pair.prompt, pair.chosen, pair.rejected) == (MESSAGES, said("Yes.")[0], said("Who knows?")[0])


OTHER = BEFORE.replace("And now?", "And here?")


@pytest.mark.parametrize("row", [hh_row(before=OTHER), hh_row(chosen="  "), hh_row(rejected="\n")])
def test_unusable_hh_rows_are_skipped_and_counted_or_refused(row: dict[str, Any], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert len(load_rows(source(format="hh"), [hh_row(), row])) == 1
    assert "1 of 2 rows were left out: chosen and rejected differ before the last answer" in caplog.text
    with pytest.raises(DataError, match=r"row 1: chosen and rejected differ .* with format\.unusable: skip"):
        load_rows(source(format={"type": "hh", "unusable": "refuse"}), [hh_row(), row])
    with pytest.raises(DataError, match="no row is left"):
        load_rows(source(format="hh"), [row])


@pytest.mark.parametrize("text", ["Human: Hi\n\nAssistant: Hi", "\n\nHuman: Hi", "\n\nAssistant: Hi", 3, None])
def test_what_is_no_transcript_is_refused(text: Any):
    with pytest.raises(DataError, match=r"row 0: 'chosen' is no transcript of the hh format"):
        load_rows(source(format="hh"), [{"chosen": text, "rejected": BEFORE + " Yes."}])


# --- labelled pairs --------------------------------------------------------------------------------------------------

LABELLED: dict[str, Any] = {"type": "labelled_pairs", "label": "better", "columns": {1: "first", 2: "second"}}


def test_label_says_which_column_is_chosen():
    rows = [{"prompt": f"p{label}", "first": "one", "second": "two", "better": label} for label in (1, 2)]
    assert load_rows(source(format=LABELLED), rows) == [
        {"prompt": "p1", "chosen": "one", "rejected": "two", "better": 1},
        {"prompt": "p2", "chosen": "two", "rejected": "one", "better": 2},
    ]


@pytest.mark.parametrize(
    ("columns", "label", "chosen"),
    [
        ({1: "first", 2: "second"}, 1.0, "one"),
        ({1: "first", 2: "second"}, "2", "two"),
        ({True: "first", False: "second"}, True, "one"),
        ({True: "first", False: "second"}, "false", "two"),
        ({"true": "first", "false": "second"}, "True", "one"),
    ],
)
def test_labels_are_the_same_in_every_kind_of_file(columns: dict[Any, str], label: Any, chosen: str):
    rows = [{"prompt": "p", "first": "one", "second": "two", "better": label}]
    assert load_rows(source(format=LABELLED | {"columns": columns}), rows)[0]["chosen"] == chosen


def test_a_label_that_is_none_is_shown():
    with pytest.raises(DataError, match=r"none of the labels 1, 2 \(but such as '1\.0'\)"):
        load_rows(source(format=LABELLED), [{"prompt": "p", "first": "one", "second": "two", "better": "1.0"}])


def test_rows_without_a_label_are_skipped_and_counted_or_refused(caplog: pytest.LogCaptureFixture):
    rows = [{"prompt": "p", "first": "one", "second": "two", "better": label} for label in (1, None, "tie")]
    with caplog.at_level(logging.WARNING):
        assert len(load_rows(source(format=LABELLED), rows)) == 1
    assert "2 of 3 rows were left out: column 'better' has none of the labels 1, 2" in caplog.text
    with pytest.raises(DataError, match=r"row 1: column 'better' has none .* format\.unlabelled: skip"):
        load_rows(source(format=LABELLED | {"unlabelled": "refuse"}), rows)


def test_labelled_pairs_need_their_columns():
    with pytest.raises(DataError, match="row 0 has no column 'second'; it has better, first"):
        load_rows(source(format=LABELLED), [{"better": 1, "first": "one"}])
    with pytest.raises(ConfigError, match="expected two labels with a column each"):
        source(format=LABELLED | {"columns": {"1": "first", "2": "first"}})
    with pytest.raises(ConfigError, match="unknown type 'hhh'"):
        source(format="hhh")


# --- parts by a hash -------------------------------------------------------------------------------------------------


def test_part_follows_from_sha256_modulo_10():
    # int(sha256(text), 16) % 10, computed apart with `sha256sum` and bc.
    assert {text: part_of(text) for text in PARTS} == PARTS


def test_parts_are_disjoint_complete_and_follow_the_first_thing_the_user_says():
    def conversation(index: int, ending: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": ending}, {"role": "user", "content": f"question {index}"},
                {"role": "assistant", "content": ending}]  # fmt: skip

    rows = [{"prompt": conversation(index, ending)} for index in range(200) for ending in ("a", "b")]
    parts = {part: load_rows(source(split_by_hash=part), rows) for part in ("train", "validation", "test")}
    firsts = {part: {row["prompt"][1]["content"] for row in found} for part, found in parts.items()}
    assert sum(map(len, parts.values())) == 400
    assert sum(map(len, firsts.values())) == 200
    assert all(len(parts[part]) == 2 * len(firsts[part]) for part in parts)
    # 200 draws of 0.8 and 0.1: 160 ± 5.7 and 20 ± 4.2, and a hash is no draw that could change.
    assert 140 < len(firsts["train"]) < 180
    as_text = load_rows(source(split_by_hash="test"), [{"prompt": row["prompt"][1]["content"]} for row in rows])
    assert {row["prompt"] for row in as_text} == firsts["test"]


def test_split_comes_after_the_format_and_before_max_rows():
    rows = [hh_row() | {"other": text} for text in PARTS]
    wanted = [text for text, part in PARTS.items() if part == "test"]
    split = {"part": "test", "column": "other"}
    assert [row["other"] for row in load_rows(source(format="hh", split_by_hash=split), rows)] == wanted
    assert [row["other"] for row in load_rows(source(split_by_hash=split, max_rows=1), rows)] == wanted[:1]
    # Of HH rows the parsed prompt decides, whose first turn is "Is it raining?" in all of them.
    assert len(load_rows(source(format="hh", split_by_hash=part_of("Is it raining?")), rows)) == len(rows)


def test_split_needs_a_column_to_hash():
    with pytest.raises(DataError, match=r"row 0: split_by_hash needs a string or messages in column 'prompt', found"):
        load_rows(source(split_by_hash="train"), [{"question": "?"}])
    with pytest.raises(DataError, match="none of the 1 rows is in the part validation"):
        load_rows(source(split_by_hash="validation"), [{"prompt": next(t for t, p in PARTS.items() if p == "train")}])


# --- the real sets ---------------------------------------------------------------------------------------------------


@real_data
def test_real_hh_file(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        rows = load_rows(SourceSpec.model_validate({"path": str(HH), "format": "hh"}))
    # 5 rows differ before the last answer, 4 have an empty chosen answer.
    assert len(rows) == 2312 - 9
    assert "9 of 2312 rows were left out" in caplog.text
    parts = {
        part: load_rows(SourceSpec.model_validate({"path": str(HH), "format": "hh", "split_by_hash": part}))
        for part in ("train", "validation", "test")
    }
    firsts = [{row["prompt"][0]["content"] for row in found} for found in parts.values()]
    assert sum(map(len, parts.values())) == len(rows)
    assert not firsts[0] & firsts[1]
    assert not firsts[0] & firsts[2]
    assert not firsts[1] & firsts[2]


@real_data
def test_real_tldr_file():
    columns = {"model": "model_summary", "reference": "reference_summary"}
    wanted = {"type": "labelled_pairs", "label": "preferred", "columns": columns}
    rows = load_rows(SourceSpec.model_validate({"path": str(TLDR), "format": wanted}))
    with gzip.open(TLDR, "rt", encoding="utf-8") as stream:
        written = {row["id"]: row for row in map(json.loads, stream)}
    assert Counter(row["preferred"] for row in rows) == {"model": 640, "reference": 360}
    for row in rows:
        original = written[row["id"]]
        assert row["chosen"] == original[columns[original["preferred"]]]
        assert {row["chosen"], row["rejected"]} == {original["model_summary"], original["reference_summary"]}
