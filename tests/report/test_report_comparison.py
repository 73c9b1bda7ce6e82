"""Several runs: what belongs together, intervals over seeds, the frontier and the win matrix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.page_reader import ReadPage
from support.run_folders import add_alert, write_run

from dar.errors import CheckpointError, ConfigError
from dar.record.intervals import mean_interval, paired_difference, win_share
from dar.report.comparison import arms_of, final_figures, frontier, win_matrix
from dar.report.page import render_page
from dar.report.plots import Axis, Plot, Series, running_mean, thinned
from dar.report.png import picture, write_pictures
from dar.report.run import load_run, load_runs
from dar.report.text import cut, difference, duration, number, script_json, spans
from dar.report.weights import bin_name, binned
from dar.shown import visible


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """Two methods with two seeds each, as `dar compare` leaves them; the seeds differ in what they gained."""
    out = tmp_path / "compare"
    for name, method, gains in (("mine", "dar", (1.0, 2.0)), ("rloo", "rloo", (0.4, 0.6))):
        for seed, gain in enumerate(gains):
            write_run(out / f"{name}-seed{seed}", algorithm=method, seed=seed, gain=gain)
    return out


def test_runs_that_differ_in_the_seed_stand_together(compared: Path) -> None:
    arms = arms_of(load_runs([compared]))
    assert [(arm.name, [run.name for run in arm.runs]) for arm in arms] == [
        ("mine", ["mine-seed0", "mine-seed1"]),
        ("rloo", ["rloo-seed0", "rloo-seed1"]),
    ]


def test_runs_of_a_folder_stand_in_the_order_in_which_they_were_started(compared: Path) -> None:
    for at, name in enumerate(("rloo-seed0", "rloo-seed1", "mine-seed0", "mine-seed1")):
        (compared / name / "environment.json").write_text(f'{{"started": "2026-01-01T00:00:0{at}+00:00"}}')
    assert [arm.name for arm in arms_of(load_runs([compared]))] == ["rloo", "mine"]


def test_runs_given_one_by_one_are_named_after_what_sets_them_apart(tmp_path: Path) -> None:
    for name, alpha in ("a", 0.0), ("b", 0.5):
        write_run(tmp_path / name, algorithm={"type": "dar", "alpha": alpha})
    write_run(tmp_path / "c", algorithm="rloo")
    arms = arms_of(load_runs([tmp_path / name for name in "abc"]))
    assert [arm.name for arm in arms] == ["dar, alpha 0.0", "dar, alpha 0.5", "rloo"]
    # In the order of the recipe, where sampling stands before optim.
    changed: dict[str, Any] = {"sampling": {"temperature": 0.5}, "optim": {"learning_rate": 0.5}}
    write_run(tmp_path / "d", algorithm="rloo", **changed)
    assert arms_of(load_runs([tmp_path / "c", tmp_path / "d"]))[1].name == "rloo, temperature 0.5, learning_rate 0.5"


def test_final_figures_are_means_with_student_s_interval_over_seeds(compared: Path) -> None:
    # Prompt p's reward is p/100 + 0.001 on average, so the mean over four prompts is the gain + 0.016: 1.016 and 2.016.
    # s = √½, t_{1, 0.975} = 12.7062: half = 12.7062·√½/√2 = 6.3531.
    found = final_figures(arms_of(load_runs([compared]))[0])["reward"]
    assert (found.mean, found.half_width) == pytest.approx((1.516, 6.353102368))
    page = ReadPage(render_page(load_runs([compared])))
    table = {row[0]: row[1:] for row in page.table("recipe")}
    assert table["mine"][:2] == ["2", "+1.516 ± 6.353"]
    assert table["rloo"][1] == "+0.516 ± 1.271"


def test_frontier_is_the_mean_over_seeds_with_their_range(compared: Path) -> None:
    plot = frontier(arms_of(load_runs([compared])))
    assert plot is not None
    (mine,) = [series for series in plot.series if series.name == "mine (2 seeds)"]
    assert mine.x == [0.0, 1.5, 3.0]
    assert mine.y == pytest.approx([0.016, 0.766, 1.516])
    assert mine.low == pytest.approx([0.016, 0.516, 1.016])
    assert mine.high == pytest.approx([0.016, 1.016, 2.016])
    assert [series.name for series in plot.series if series.is_faint][:2] == ["mine-seed0", "mine-seed1"]


def test_gold_has_a_frontier_of_its_own(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / name, algorithm=name, gold=name == "dar") for name in ("dar", "rloo")])
    plot = frontier(arms_of(runs), "gold")
    assert plot is not None
    assert (plot.name, plot.y.title) == ("frontier_gold", "held-out gold reward, not trained on")
    assert [series.name for series in plot.series] == ["dar"]
    # The gold reward is 0.5 less the reward, of which the evaluations' means are 0.016, 0.516 and 1.016.
    assert plot.series[0].y == pytest.approx([0.484, -0.016, -0.516])


def test_win_matrix_counts_prompts_and_mirrors_itself(compared: Path) -> None:
    arms = arms_of(load_runs([compared]))
    matrix = win_matrix(arms)
    ours, theirs = matrix[0][1], matrix[1][0]
    assert ours is not None
    assert theirs is not None
    assert matrix[0][0] is None
    assert (ours.share, ours.count, theirs.share) == (1.0, 4, 0.0)
    # Wilson at 4 of 4: low = n/(n + z²) = 4/(4 + 3.841459) = 0.510109.
    assert (ours.low, ours.high) == pytest.approx((0.5101091, 1.0))
    page = ReadPage(render_page(load_runs([compared])))
    assert page.table("row beats column")[0] == ["mine", "–", "100.0 % 51–100 %"]


def test_runs_that_are_not_finished_are_named_with_what_stopped_them(tmp_path: Path) -> None:
    for name in ("whole", "cut", "going"):
        write_run(tmp_path / name, steps=6 if name == "whole" else 4, evaluations=(0, 3))
    add_alert(tmp_path / "cut", step=4, rule="missing_eos", action="stop")
    page = ReadPage(render_page(load_runs([tmp_path / name for name in ("whole", "cut", "going")])))
    assert "cut (4 of 6 steps, stopped by the alert missing_eos), going (4 of 6 steps)." in page.prose


def test_other_prompts_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "a", algorithm="dar", num_prompts=1)
    write_run(tmp_path / "b", algorithm="rloo", evaluations=())
    page = ReadPage(render_page(load_runs([tmp_path / "a", tmp_path / "b"])))
    assert "Who beats whom" not in page.prose


def test_shares_and_means() -> None:
    found = win_share({"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 0.0, "b": 2.0, "d": 9.0})
    assert found is not None
    assert (found.share, found.count) == (0.75, 2)
    assert win_share({"a": 1.0}, {"b": 1.0}) is None
    assert mean_interval([2.0]).half_width is None
    difference = paired_difference({"a": 1.0, "b": 2.0}, {"b": 2.5, "a": 2.5})
    assert difference is not None
    # Differences 1.5 and 0.5: mean 1, s = √½, half = 12.7062·½ = 6.3531.
    assert (difference.mean, difference.half_width) == pytest.approx((1.0, 6.353102368))
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_weights_fall_into_the_bin_that_begins_at_them() -> None:
    shares = binned([0.0, 0.0005, 0.2, 0.19999999, 20.0, 7.0, 1e9, 0.001, -3.0, -1e-9])
    found = {bin_name(index): share for index, share in enumerate(shares) if share}
    several = {"< 0": 0.2, "< 0.001": 0.2, "≥ 0.2": 0.2}
    assert found == several | {"≥ 0.001": 0.1, "≥ 5": 0.1, "≥ 20": 0.1, "≥ 50000": 0.1}


def test_texts_and_numbers_of_the_page() -> None:
    assert [number(-0.5, "+.3f"), number(0.125, ".1%"), number(1234.5, ",.1f")] == [
        "−0.500",
        "12.5 %",
        "1\u202f234.5",
    ]
    assert number(None) == "–"
    assert [difference(0.5, ".1%"), difference(-0.5), difference(2.0, "+.3f")] == [
        "+50.0 %",
        "−0.500",
        "+2.000",
    ]
    assert [duration(0.04), duration(59.96), duration(125), duration(3 * 3600 + 59.7)] == [
        "0.04 s", "1 min 00 s", "2 min 05 s", "3 h 01 min",
    ]  # fmt: skip
    assert [number(-0.0004, "+.3f"), number(-0.04, ",.1f"), difference(-0.0004, ".1%")] == ["+0.000", "0.0", "+0.0 %"]
    assert spans([9, 3, 4, 5, 4, 1000]) == "3–5, 9, 1\u202f000"
    assert visible("a\tb\n\r\x85\u2066") == "a\tb\n␍[U+0085][LRI]"
    assert cut("abc", 2) == ("ab", 1)
    assert script_json({"a": "</script>&\u2028"}) == '{"a":"\\u003c/script\\u003e\\u0026\\u2028"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(math.nan)


def test_thinning_keeps_both_ends_and_running_means_start_short() -> None:
    assert thinned(5, 10) == [0, 1, 2, 3, 4]
    assert thinned(101, 5) == [0, 25, 50, 75, 100]
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_lines_differ_in_more_than_color_and_steps_are_whole() -> None:
    lines = [Series(f"{color}", [0, 1], [0.0, 1.0], color, "line+points") for color in range(9)]
    axes = picture(Plot("p", "P", Axis("step", is_whole=True), Axis("y"), lines)).axes[0]
    looks = {(str(line.get_marker()), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == 9
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_ticks_of_a_square_root_axis_do_not_touch() -> None:
    plot = Plot("p", "P", Axis("x", scale="sqrt"), Axis("y"), [Series("s", [0.0, 23.0], [0.0, 1.0])])
    # √23 = 4.8, so 7 % of the axis is 0.34: 0.5 (0.71) is 0.29 from 1 and left out, 0.25 (0.5) stays.
    assert plot.x_ticks() == [0, 0.25, 1, 2, 4, 8, 16]


def test_every_plot_becomes_a_picture(compared: Path, tmp_path: Path) -> None:
    written = write_pictures(load_runs([compared]), tmp_path / "several")
    assert {file.name for file in written} >= {"frontier.png", "reward.png", "kl.png"}
    run = load_run(write_run(tmp_path / "one"))
    names = {file.stem for file in write_pictures([run], tmp_path / "single")}
    assert names == set(ReadPage(render_page([run])).data["plots"])
    assert all((tmp_path / "single" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none is not there. Give the output_dir of a run"):
        load_runs([tmp_path / "none"])
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ConfigError, match=r"recipe.yaml is a recipe, and a report is of what came of one"):
        load_runs([tmp_path / "recipe.yaml"])
    folder = write_run(tmp_path / "run")
    (folder / "model").mkdir()
    with pytest.raises(
        ConfigError, match=r"model is not a run folder: it has no config.yaml, .*\. Its run is .*/run\."
    ):
        load_runs([folder / "model"])
    with pytest.raises(ConfigError, match="is given twice"):
        load_runs([folder, tmp_path / "." / "run"])
    (folder / "alerts.jsonl").write_text('{"step": 1}\n{"half')
    with pytest.raises(CheckpointError, match=r"alerts.jsonl: an alert without 'rule': \{'step': 1\}"):
        load_run(folder)
    (folder / "alerts.jsonl").unlink()
    (folder / "completions" / "step-2.parquet").write_text("no parquet")
    with pytest.raises(CheckpointError, match=r"step-2.parquet cannot be read"):
        render_page([load_run(folder)])
    (folder / "environment.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"environment.json: it is not JSON"):
        load_run(folder)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_no_formulas_and_do_nothing_in_pictures_and_in_the_page(tmp_path: Path) -> None:
    runs = load_runs(
        [
            write_run(tmp_path / name, algorithm={"type": "dar", "alpha": number / 10})
            for number, name in enumerate((r"$\frac{$-seed0", "a$b$-seed0", "\x1b[31m\u202e-seed0"))
        ]
    )
    plot = frontier(arms_of(runs))
    assert plot is not None
    names = [r"$\frac{$", "a$b$", "␛[31m[RLO]"]
    assert [series.name for series in plot.series] == names
    figure = picture(plot)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    figure.savefig(tmp_path / "names.png")
    page = render_page(runs)
    assert not set("\x1b\u202e") & set(page.partition("<main>")[2].partition("</main>")[0])
    assert "\u202e" not in page.partition('id="report-data">')[2].partition("</script>")[0]
