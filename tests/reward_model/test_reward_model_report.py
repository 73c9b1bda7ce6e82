"""Figures of a reward model: accuracy, calibration and the baselines of length, by hand."""

from __future__ import annotations

import math

import pytest

from dar.record.intervals import standard_error
from dar.reward_model.report import calibration_error, preference_report


def test_report_by_hand():
    # Margins 1, −1, 0, 2: two right, one wrong, one tie counts half: 2.5 / 4.
    report = preference_report([1.0, 0.0, 5.0, 2.0], [0.0, 1.0, 5.0, 0.0], [3, 0, -20, -70])
    assert report["accuracy"] == 2.5 / 4
    # Points 1, 0, ½, 1 around 5/8: (9 + 25 + 1 + 9) / 64 / 3 over 4.
    assert report["accuracy_se"] == pytest.approx(math.sqrt(44 / 64 / 3 / 4))
    assert report["mean_margin"] == 0.5
    losses = [math.log1p(math.exp(-margin)) for margin in (1, -1, 0, 2)]
    assert report["loss"] == pytest.approx(sum(losses) / 4)
    # The chosen one is longer once, equally long once: 1.5 / 4.
    assert (report["longer_wins_accuracy"], report["shorter_wins_accuracy"]) == (1.5 / 4, 2.5 / 4)
    bins = [(part["from"], part["to"], part["num_pairs"], part["accuracy"]) for part in report["by_length_difference"]]
    assert bins == [(None, -65, 1, 1.0), (-64, -17, 1, 0.5), (0, 0, 1, 0.0), (1, 16, 1, 1.0)]


def test_calibration_error_of_a_model_that_is_sure_and_right_three_times_in_four():
    # σ(log 9) = 0.9 four times, right three times: |0.75 − 0.9|.
    error, bins = calibration_error([math.log(9), math.log(9), math.log(9), -math.log(9)])
    assert error == pytest.approx(0.15)
    (part,) = bins
    assert (part["accuracy"], part["num_pairs"]) == (0.75, 4)
    assert part["confidence"] == pytest.approx(0.9)


def test_calibration_error_weighs_bins_by_their_pairs():
    # 0.5 twice, right once (0 apart), and 0.9 once, wrong (0.9 apart): 0.9 / 3.
    error, bins = calibration_error([0.0, 1e-9, -math.log(9)])
    assert len(bins) == 2
    assert error == pytest.approx((2 * abs(0.75 - 0.5) + 0.9) / 3)


def test_certainty_belongs_to_the_last_bin():
    assert calibration_error([1e3, 50.0])[0] == pytest.approx(0.0)


def test_standard_error_of_one_value_is_0():
    assert standard_error([1.0]) == 0.0


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="expected equally many, got 2, 1 and 2"):
        preference_report([1.0, 2.0], [0.0], [1, 2])
