"""Alerts and the best checkpoint in a recipe: names, bounds, and settings that would watch nothing."""

from __future__ import annotations

from typing import Any

import pytest
from support.handmade import make_spec

from dar.config.alerts import EntropyAlertSpec, KLAlertSpec, MissingEosAlertSpec
from dar.config.recipe import apply_override, build_spec, dump_recipe, load_recipe
from dar.config.run import BestSpec
from dar.errors import ConfigError

HELDOUT: dict[str, Any] = {"train": "t.jsonl", "heldout": "h.jsonl"}
GOLD: dict[str, Any] = {"rewards": [{"type": "length", "target": 4}]}


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_spec(**{"steps": 100, **changes})
    return str(caught.value)


def test_alerts_are_names_or_mappings():
    spec = make_spec(steps=10, alerts=["missing_eos", {"type": "kl", "max": 20.0, "action": "stop"}, "entropy"])
    assert spec.alerts == [MissingEosAlertSpec(), KLAlertSpec(max=20.0, action="stop"), EntropyAlertSpec()]
    assert {alert.action for alert in spec.alerts} == {"mark", "stop"}
    assert make_spec().alerts == []


def test_alerts_survive_the_resolved_recipe(tmp_path: Any):
    spec = make_spec(data=HELDOUT, steps=10, alerts=["missing_eos", {"type": "length_drift", "max_ratio": 3.0}])
    (tmp_path / "config.yaml").write_text(dump_recipe(spec))
    assert load_recipe(tmp_path / "config.yaml") == spec


def test_overrides_reach_into_names():
    raw: dict[str, Any] = {"model": "m", "data": HELDOUT, "rewards": ["sentiment"], "steps": 10, "output_dir": "run"}
    raw |= {"alerts": ["missing_eos"], "checkpoint": {"best": "eval/reward"}}
    for override in ("alerts.0.max=0.25", "checkpoint.best.mode=min"):
        apply_override(raw, override)
    spec = build_spec(raw, where="recipe.yaml")
    assert spec.alerts == [MissingEosAlertSpec(max=0.25)]
    assert spec.checkpoint.best == BestSpec(metric="eval/reward", mode="min")


def alert(kind: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"type": kind, **settings}]


ALLOWED = "(did you mean 'missing_eos'?); allowed: missing_eos, kl"


@pytest.mark.parametrize(
    ("alerts", "expected"),
    [
        ("missing_eos", "alerts: expected a list of alerts, for example [missing_eos, {type: kl, max: 20}]"),
        (["missing_eso"], f"alerts.0: unknown type 'missing_eso' {ALLOWED}"),
        ([{"max": 0.5}], "alerts.0: the key 'type' is required"),
        (["kl"], "alerts.0.max: this key is required"),
        (["overoptimization"], "alerts.0.min_fall: this key is required"),
        (alert("kl", max=0.0), "alerts.0.max: Input should be greater than 0 (found 0.0)"),
        (alert("missing_eos", max=1.5), "alerts.0.max: Input should be less than or equal to 1 (found 1.5)"),
        (alert("repetition", max=-0.1), "alerts.0.max: Input should be greater than or equal to 0 (found -0.1)"),
        (alert("length_drift", max_ratio=1.0), "alerts.0.max_ratio: Input should be greater than 1 (found 1.0)"),
        (alert("entropy", min_ratio=1.0), "alerts.0.min_ratio: Input should be less than 1 (found 1.0)"),
        (alert("entropy", window=0), "alerts.0.window: Input should be greater than or equal to 1 (found 0)"),
        (alert("overoptimization", min_fall=1.0, window=1), "window: Input should be greater than or equal to 2"),
        (alert("entropy", action="halt"), "alerts.0.action: Input should be 'log', 'mark' or 'stop' (found 'halt')"),
        (alert("entropy", samples="test"), "alerts.0.samples: Input should be 'train' or 'heldout' (found 'test')"),
        (alert("entropy", min_ration=0.5), "alerts.0: unknown key 'min_ration' (did you mean 'min_ratio'?)"),
    ],
)
def test_impossible_alert_is_named(alerts: Any, expected: str):
    assert expected in problem(alerts=alerts)


