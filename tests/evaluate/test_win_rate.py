"""Win rates of judged pairs, counted by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dar.errors import DataError
from dar.evaluate.annotations import alpaca_eval_judgements, read_judged_pairs
from dar.evaluate.folder import Lines
from dar.evaluate.judgements import JudgedPair, Judgement, judgement_of, pair_up
from dar.evaluate.win_rate import win_rate
from dar.record.intervals import bootstrap, wilson


def both(key: str, first: float | None, second: float | None, **fields: Any) -> JudgedPair:
    """A pair judged with the model's completion first, then second."""
    settings: dict[str, Any] = {"model_length": 10, "baseline_length": 10} | fields
    return JudgedPair(
        (Judgement(key, first, model_first=True, **settings), Judgement(key, second, model_first=False, **settings))
    )


def annotation(preference: float | None, **changes: Any) -> dict[str, Any]:
    return {"preference": preference, "output_1": "ab", "output_2": "abc"} | changes


# --- intervals -------------------------------------------------------------------------------------------------------


def test_wilson_interval_against_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        assert wilson(successes / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 20) == pytest.approx((0.8389, 1), abs=5e-5)


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.tile([0.0, 1.0], 200)
    interval, error = bootstrap(lambda drawn: float(values[drawn].mean()), 400, resamples=2000, seed=0)
    # s/√n = ½/20 = .025, up to the 1/√(2·2000) of the number of draws.
    assert error == pytest.approx(0.025, rel=0.05)
    assert interval == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.004)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "preference", "outcome", "agree"),
    [
        (1.0, 1.0, 1.0, "win", True),
        (0.0, 0.0, 0.0, "loss", True),
        (0.5, 0.5, 0.5, "tie", True),
        (1.0, 0.0, 0.5, "tie", False),
        (1.0, 0.5, 0.75, "tie", False),  # only what both orders say is a win
        (0.6, 0.9, 0.75, "win", True),
        (1.0, None, None, None, None),  # one order alone carries the judge's position bias
    ],
)
def test_both_orders_decide(first: float, second: float | None, preference: Any, outcome: Any, agree: Any):
    pair = both("a", first, second)
    assert (pair.preference, pair.outcome, pair.orders_agree) == (preference, outcome, agree)


def test_win_rate_of_five_pairs():
    pairs = [
        both("a", 1.0, 1.0, category="math"),
        both("b", 1.0, 1.0, category="math"),
        both("c", 0.0, 0.0, category="prose"),
        both("d", 1.0, 0.0, category="prose"),
        both("e", 1.0, None, category="prose"),
    ]
    found = win_rate(pairs, resamples=200, seed=0)
    overall = found.overall
    assert (overall.num_pairs, overall.wins, overall.ties, overall.losses, found.num_failed) == (4, 2, 1, 1, 1)
    assert overall.win_rate == overall.discrete_win_rate == pytest.approx(100 * (1 + 1 + 0 + 0.5) / 4)
    assert overall.wilson == pytest.approx(wilson(0.625, 4).scaled(100))
    # Preferences 1, 1, 0, ½ around .625: squares .140625 + .140625 + .390625 + .015625 = .6875, / 3, / 4.
    assert found.standard_error == pytest.approx(100 * math.sqrt(0.6875 / 3 / 4))
    assert found.bootstrap.low < 62.5 < found.bootstrap.high
    assert {name: (row.num_pairs, row.win_rate) for name, row in found.categories.items()} == {
        "math": (2, 100.0),
        "prose": (2, 25.0),
    }


def test_position_bias_counts_what_was_shown_first():
    pairs = [both("a", 1.0, 0.0), both("b", 1.0, 0.0), both("c", 1.0, 1.0), both("d", 0.5, None)]
    found = win_rate(pairs, resamples=20, seed=0).position
    assert found is not None
    # Shown first: a 1 and 1, b 1 and 1, c 1 and 0, d ½.
    assert (found.num_judgements, found.num_both_orders) == (7, 3)
    assert found.first_shown_win_rate == pytest.approx(100 * 5.5 / 7)
    assert found.disagreement == pytest.approx(100 * 2 / 3)


