"""The page: every figure in it is one of the run folder, and nothing in it can do anything."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from support.page_reader import ReadPage
from support.run_folders import add_alert, recorded_run, write_run
from typer.testing import CliRunner

from dar.cli.app import app
from dar.config.recorded import RecordedSpec
from dar.record.folder import RunFolder
from dar.report.completions import browser_of
from dar.report.page import render_page
from dar.report.run import load_run, load_runs
from dar.report.text import duration, number


def page_of(*folders: Path) -> ReadPage:
    return ReadPage(render_page(load_runs(folders)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", gold=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return RunFolder(folder).metrics()


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder) if "eval/reward" in row]


def test_every_metric_is_in_the_page_as_it_was_recorded(folder: Path) -> None:
    expected: dict[str, list[list[float]]] = {}
    for row in rows_of(folder):
        for key in row.keys() - {"step"}:
            expected.setdefault(key, [[], []])
            expected[key][0].append(row["step"])
            expected[key][1].append(row[key])
    assert page_of(folder).data["metrics"] == expected


@pytest.mark.parametrize(
    ("plot", "series", "key"),
    [
        ("reward", "training batch", "reward"),
        ("reward", "held-out", "eval/reward"),
        ("kl", "training batch", "kl/ref"),
        ("kl", "held-out", "eval/kl/ref"),
        ("kl_old", "training batch", "kl/old_k3"),
        ("length", "training batch", "completions/mean_length"),
        ("length", "held-out", "eval/completions/mean_length"),
        ("eos", "training batch", "completions/clipped_ratio"),
        ("eos", "held-out", "eval/completions/clipped_ratio"),
        ("entropy", "held-out", "eval/entropy"),
        ("distinct", "training batch", "completions/distinct_2"),
        ("weight_shares", "effective sample size", "weights/ess_fraction"),
        ("weight_shares", "at the clip", "weights/clip_fraction"),
        ("weight_shares", "below 0.01", "weights/zero_fraction"),
        ("w_reg", "mean of log w_reg", "weights/log_w_reg_mean"),
        ("time", "sampling", "time/rollout"),
        ("time", "update", "time/update"),
    ],
)
def test_curves_are_the_metrics(folder: Path, plot: str, series: str, key: str) -> None:
    (found,) = [line for line in page_of(folder).data["plots"][plot]["series"] if line["name"] == series]
    rows = [row for row in rows_of(folder) if key in row]
    assert (found["x"], found["y"]) == ([row["step"] for row in rows], [row[key] for row in rows])


def test_proxy_and_gold_stand_over_the_square_root_of_kl(folder: Path) -> None:
    plot = page_of(folder).data["plots"]["overoptimization"]
    proxy, gold = plot["series"]
    rows = evaluations(folder)
    assert plot["x"]["scale"] == "sqrt"
    assert proxy["x"] == gold["x"] == [row["eval/kl/ref"] for row in rows] == [0.0, 1.5, 3.0]
    assert proxy["y"] == [row["eval/reward"] for row in rows]
    assert gold["y"] == [row["eval/gold"] for row in rows]


def test_without_a_gold_reward_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert len(page.data["plots"]["overoptimization"]["series"]) == 1
    assert "The run has no gold reward" in page.prose
    assert "gold reward" not in " ".join(row[0] for row in page.table("held-out"))


def test_table_of_results_shows_the_first_and_the_last_evaluation(folder: Path) -> None:
    first, last = evaluations(folder)[0], evaluations(folder)[-1]
    table = {row[0]: row[1:] for row in page_of(folder).table("held-out")}
    cases: tuple[tuple[str, str, str], ...] = (
        ("reward", "eval/reward", "+.3f"),
        ("first", "eval/rewards/first/mean", "+.3f"),
        ("gold reward, not trained on", "eval/gold", "+.3f"),
        ("KL to π₀, nats per completion", "eval/kl/ref", ".3f"),
        ("length, tokens", "eval/completions/mean_length", ",.1f"),
        ("missing EOS", "eval/completions/clipped_ratio", ".1%"),
        ("entropy, nats per token", "eval/entropy", ".3f"),
    )
    for label, key, form in cases:
        assert table[label][:2] == [number(first[key], form), number(last[key], form)]
    # Every prompt's mean rises by exactly 1, so the paired interval is a point although the prompts differ.
    assert table["reward"][2] == "+1.000 ± 0.000"
    assert table["length, tokens"][2] == "+0.0 ± 0.0"
    assert table["missing EOS"][2] == "+0.0 points ± 0.0 points"
    assert table["entropy, nats per token"][2] == "–"


def test_the_same_prompts_are_shown_before_and_after_with_the_temperature(folder: Path) -> None:
    assert "Drawn to be read" not in page_of(folder).prose
    for step, text in (0, "<b>dull</b>"), (6, "bright\u202e"):
        columns = {"prompt": ["Say <i>it</i>."], "completion": [text], "temperature": [0.304]}
        RunFolder(folder).write_completions(f"to-read-step-{step}", columns)
    page = page_of(folder)
    assert page.table("held-out prompt") == [["Say <i>it</i>.", "<b>dull</b>", "bright[RLO]"]]
    assert "Drawn to be read, at temperature 0.30; every figure above is of completions at" in page.prose


def test_headline_says_before_after_and_the_interval(folder: Path) -> None:
    # Prompt p's mean reward is p/100 + 0.001, the mean over p = 0…3 is 0.016.
    prose = page_of(folder).prose
    assert "Held-out reward +0.016 → +1.016, a change of +1.000 ± 0.000 (95 % interval over 4 held-out prompts" in prose


def test_time_and_tokens_add_up(folder: Path) -> None:
    page = page_of(folder)
    phases = {row[0]: row[1:] for row in page.table("phase")}
    steps = [row for row in rows_of(folder) if "loss" in row]
    update = math.fsum(row["time/update"] for row in steps)
    # Six steps of 7 s and three evaluations of 4 s; rollouts take 3 s of each step.
    assert phases["sampling"] == ["18.0 s", number(18 / 54, ".1%")]
    assert phases["update"] == [f"{update:.1f} s", number(update / 54, ".1%")]
    assert phases["rest of the steps"][0] == duration(42 - 18 - update)
    assert phases["held-out evaluation"] == ["12.0 s", number(12 / 54, ".1%")]
    assert phases["all steps and evaluations"][0] == "54.0 s"
    budget = {row[0]: row[1] for row in page.table("budget")}
    tokens = sum(row["tokens/completion"] for row in steps)
    assert budget["completion tokens"] == str(tokens)
    assert budget["prompt tokens, each prompt once"] == "240"
    assert budget["sampling speed"] == f"{tokens / 18:.1f} tokens/s"
    assert budget["peak memory"] == "1.06 GB"


def test_histogram_of_weights_is_of_the_recorded_completions(folder: Path) -> None:
    heatmap = page_of(folder).data["plots"]["weights"]["heatmap"]
    assert heatmap["x"] == [2, 4, 6]
    assert {heatmap["y"][0], heatmap["y"][-1]} <= {"< 0.001", "≥ 0.2", "≥ 1", "≥ 20"}
    run = load_run(folder)
    for column, file in enumerate(file for file in run.completions if not file.is_heldout):
        weights = file.read(["weight"])["weight"].to_pylist()
        for name, row in zip(heatmap["y"], heatmap["z"], strict=True):
            value = {"< 0.001": 0.0, "≥ 0.2": 0.2, "≥ 1": 1.0, "≥ 20": 20.0}.get(name)
            assert row[column] == pytest.approx(weights.count(value) / len(weights) if value is not None else 0.0)


def test_recipe_and_environment_are_shown_whole(folder: Path) -> None:
    text = page_of(folder).text
    assert (folder / "config.yaml").read_text(encoding="utf-8").strip() in text
    assert "device: cpu" in text


def test_alerts_stand_in_the_headline_and_in_the_curves(folder: Path) -> None:
    add_alert(folder, step=4, rule="missing_eos", message="<b>40 %</b> without EOS", action="stop")
    page = page_of(folder)
    assert "missing_eos, step 4: <b>40 %</b> without EOS (stop)" in page.prose
    assert page.data["plots"]["reward"]["marks"] == [4]
    assert any("stop" in (attributes.get("class") or "") for tag, attributes in page.tags if tag == "li")


def test_an_alert_that_is_raised_again_stands_once_with_its_steps(folder: Path) -> None:
    for step in (2, 3, 5):
        add_alert(folder, step=step, rule="kl", message=f"KL at {step}")
    page = page_of(folder)
    assert "kl 3 × at steps 2–3, 5; the last: KL at 5 (mark)" in page.prose
    assert len([tag for tag, _ in page.tags if tag == "li"]) == 1


def test_a_held_out_measure_that_no_curve_is_made_for_has_one(folder: Path) -> None:
    plot = page_of(folder).data["plots"]["gold"]
    assert [series["name"] for series in plot["series"]] == ["held-out"]
    assert plot["series"][0]["y"] == [row["eval/gold"] for row in evaluations(folder)]


def test_a_method_that_learns_from_pairs_shows_them_first(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", evaluations=(), sampled=False, completions_every=0, algorithm="dpo", rewards=[]
    )
    RunFolder(folder).append_metrics({"step": 7, "loss": 0.5, "rewards/accuracies": 0.75})
    for step, share in (0, 0.5), (7, 0.875):
        RunFolder(folder).append_metrics({"step": step, "eval/rewards/accuracies": share, "eval/loss": 0.25})
    plots = page_of(folder).data["plots"]
    assert [*plots] == ["accuracy", "loss", "time"]
    assert [series["y"] for series in plots["accuracy"]["series"]] == [[0.75], [0.5, 0.875]]
    assert plots["loss"]["series"][-1]["y"] == [0.25, 0.25]


def test_head_says_what_was_trained_where_and_when(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", model="some/path/to/a-model")
    (folder / "environment.json").write_text('{"started": "2026-11-30T07:05:09+00:00", "device": "cpu"}')
    prose = page_of(folder).prose
    for fact in ("modela-model", "methoddar", "started2026-11-30 07:05 UTC", "time54.0 s", "oncpu"):
        assert fact in prose


def test_a_run_that_an_alert_ended_says_so_and_one_that_went_on_does_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4, evaluations=(0,))
    add_alert(folder, step=3, rule="kl", action="stop")
    add_alert(folder, step=4, rule="entropy", action="mark")
    assert load_run(folder).stopped_by is None
    assert "4 of 6 steps done; the run is going on, or was interrupted." in page_of(folder).prose
    add_alert(folder, step=4, rule="missing_eos", action="stop")
    assert "4 of 6 steps done; stopped there by the alert missing_eos." in page_of(folder).prose

    whole = write_run(tmp_path / "whole")
    add_alert(whole, step=6, rule="kl", action="stop")
    assert load_run(whole).stopped_by is None


def test_completions_keep_all_that_was_recorded(folder: Path) -> None:
    page = page_of(folder)
    run = load_run(folder)
    assert [chunk["label"] for chunk in page.data["chunks"]] == [file.label for file in run.completions]
    for chunk, file in zip(page.data["chunks"], run.completions, strict=True):
        found, rows = page.chunk(chunk["id"]), file.read().to_pylist()
        assert found["text"] == [row["completion"] for row in rows]
        assert [found["prompts"][index] for index in found["prompt"]] == [row["prompt"] for row in rows]
        assert found["ended"] == [row["finish_reason"] == "eos" for row in rows]
        assert found["parts"].keys() >= {"first", "second"}
        assert ("gold" in found["parts"]) == file.is_heldout
        assert ("advantage" in found) == ("weight" in found) == (not file.is_heldout)
        for key in ("reward", "kl_ref"):
            assert found[key] == pytest.approx([row[key] for row in rows], rel=1e-4)
        for index, row in enumerate(rows):
            assert [found["vocabulary"][token] for token in found["tokens"][index]] == row["tokens"]
            ratios = [new - old for new, old in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
            assert [nats / 1000 for nats in found["ratio"][index]] == pytest.approx(ratios, abs=5e-4)


HOSTILE = (
    "</script><script>window.planted = 1</script><img src=x onerror='window.planted = 1'>\u202eevil\x00\x1b[31m\u2028"
)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<script>alert(1)<script>", text=HOSTILE, model=HOSTILE.replace("\x00", ""))
    RunFolder(folder).append_metrics({"step": 7, "rewards/</script><script>window.planted = 1</script>/mean": 1.0})
    add_alert(folder, message=HOSTILE)
    html = render_page([load_run(folder)])
    page = ReadPage(html)
    assert len(page.scripts) == len(page_of(write_run(tmp_path / "tame")).scripts)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "\u202e" not in html
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "[RLO]evil␀␛[31m" in page.chunk(page.data["chunks"][0]["id"])["text"][0]


def test_policy_of_the_page_lets_only_its_own_scripts_run_and_nothing_be_loaded(folder: Path) -> None:
    html = render_page([load_run(folder)])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "script-src" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert "connect-src &#39;none&#39;" in policy
    for tag, attributes in ReadPage(html).tags:
        assert tag != "iframe"
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))


def test_a_very_long_completion_is_cut_and_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", text="x" * 1_000_000, completions_every=0, num_prompts=1, num_generations=2)
    page = page_of(folder)
    found = page.chunk(page.data["chunks"][0]["id"])
    assert [len(text) for text in found["text"]] == [20_000, 20_000]
    assert found["omitted"] == [980_000, 980_000]


def sections(page: ReadPage) -> list[str | None]:
    """Of the page, in order; its menu has the same."""
    found = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    links = [attributes.get("href") or "" for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{id}" for id in found]
    return found


def test_what_is_empty_is_left_out_or_said(tmp_path: Path) -> None:
    fresh = page_of(write_run(tmp_path / "fresh", steps=0, evaluations=()))
    assert "No step has been completed yet." in fresh.prose
    assert "0 of 6 steps done; the run is going on, or was interrupted." in fresh.prose
    assert sections(fresh) == ["result", "recipe"]

    no_heldout = page_of(write_run(tmp_path / "no_heldout", evaluations=()))
    assert "The run has no held-out evaluation (data.heldout)" in no_heldout.prose
    assert "Training reward" in no_heldout.prose
    assert "No alerts were asked for." in no_heldout.prose
    assert sections(no_heldout) == ["result", "curves", "weights", "time", "completions", "recipe"]

    offline = page_of(
        write_run(tmp_path / "offline", evaluations=(), sampled=False, completions_every=0, algorithm="dpo", rewards=[])
    )
    assert "No reward was recorded: dpo learns from logged data" in offline.prose
    assert sections(offline) == ["result", "curves", "time", "recipe"]
    assert [*offline.data["plots"]] == ["loss", "time"]

    started = page_of(write_run(tmp_path / "started", steps=1, evaluations=(0,)))
    assert "the only evaluation so far" in started.prose


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2100, evaluations=(0, 2100), completions_every=0)
    page = page_of(folder)
    steps, _ = page.data["metrics"]["loss"]
    assert (len(steps), steps[0], steps[-1]) == (2000, 1, 2100)
    assert "The plots show 2 000 of 2 100 steps, evenly spread." in page.prose


def test_two_hundred_steps_of_64_completions_fit_and_more_are_sampled(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", steps=200, evaluations=(0, 200), completions_every=1, num_prompts=16, num_generations=4,
        num_tokens=40,
    )  # fmt: skip
    html = render_page([load_run(folder)])
    page = ReadPage(html)
    assert sum(chunk["rows"] for chunk in page.data["chunks"]) == 202 * 64
    assert len(html.encode()) < 15_000_000
    assert "spread over the run" not in page.prose


def test_what_does_not_fit_is_spread_over_the_run_and_counted(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", steps=9, evaluations=(), completions_every=1))
    everything = browser_of([run])
    assert [chunk.label for chunk in everything.chunks] == [f"training step {step}" for step in range(1, 10)]
    assert everything.notes == []
    # Room for three: the last, the first and the middle.
    some = browser_of([run], max_bytes=3 * max(len(chunk.data) for chunk in everything.chunks))
    assert [chunk.label for chunk in some.chunks] == [f"training step {step}" for step in (1, 5, 9)]
    assert some.notes == [
        "The completions of 3 of 9 recorded steps and evaluations are in this page, spread over the run; the rest "
        "would make it too large. All are in the run's folder."
    ]
    assert browser_of([run], max_bytes=10).notes[0].startswith("The completions of 0 of 9")


def test_of_a_large_step_whole_groups_are_shown(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", steps=2, evaluations=(), num_prompts=500, num_generations=3, num_tokens=2, completions_every=2
    )
    page = page_of(folder)
    (chunk,) = page.data["chunks"]
    # 1024 // 3 = 341 of the 500 prompts, the first and the last among them.
    found = page.chunk(chunk["id"])
    assert chunk["rows"] == 1023
    assert (found["position"][0], found["position"][-1]) == (0, 499)
    assert all(found["position"].count(position) == 3 for position in set(found["position"]))
    assert "with more than 1 024 completions, a sample of the prompts is in this page" in page.prose


def test_images_stand_for_texts_and_their_steps_for_tokens(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluations=(6,), gold=True, image=(1, 8, 8))
    page = page_of(folder)
    (file,) = [file for file in load_run(folder).completions if file.is_heldout]
    found, rows = page.chunk(page.data["chunks"][-1]["id"]), file.read().to_pylist()
    assert [base64.b64decode(image) for image in found["image"]] == [row["image"] for row in rows]
    assert found["gold"] == pytest.approx([row["gold"] for row in rows], rel=1e-4)
    assert not {"ended", "length"} & found.keys()
    assert found["parts"].keys() == {"first", "second"}
    ratios = [[new - old for new, old in zip(row["logprobs"], row["ref_logprobs"], strict=True)] for row in rows]
    largest = max(abs(ratio) for row in ratios for ratio in row)
    for shown, ratio in zip(found["ratio"], ratios, strict=True):
        assert [value * largest / 2000 for value in shown] == pytest.approx(ratio, abs=5e-4 * largest)
    assert "contact sheet" in page.prose
    assert "contact sheet" not in page_of(write_run(tmp_path / "texts")).prose


def test_of_large_images_as_many_are_shown_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", steps=2, evaluations=(), num_prompts=10, image=(3, 16, 16))
    (file,) = load_run(folder).completions
    largest = max(len(image) for image in file.read(["image"])["image"].to_pylist())
    monkeypatch.setattr("dar.report.completions.MAX_IMAGE_BYTES", 7 * largest)
    browser = browser_of([load_run(folder)])
    # Room for seven: two groups of three.
    assert [(chunk.rows, chunk.total) for chunk in browser.chunks] == [(6, 30)]
    assert "completions or large images, a sample of the prompts" in browser.notes[0]


def test_ratios_of_denoising_steps_are_pooled_over_the_training_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluations=(), completions_every=0)
    edges = ("-inf", "-16", "-4", "-1", "0", "1", "4", "16")
    for step, mean in (7, -0.25), (8, -0.75):
        # The spread is 0.5 at denoising step 0 and 0 at step 1; the shares of the bins are 0.02, 0.04, …, 0.14, 0.44.
        row = {f"ratio/step_{k}/plain/mean": mean for k in (0, 1)}
        row |= {"ratio/step_0/plain/mean_square": 0.5, "ratio/step_1/plain/mean_square": 0.25}
        row |= {"ratio/step_0/plain/clipped": 0.5 + mean, "ratio/step_1/plain/clipped": 0.75}
        row |= {f"ratio/step_{k}/plain/from_{edge}": 0.02 * at for k in (0, 1) for at, edge in enumerate(edges, 1)}
        RunFolder(folder).append_metrics({"step": step, **row, "ratio/step_0/plain/from_16": 0.44})
    page = page_of(folder)
    plots = page.data["plots"]
    (spread,) = plots["ratio_spread"]["series"]
    assert (spread["x"], spread["y"]) == ([0, 1], [-0.5, -0.5])
    assert (spread["low"], spread["high"]) == ([-1.0, -0.5], [0.0, -0.5])
    (clipped,) = plots["ratio_clipped"]["series"]
    assert clipped["y"] == [0.0, 0.75]
    heatmap = plots["ratio_plain"]["heatmap"]
    assert heatmap["y"] == ["< −16", "≥ −16", "≥ −4", "≥ −1", "≥ 0", "≥ 1", "≥ 4", "≥ 16"]
    assert [row[0] for row in heatmap["z"]] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.44])
    assert "ratio_normalized" not in plots
    assert "ratios" in sections(page)
    assert not any(name.startswith("ratio/") for name in page.data["metrics"])


def test_numbers_are_json_that_a_browser_reads(folder: Path) -> None:
    assert json.loads(page_of(folder).block("report-data"))["version"] is None


def test_the_run_of_another_trainer_is_shown_as_far_as_it_is_known(tmp_path: Path) -> None:
    spec = RecordedSpec(trainer="trl.GRPOTrainer 1.16.0", method="grpo", model="some/model", output_dir="out")
    folder = RunFolder(recorded_run(tmp_path / "theirs", spec))
    (listed,) = json.loads(CliRunner().invoke(app, ["ls", str(tmp_path), "--json"]).stdout)
    assert [listed[key] for key in ("method", "model", "done", "steps")] == ["grpo", "some/model", 6, None]
    page = page_of(folder.path)
    for shown in (
        "trained bytrl.GRPOTrainer 1.16.0",
        "methodgrpo",
        "6 steps done; how many were asked for",
        "No alerts were asked for.",
    ):
        assert shown in page.prose
    assert "seed" not in page.prose.partition("6 steps done")[0]
    assert {"reward", "kl", "weights", "time"} <= page.data["plots"].keys()
    both = page_of(folder.path, write_run(tmp_path / "ours"))
    assert [row[0] for row in both.table("recipe")] == ["theirs", "dar"]
    assert "Not finished, and compared as far as they are: theirs (6 steps)." in both.prose
    folder.record_recipe(spec.model_copy(update={"steps": 6, "data": "https://hub/some/data", "seed": 4}))
    known = page_of(folder.path).prose
    assert all(shown in known for shown in ("Finished after 6 steps.", "datadata", "seed4"))