ON_HELDOUT = {"alerts": alert("missing_eos", samples="heldout")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (ON_HELDOUT, "missing_eos) could never fire: it reads held-out evaluations, but no held-out prompts are"),
        ({"alerts": alert("overoptimization", min_fall=1.0), "data": HELDOUT},
         "alerts.0 (overoptimization) could never fire: it compares the reward with a held-out one, but "
         "evaluation.rewards is empty"),
        ({"alerts": ["missing_eos", *alert("entropy", samples="heldout", window=1)], "data": HELDOUT,
          "evaluation": {"greedy": True}},
         "alerts.1 (entropy) could never fire: held-out prompts are decoded greedily or truncated, where this is "
         "not measured: use samples: train"),
        ({"alerts": alert("kl", max=9.0, samples="heldout"), "data": HELDOUT, "evaluation": {"top_p": 0.9}},
         "alerts.0 (kl) could never fire: held-out prompts are decoded greedily"),
        ({"alerts": ["missing_eos"], "algorithm": "sft"},
         "alerts.0 (missing_eos) could never fire: the method samples nothing in training: use samples: heldout"),
        # The best checkpoint.
        ({"checkpoint": {"best": "eval/reward"}},
         "checkpoint.best compares held-out evaluations, but data.heldout names no prompts"),
        ({"checkpoint": {"best": "eval/rewrad"}, "data": HELDOUT},
         "checkpoint.best.metric: unknown metric 'eval/rewrad' (did you mean 'eval/reward'?); allowed: eval/reward, "
         "eval/rewards/sentiment/mean"),
        ({"checkpoint": {"best": "eval/gold"}, "data": HELDOUT},
         "checkpoint.best.metric: unknown metric 'eval/gold'"),
        ({"checkpoint": {"best": {"mode": "maximum"}}, "data": HELDOUT},
         "checkpoint.best.mode: Input should be 'max' or"),
    ],
)  # fmt: skip
def test_what_would_see_nothing_is_refused(changes: dict[str, Any], expected: str):
    assert expected in problem(**changes)


@pytest.mark.parametrize(("every", "steps", "count"), [(0, 7, 2), (3, 7, 4), (3, 6, 3), (7, 7, 2), (1, 3, 4)])
def test_evaluations_are_counted_as_they_are_made(every: int, steps: int, count: int):
    """Before the first step, after every so many, and after the last: with every 3 of 7, after 0, 3, 6 and 7."""
    keys: dict[str, Any] = {"data": HELDOUT, "evaluation": {"every": every}, "steps": steps}
    windows = [{"type": "missing_eos", "samples": "heldout", "window": window} for window in (count, count + 1)]
    assert make_spec(**keys, alerts=windows).silent_alerts == [
        f"the alert missing_eos cannot fire: its window is {count + 1}, but the run has {count} evaluations"
    ]


def test_run_that_is_only_tried_says_which_alerts_cannot_fire():
    spec = make_spec(steps=2, alerts=["missing_eos", {"type": "kl", "max": 9.0, "window": 2}])
    assert spec.silent_alerts == ["the alert missing_eos cannot fire: its window is 4, but the run has 2 steps"]


# --- the best checkpoint ---------------------------------------------------------------------------------------------


def test_best_may_be_any_reward_that_is_measured():
    for metric in ("eval/reward", "eval/rewards/sentiment/mean", "eval/gold", "eval/gold/length/mean"):
        spec = make_spec(data=HELDOUT, evaluation=GOLD, checkpoint={"best": metric})
        assert spec.checkpoint.best == BestSpec(metric=metric, mode="max")