def test_position_bias_is_unknown_where_nobody_noted_the_order():
    assert win_rate([JudgedPair((Judgement("a", 1.0, 1, 2),))], resamples=20, seed=0).position is None


def test_length_bias_counts_decided_pairs_of_different_lengths():
    pairs = [
        both("a", 1.0, 1.0, model_length=30),  # longer wins
        both("b", 0.0, 0.0, model_length=20),  # longer loses
        both("c", 0.0, 0.0, model_length=5),  # shorter loses: longer wins
        both("d", 1.0, 1.0),  # equal lengths
        both("e", 1.0, 0.0, model_length=99),  # a tie
    ]
    found = win_rate(pairs, resamples=20, seed=0).length
    assert (found.model_length, found.baseline_length) == (pytest.approx(164 / 5), 10)
    assert (found.num_decided, found.longer_wins) == (3, pytest.approx(200 / 3))
    assert [(one.low, one.high, one.num_pairs, one.win_rate) for one in found.bins] == [
        (-5, -5, 1, 0.0),
        (0, 0, 1, 100.0),
        (10, 10, 1, 0.0),
        (20, 20, 1, 100.0),
        (89, 89, 1, 50.0),
    ]


def test_every_pair_is_in_one_bin_and_nothing_is_said_of_length_where_all_are_equal():
    pairs = [both(str(number), 1.0, 1.0) for number in range(7)]
    found = win_rate(pairs, resamples=20, seed=0).length
    assert (found.longer_wins, [(one.low, one.high, one.num_pairs) for one in found.bins]) == (None, [(0, 0, 7)])


def test_a_single_pair_has_no_standard_error():
    assert win_rate([both("a", 1.0, 1.0)], resamples=20, seed=0).standard_error is None


def test_nothing_judged_is_refused():
    with pytest.raises(DataError, match="none of the 1 pairs has a judgement"):
        win_rate([both("a", None, 1.0)], resamples=20, seed=0)


# --- AlpacaEval's annotations -----------------------------------------------------------------------------------------


def test_alpaca_eval_annotations_are_counted_as_alpaca_eval_counts():
    rows = [annotation(value) for value in (1, 2, 1.5, 0, 1.75, None, math.nan)]
    found = win_rate(pair_up(alpaca_eval_judgements(rows, where="x"), where="x"), resamples=20, seed=0)
    overall = found.overall
    assert (overall.num_pairs, overall.wins, overall.ties, overall.losses, found.num_failed) == (5, 2, 2, 1, 2)
    assert overall.win_rate == pytest.approx(100 * (0 + 1 + 0.5 + 0.5 + 0.75) / 5)
    assert overall.discrete_win_rate == pytest.approx(100 * (2 + 2 / 2) / 5)
    # 0, 1, ½, ½, ¾ around .55: .3025 + .2025 + .0025 + .0025 + .04 = .55, / 4, / 5.
    assert found.standard_error == pytest.approx(100 * math.sqrt(0.55 / 4 / 5))
    assert (found.length.model_length, found.length.baseline_length) == (3, 2)


