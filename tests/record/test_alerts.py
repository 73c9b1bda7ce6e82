"""Each alert's rule, on histories short enough to work out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.handmade import make_spec

from dar.config.alerts import (
    AnyAlert,
    EntropyAlertSpec,
    KLAlertSpec,
    LengthDriftAlertSpec,
    MissingEosAlertSpec,
    NoSignalAlertSpec,
    OveroptimizationAlertSpec,
    RepetitionAlertSpec,
    RetentionAlertSpec,
)
from dar.errors import ConfigError
from dar.record.alerts import Alert, check, metrics_read, newly_fired


def lines(rule: AnyAlert, values: Sequence[float]) -> list[dict[str, float]]:
    """A history of the one metric that a rule reads, from step 1."""
    (key,) = metrics_read(rule)
    return [{"step": step, key: value} for step, value in enumerate(values, start=1)]


def evaluations(*points: tuple[int, float, float]) -> list[dict[str, float]]:
    """(step, reward, held-out reward) of each."""
    return [{"step": step, "eval/reward": reward, "eval/gold": gold} for step, reward, gold in points]


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "key", "value", "message"),
    [
        (
            MissingEosAlertSpec(max=0.5, window=2),
            "completions/clipped_ratio",
            0.625,
            "62% of completions ran out of room before they ended (training, mean of 2 steps; limit 50%)",
        ),
        (
            KLAlertSpec(max=20.0, window=2),
            "kl/ref",
            25.0,
            "the policy is 25 nats per completion away from π₀ (training, mean of 2 steps; limit 20)",
        ),
        (
            RepetitionAlertSpec(max=0.5, window=2, samples="heldout"),
            "eval/completions/repetition",
            0.75,
            "75% of a completion is its longest repeated part (held-out, mean of 2 evaluations; limit 50%)",
        ),
        (
            NoSignalAlertSpec(max=0.5, window=2),
            "frac_reward_zero_std",
            0.75,
            "75% of groups have no difference in reward, so nothing is learned from them (training, mean of 2 steps; "
            "limit 50%)",
        ),
    ],
)
def test_mean_of_the_window_above_the_limit_is_an_alert(rule: Any, key: str, value: float, message: str):
    limit = rule.max
    # The window's mean is (limit + 2 · value − limit) / 2 = value; what came before the window does not count.
    history = lines(rule, [100.0, limit, 2 * value - limit])
    assert check(rule, history) == Alert(3, rule.type, "mark", key, value, limit, message)


@pytest.mark.parametrize("rule", [MissingEosAlertSpec(max=0.5), KLAlertSpec(max=0.5), RepetitionAlertSpec(max=0.5)])
def test_limit_itself_is_allowed_and_a_short_history_says_nothing(rule: AnyAlert):
    assert rule.window == 4
    assert check(rule, lines(rule, [0.5] * 4)) is None
    assert check(rule, lines(rule, [1.0] * 3)) is None
    assert check(rule, lines(rule, [1.0] * 4)) is not None
    assert check(rule, []) is None


def test_limit_of_one_can_never_be_passed_by_a_share():
    rule = MissingEosAlertSpec(max=1.0, window=1)
    assert check(rule, lines(rule, [1.0])) is None


# --- relative to the start -------------------------------------------------------------------------------------------


def test_length_is_compared_with_the_first_window():
    rule = LengthDriftAlertSpec(max_ratio=2.0, window=2)
    # Start (8 + 12) / 2 = 10; end (19 + 22) / 2 = 20.5.
    longer = lines(rule, [8.0, 12.0, 40.0, 19.0, 22.0])
    assert check(rule, longer) == Alert(
        5, "length_drift", "mark", "completions/mean_length", 2.05, 2.0,
        "completions have 20.5 tokens, 2 times the 10.0 of the start (training, mean of 2 steps; limit 2)",
    )  # fmt: skip
    assert check(rule, lines(rule, [8.0, 12.0, 18.0, 22.0])) is None  # exactly twice


def test_length_that_shrinks_drifts_too():
    rule = LengthDriftAlertSpec(max_ratio=2.0, window=1)
    alert = check(rule, lines(rule, [40.0, 16.0]))
    assert alert is not None
    assert (alert.value, alert.threshold) == (0.4, 0.5)
    assert alert.message == "completions have 16.0 tokens, 0.4 times the 40.0 of the start (training; limit 0.5)"
    assert check(rule, lines(rule, [40.0, 20.0])) is None


def test_entropy_is_compared_with_the_first_window():
    rule = EntropyAlertSpec(min_ratio=0.25, window=2, action="log")
    alert = check(rule, lines(rule, [3.0, 5.0, 0.5, 0.5]))
    assert alert == Alert(
        4, "entropy", "log", "entropy", 0.125, 0.25,
        "the entropy is 0.5 nats per token, 0.12 times the 4 of the start (training, mean of 2 steps; limit 0.25)",
    )  # fmt: skip
    assert check(rule, lines(rule, [3.0, 5.0, 1.0, 1.0])) is None  # exactly a quarter
    assert check(rule, lines(rule, [3.0, 5.0, 9.0, 9.0])) is None


def test_policy_that_was_certain_from_the_start_has_no_entropy_to_lose():
    rule = EntropyAlertSpec(window=1)
    assert check(rule, lines(rule, [0.0, 0.0])) is None


# --- proxy and gold --------------------------------------------------------------------------------------------------


def test_proxy_up_while_gold_falls():
    """Lines through three points at equal distances change by last − first: +2 and −1 here."""
    rule = OveroptimizationAlertSpec(min_fall=0.5)
    history = evaluations((0, 9.0, -9.0), (10, 1.0, 5.0), (20, 4.0, 5.5), (30, 3.0, 4.0))
    # Exact: the numbers are small halves, and the steps' mean is 20.
    assert check(rule, history) == Alert(
        30, "overoptimization", "mark", "eval/gold", -1.0, -0.5,
        "the reward rose by 2 while the held-out reward fell by 1 "
        "(steps 10 to 30, lines fitted to 3 evaluations; limits 0 and 0.5)",
    )  # fmt: skip


def test_line_is_fitted_over_steps_and_not_over_their_number():
    """Steps 0, 10, 40 (mean 50/3): deviations −50, −20, 70 thirds, their squares 7800/9.

    Gold 0, 0, −3 has slope Σ dev·gold / Σ dev² = (−70) / (7800/9) = −0.0808 and falls by 40 · 0.0808 = 3.23.
    """
    rule = OveroptimizationAlertSpec(min_fall=3.2)
    history = evaluations((0, 0.0, 0.0), (10, 1.0, 0.0), (40, 2.0, -3.0))
    alert = check(rule, history)
    assert alert is not None
    assert alert.value == pytest.approx(-40 * 70 / (7800 / 9))
    assert check(OveroptimizationAlertSpec(min_fall=3.3), history) is None


@pytest.mark.parametrize(
    "history",
    [
        evaluations((0, 0.0, 0.0), (1, 1.0, 1.0), (2, 2.0, 2.0)),  # both rise
        evaluations((0, 2.0, 2.0), (1, 1.0, 1.0), (2, 0.0, 0.0)),  # both fall
        evaluations((0, 2.0, 0.0), (1, 1.0, 1.0), (2, 0.0, 2.0)),  # gold rises, proxy falls
        evaluations((0, 0.0, 2.0), (1, 0.0, 1.0), (2, 0.0, 0.0)),  # proxy stands
        evaluations((0, 0.0, 0.5), (1, 1.0, 0.25), (2, 2.0, 0.0)),  # falls by no more than min_fall
        evaluations((0, 0.0, 2.0), (1, 9.0, -9.0)),  # shorter than the window
    ],
)
def test_no_overoptimization(history: list[dict[str, float]]):
    assert check(OveroptimizationAlertSpec(min_fall=0.5), history) is None


def test_rise_below_min_rise_is_none():
    history = evaluations((0, 0.0, 2.0), (1, 1.0, 1.0), (2, 2.0, 0.0))
    assert check(OveroptimizationAlertSpec(min_fall=0.5, min_rise=1.9), history) is not None
    assert check(OveroptimizationAlertSpec(min_fall=0.5, min_rise=2.0), history) is None


# --- retention ------------------------------------------------------------------------------------------------------


def test_score_is_compared_with_the_first_evaluation_and_not_with_the_best():
    rule = RetentionAlertSpec(task="piqa", max_drop=0.25)
    assert check(rule, lines(rule, [0.75])) is None
    assert check(rule, lines(rule, [0.75, 1.0, 0.5])) is None  # exactly as much as may be
    assert check(rule, lines(rule, [0.75, 0.25, 0.375])) == Alert(
        3, "retention", "mark", "eval/retention/piqa", -0.375, -0.25,
        "piqa fell from 0.75 to 0.375 (step 1 to step 3; limit 0.25)",
    )  # fmt: skip


def test_retention_needs_no_held_out_prompts_and_one_alert_a_task():
    make_spec(alerts=[{"type": "retention", "task": "piqa", "max_drop": 0.1}])
    with pytest.raises(ConfigError, match="two of type retention watch one of piqa, piqa"):
        make_spec(alerts=[{"type": "retention", "task": "piqa", "max_drop": drop} for drop in (0.1, 0.2)])


# --- once ------------------------------------------------------------------------------------------------------------


def test_rule_that_stays_broken_fires_once_and_again_after_it_has_held():
    rule = KLAlertSpec(max=1.0, window=1)
    history = lines(rule, [0.5, 2.0, 3.0, 1.0, 2.0, 0.0])
    fired = [newly_fired(rule, history[:count]) is not None for count in range(1, 7)]
    assert fired == [False, True, False, False, True, False]


def test_rule_that_is_broken_from_the_first_line_fires_there():
    rule = KLAlertSpec(max=1.0, window=1)
    assert newly_fired(rule, lines(rule, [2.0])) is not None
