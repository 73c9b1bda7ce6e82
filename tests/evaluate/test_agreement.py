"""Agreement with people, counted by hand, and the formats preferences are published in."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from support.rows import write_rows

from dar.errors import DataError
from dar.evaluate.agreement import accuracy, agreement, annotators, choices_of, cohen_kappa, orders, read_choices
from dar.evaluate.judgements import JudgedPair, Judgement
from dar.evaluate.preference_files import Choice, LabeledPair, read_labeled_pairs

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def labeled(key: int, *labels: Choice, lengths: tuple[int, int] = (1, 2), subset: str | None = None) -> LabeledPair:
    return LabeledPair(str(key), "q", ("x" * lengths[0], "y" * lengths[1]), labels, subset)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_accuracy_counts_ties_as_half_and_agreement_as_a_choice():
    pairs = [labeled(0, 1), labeled(1, 2), labeled(2, 2), labeled(3, 0), labeled(4, 1)]
    found = accuracy(pairs, {"0": 1, "1": 0, "2": 1, "3": 0})
    assert (found.num_preferred, found.num_pairs) == (3, 4)  # pair 4 has no choice
    assert found.accuracy == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert found.agreement == pytest.approx(100 * 2 / 4)
    # Labels 1 2 2 0, choices 1 0 1 0: p_o = ½; p_e = (1·2 + 2·0 + 1·2)/16 = ¼; κ = (½ − ¼)/(1 − ¼).
    assert found.kappa == pytest.approx(1 / 3)


def test_kappa_of_cohens_table():
    # 20 both yes, 15 both no, 5 and 10 apart: p_o = .7, p_e = (25·30 + 25·20)/50² = .5, κ = .4.
    first = [1] * 25 + [2] * 25
    second = [1] * 20 + [2] * 5 + [1] * 10 + [2] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([1, 1], [1, 1]) is None


def test_majority_needs_more_than_half():
    assert labeled(0, 1, 1, 2).majority == 1
    assert labeled(0, 0, 0, 2).majority == 0
    assert labeled(0, 0, 1, 2).majority is None
    assert labeled(0, 1, 2).majority is None
    assert labeled(0, 2).majority == 2


def test_annotators_agree_as_the_mean_over_their_pairs():
    pairs = [labeled(0, 1, 1, 2), labeled(1, 2, 2, 2), labeled(2, 1, 1, 1), labeled(3, 2, 1, 2)]
    found = annotators(pairs)
    assert found is not None
    # Same: first and second 3/4, first and third 3/4, second and third 2/4; κ: p_e = ½, ½, (3·1 + 1·3)/16 = 3/8.
    assert found.agreement == pytest.approx(100 * (3 + 3 + 2) / 12)
    kappas = [(0.75 - 0.5) / 0.5, (0.75 - 0.5) / 0.5, (0.5 - 0.375) / 0.625]
    assert found.kappa == pytest.approx(sum(kappas) / 3)
    assert annotators([labeled(0, 1)]) is None


def test_annotators_must_be_as_many_everywhere():
    with pytest.raises(DataError, match="different numbers of annotators: 1, 2"):
        annotators([labeled(0, 1), labeled(1, 1, 1)])


def test_longer_and_shorter_stand_beside_the_choices_by_subset():
    pairs = [
        labeled(0, 1, lengths=(9, 2), subset="a"),
        labeled(1, 1, lengths=(2, 9), subset="b"),
        labeled(2, 2, lengths=(3, 3), subset="b"),
    ]
    found = agreement(pairs, {"0": 1, "1": 1})
    assert (found.longer.accuracy, found.shorter.accuracy) == (pytest.approx(50), pytest.approx(50))
    assert found.chosen is not None
    assert (found.chosen.accuracy, found.num_unchosen) == (100, 1)
    # In b the longer one loses pair 1, and pair 2 is a tie of length: (0 + ½) / 2.
    assert {name: longer.accuracy for name, (_, longer) in found.subsets.items()} == {"a": 100, "b": 25}
    assert {name: chosen and chosen.accuracy for name, (chosen, _) in found.subsets.items()} == {"a": 100, "b": 100}


def test_pairs_without_a_majority_are_left_out_and_counted():
    found = agreement([labeled(0, 1, 1), labeled(1, 1, 2)])
    assert (found.num_pairs, found.num_unlabeled, found.chosen, found.longer.num_pairs) == (2, 1, None, 1)
    with pytest.raises(DataError, match="in none of the 1 pairs do more than half"):
        agreement([labeled(1, 1, 2)])


def test_choices_of_another_file_are_refused():
    with pytest.raises(DataError, match="for 1 pairs that the preference file does not have, such as '7'"):
        agreement([labeled(0, 1)], {"7": 1})


def test_each_order_is_reported_by_itself():
    def judged(key: int, first: float | None, second: float | None) -> JudgedPair:
        return JudgedPair(
            (Judgement(str(key), first, 1, 2, model_first=True), Judgement(str(key), second, 1, 2, model_first=False))
        )

    pairs = [labeled(0, 1), labeled(1, 2), labeled(2, 1)]
    # The first completion is the "model": 1.0 is choice 1. Pair 0 wins only where it is shown first.
    looks = [judged(0, 1.0, 0.0), judged(1, 0.0, 0.0), judged(2, 1.0, None)]
    assert choices_of(looks) == {"0": 0, "1": 2}
    found = orders(pairs, looks)
    assert found is not None
    assert (found.num_pairs, found.disagreement) == (2, 50)
    assert (found.first_first.accuracy, found.second_first.accuracy) == (100, 50)
    assert orders(pairs, [judged(2, 1.0, None)]) is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_hh_prompt_is_the_conversation_before_the_last_answer(tmp_path: Path):
    start = f"{HUMAN} hi{ASSISTANT} hello{HUMAN} and?{ASSISTANT}"
    rows = [
        {"chosen": f"{start} well", "rejected": f"{start} no"},
        {"chosen": f"{HUMAN} a{ASSISTANT} b", "rejected": f"{HUMAN} c{ASSISTANT} d"},
    ]
    found = read_labeled_pairs(write_rows(tmp_path / "hh.jsonl", rows))
    assert found.skipped == (1,)
    (pair,) = found.pairs
    assert pair.prompt == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ]
    assert sorted(pair.completions) == ["no", "well"]
    assert pair.completions[pair.labels[0] - 1] == "well"


def test_the_better_completion_is_in_either_place_whichever_it_is(tmp_path: Path):
    rows = [{"prompt": f"q{number}", "chosen": "good", "rejected": "bad"} for number in range(40)]
    places = [pair.labels[0] for pair in read_labeled_pairs(write_rows(tmp_path / "a.jsonl", rows)).pairs]
    assert 10 < places.count(1) < 30
    turned = [{"prompt": row["prompt"], "chosen": "bad", "rejected": "good"} for row in rows]
    assert places == [pair.labels[0] for pair in read_labeled_pairs(write_rows(tmp_path / "b.jsonl", turned)).pairs]


def test_the_conversation_has_a_say_in_the_place_of_an_hh_row(tmp_path: Path):
    rows = [
        {"chosen": f"{HUMAN} q{number}{ASSISTANT} good", "rejected": f"{HUMAN} q{number}{ASSISTANT} bad"}
        for number in range(40)
    ]
    places = [pair.labels[0] for pair in read_labeled_pairs(write_rows(tmp_path / "hh.jsonl", rows)).pairs]
    assert 10 < places.count(1) < 30


def test_llmbar_and_pandalm_rows(tmp_path: Path):
    llmbar = {"subset": "S", "idx": 3, "input": "q", "output_1": "a", "output_2": "b", "label": 2}
    assert read_labeled_pairs(write_rows(tmp_path / "llmbar.jsonl", [llmbar])).pairs == (
        LabeledPair("0", "q", ("a", "b"), (2,), "S"),
    )
    pandalm = {"instruction": "do", "input": "this", "response1": "a", "response2": True}
    votes: dict[str, Any] = {"annotator1": 0, "annotator2": 1, "annotator3": 0}
    assert read_labeled_pairs(write_rows(tmp_path / "pandalm.jsonl", [pandalm | votes])).pairs == (
        LabeledPair("0", "do\n\nthis", ("a", "True"), (0, 1, 0)),
    )


def test_labels_of_a_csv_file_are_numbers(tmp_path: Path):
    path = tmp_path / "llmbar.csv"
    path.write_text("input,output_1,output_2,label,subset\nq,007,b,2,S\n")
    assert read_labeled_pairs(path).pairs == (LabeledPair("0", "q", ("007", "b"), (2,), "S"),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"instruction": "q", "response1": None, "response2": "b", "annotator1": 1}],
            "'response1' must be text, found",
        ),
        (
            [{"instruction": "q", "response1": [1], "response2": "b", "annotator1": 1}],
            "'response1' must be text, found",
        ),
        ([{"a": 1}], "of no preference format that is known.*its columns are a"),
        ([{"chosen": "x", "rejected": "y"}], "row 0: 'chosen' is no transcript"),
        ([{"prompt": "q", "chosen": "x", "rejected": 3}], "row 0: 'rejected' must be text, found 3"),
        ([{"prompt": "q", "chosen": "x", "rejected": "y"}, {"prompt": "q"}], "row 1: there is no column 'chosen'"),
        (
            [{"input": "q", "output_1": "a", "output_2": "b", "label": 3}],
            "row 0: 'label' must be one of 1, 2, found 3",
        ),
        (
            [{"chosen": f"{HUMAN} a{ASSISTANT} b", "rejected": f"{HUMAN} c{ASSISTANT} d"}],
            "in none of the 1 rows have both completions the same prompt",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str):
    with pytest.raises(DataError, match=message):
        read_labeled_pairs(write_rows(tmp_path / "some.jsonl", rows))


def test_choices_are_read_from_scores_and_from_judgements(tmp_path: Path):
    scores = [{"pair": 0, "score_1": 1.5, "score_2": -1}, {"pair": 1, "score_1": 2, "score_2": 2}]
    assert read_choices(write_rows(tmp_path / "scores.jsonl", scores)) == ({"0": 1, "1": 0}, None)
    judgements = [dataclasses.asdict(Judgement("0", 0.0, 1, 2))]
    assert read_choices(write_rows(tmp_path / "judgements.jsonl", judgements))[0] == {"0": 2}


@pytest.mark.parametrize("changes", [{"score_2": None}, {"score_2": float("inf")}])
def test_a_score_that_is_no_number_is_refused(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(DataError, match=r"row 0(:| needs)"):
        read_choices(write_rows(tmp_path / "scores.jsonl", [{"pair": 0, "score_1": 1.5, "score_2": -1} | changes]))


# --- real files ------------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("DAR_TEST_DATA", "no-such-folder"))
real = pytest.mark.skipif(not DATA.is_dir(), reason="the environment variable DAR_TEST_DATA names no folder")


@real
def test_hh_harmless_prefers_the_shorter_reply():
    found = read_labeled_pairs(DATA / "hh_rlhf" / "harmless-base.test.jsonl.gz")
    assert (len(found.pairs), len(found.skipped)) == (2307, 5)
    assert agreement(found.pairs).longer.agreement == pytest.approx(44.26, abs=0.01)


@real
def test_llmbar_is_adversarial_to_length():
    found = agreement(read_labeled_pairs(DATA / "llmbar" / "llmbar.jsonl.gz").pairs)
    assert found.num_pairs == 885
    assert found.subsets["LLMBar/Adversarial/Neighbor"][1].accuracy == pytest.approx(100 * 16 / 134)


@real
def test_pandalm_has_a_majority_for_every_pair():
    found = agreement(read_labeled_pairs(DATA / "pandalm" / "testset-v1.json.gz").pairs)
    assert (found.num_pairs, found.num_unlabeled) == (999, 0)
    # By pairs of annotators: all three agree on 879 rows, two of three on the other 120 (a third of their pairs).
    assert found.annotators is not None
    assert found.annotators.agreement == pytest.approx(100 * (879 + 120 / 3) / 999)