def test_category_and_index_of_annotations_are_kept():
    rows = [annotation(1, index=7, dataset="koala"), annotation(2, index=8, dataset="vicuna")]
    found = alpaca_eval_judgements(rows, where="x")
    assert [(one.pair, one.category) for one in found] == [("7", "koala"), ("8", "vicuna")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": 3}, "row 1: preference is 3; AlpacaEval's is 1"),
        ({"preference": True}, "row 1: preference is True"),
        ({"preference": "one"}, "row 1: preference is 'one'"),
        ({"preference": False}, "row 1: preference is False"),
        ({"preference": 2.00001}, "row 1: preference is 2.00001"),
        ({"output_2": None}, "row 1: output_2 must be text, found None"),
        ({"generator_2": "other"}, r"more than one model \(generator_2\): m, other"),
        ({"index": 0}, "pair '0' has 2 judgements"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused(changes: dict[str, Any], message: str):
    rows = [annotation(1, generator_2="m", index=0), annotation(2, generator_2="m", index=1) | changes]
    with pytest.raises(DataError, match=message):
        pair_up(alpaca_eval_judgements(rows, where="x"), where="x")


def test_annotations_need_their_columns():
    with pytest.raises(DataError, match="row 0 has no preference; it has output_1, output_2"):
        alpaca_eval_judgements([{"output_1": "", "output_2": ""}], where="x")


# --- our own judgements ----------------------------------------------------------------------------------------------


def test_judgements_survive_the_way_through_a_file(tmp_path: Path):
    path = tmp_path / "judgements.jsonl"
    pairs = [both("a", 0.25, None, category="ü"), JudgedPair((Judgement("b", 1.0, 5, 7, verdict="[[A]]\u2028"),))]
    written = Lines(path, ("pair", "model_first"))
    written.append(dataclasses.asdict(one) for pair in pairs for one in pair.judgements)
    assert read_judged_pairs(path) == pairs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": 1.5}, r"row 0: preference must be a number in \[0, 1\] or null, found 1.5"),
        ({"preference": math.nan}, "preference must be a number"),
        ({"model_first": "yes"}, "row 0: model_first must be true, false or null, found 'yes'"),
        ({"category": ["a"]}, r"row 0: category must be text or null, found \['a'\]"),
        ({"model_length": -1}, "model_length must be a count of characters, found -1"),
        ({"winner": "a"}, "is not a judgement: unknown winner"),
    ],
)
def test_a_judgement_that_cannot_be_used_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    row = {"pair": "a", "preference": 1.0, "model_length": 1, "baseline_length": 2}
    path = tmp_path / "judgements.jsonl"
    path.write_text(json.dumps(row | changes))
    with pytest.raises(DataError, match=message):
        read_judged_pairs(path)


def test_a_judgement_without_its_fields_is_refused(tmp_path: Path):
    path = tmp_path / "judgements.jsonl"
    path.write_text('{"pair": "a"}')
    with pytest.raises(DataError, match="missing baseline_length, model_length, preference"):
        read_judged_pairs(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(DataError, match=r"neither judgements .* nor AlpacaEval annotations .* its columns are prompt"):
        read_judged_pairs(path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            Judgement("a", 1.0, 1, 2, model_first=True),
            "pair 'a' has 2 judgements; at most two are expected, one in each",
        ),
        (Judgement("a", 1.0, 1, 3, model_first=False), "of different completions or categories"),
    ],
)
def test_a_pair_is_judged_once_in_each_order(second: Judgement, message: str):
    with pytest.raises(DataError, match=message):
        pair_up([Judgement("a", 1.0, 1, 2, model_first=True), second], where="x")


def test_two_annotators_are_not_one_sample():
    rows = [annotation(1.0, annotator="one", instruction="a"), annotation(2.0, annotator="two", instruction="a")]
    with pytest.raises(DataError, match=r"x: more than one annotator \(annotator\): one, two. Split the file by annot"):
        alpaca_eval_judgements(rows, where="x")


def test_rounding_at_the_ends_of_a_preference_is_forgiven():
    rows = [annotation(2.0000000000000004), annotation(0.9999999999999999)]
    assert [one.preference for one in alpaca_eval_judgements(rows, where="x")] == [1.0, 0.0]
    row = {"pair": "a", "preference": 1.0000000000000002, "model_length": 1, "baseline_length": 2}
    assert judgement_of(row, 0, "x").preference == 1.0


def test_judgements_and_annotations_may_be_csv(tmp_path: Path):
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    ours.write_text("pair,preference,model_length,baseline_length,model_first\na,0.5,1,2,true\na,,1,2,False\n")
    theirs.write_text("preference,output_1,output_2,index\n1.75,a,bb,7\n,a,b,8\n")
    assert read_judged_pairs(ours) == [JudgedPair((Judgement("a", 0.5, 1, 2, True), Judgement("a", None, 1, 2, False)))]
    assert read_judged_pairs(theirs) == [
        JudgedPair((Judgement("7", 0.75, 2, 1),)),
        JudgedPair((Judgement("8", None, 1, 1),)),
    ]
