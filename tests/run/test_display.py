"""The lines of a run's steps: what stands in them, how they fit the terminal, and the time that is left."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

from dar.console import Console, about
from dar.run import display as module
from dar.run.display import Display

ONLINE = {
    "reward": -0.0001,
    "loss": 9.0,
    "kl/ref": -0.0004,
    "completions/mean_length": 47.96,
    "completions/clipped_ratio": 0.5,
    "frac_reward_zero_std": 0.25,
    "weights/ess_fraction": 0.3,
    "grad_norm": 24.89,
    "step_time": 7.25,
}
DPO = {"loss": 0.6931, "rewards/accuracies": 0.5, "rewards/margins": 0.01, "grad_norm": 1.0, "step_time": 1.0}


def lines_of(steps: Mapping[int, Mapping[str, float]], *, width: int = 80, num_steps: int = 100) -> list[str]:
    file = io.StringIO()
    display = Display(num_steps=num_steps, console=Console(file=file, width=width))
    for step, metrics in steps.items():
        display.step(step, metrics, shown=True)
    return file.getvalue().splitlines()


def table_of(lines: list[str]) -> list[str]:
    return lines[next(index for index, line in enumerate(lines) if line.lstrip().startswith("step")) :]


def test_columns_stand_under_one_header_and_fit_into_80():
    found = table_of(lines_of({1: ONLINE, 100: ONLINE}))
    assert " ".join(found[0].split()) == "step reward KL π₀ length no EOS tied ESS grad norm s left"
    assert len(found) == 3
    assert {len(line) for line in found} == {79}
    # No figure is −0, the loss of a method that maximises rewards is left out.
    assert " ".join(found[1].split()[:-2]) == "1/100 +0.000 0.000 48.0 50% 25% 30% 24.89 7.2"


def test_a_cut_of_ranks_is_told_once():
    ranks = {"lora/rank_min": 3, "lora/rank_mean": 4.5, "lora/rank_max": 6}
    found = lines_of({2: {**ONLINE, **ranks, "lora/cut": 14}, 3: {**ONLINE, **ranks, "lora/cut": 0}})
    assert [line for line in found if "ranks" in line] == [
        "step 2 cut 14 adapters: ranks are 3 to 6 now, 4.5 in the mean"
    ]


def test_a_narrow_terminal_leaves_out_what_matters_least():
    found = table_of(lines_of({1: ONLINE}, width=60))
    assert " ".join(found[0].split()) == "step reward KL π₀ length no EOS tied left"
    assert len(found[0]) <= 60


def test_pairs_show_loss_accuracy_and_margin_and_a_dash_where_a_step_has_none():
    without = {key: value for key, value in DPO.items() if not key.startswith("rewards/")}
    found = table_of(lines_of({1: DPO, 2: without}))
    assert " ".join(found[0].split()) == "step loss accuracy margin grad norm s left"
    assert [line.split()[1:4] for line in found[1:]] == [["0.6931", "50%", "+0.010"], ["0.6931", "–", "–"]]


def test_what_the_columns_are_is_said_once_and_again_where_one_is_new():
    found = lines_of({1: ONLINE, 2: ONLINE, 3: {**ONLINE, "rewards/accuracies": 0.5}}, width=300)
    assert [line for line in found if "before clipping" in line] == [found[0]]
    assert "accuracy: share of pairs" in found[4]
    assert [line.split()[0] for line in found[1:]] == ["step", "1/100", "2/100", "accuracy:", "step", "3/100"]


@pytest.mark.parametrize("key", ["frac_reward_zero_std", "pairs/tied_fraction"])
def test_a_step_without_any_signal_says_so(key: str):
    assert not any("no signal" in line for line in lines_of({1: {**ONLINE, key: 0.99}}))
    assert "no signal" in lines_of({1: {**ONLINE, key: 1.0}})[-1]


def test_time_left_is_by_the_pace_since_the_first_step_began(monkeypatch: pytest.MonkeyPatch):
    now, file = 100.0, io.StringIO()
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    display = Display(num_steps=7, console=Console(file=file))
    display.step(5, {"step_time": 10.0}, shown=True)  # the first of a run that was resumed
    now = 120.0  # an evaluation of 10 s, and another step
    display.step(6, {"step_time": 10.0}, shown=True)
    assert [line[-4:] for line in file.getvalue().splitlines()[-2:]] == ["20 s", "15 s"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5969, "99 min"), (12600, "3.5 h")]
)
def test_estimated_times_are_short(seconds: float, text: str):
    assert about(seconds) == text
