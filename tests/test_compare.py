"""`dar compare`: what is run, what is not run again, and what the figures say."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.handmade import make_spec
from typer.testing import CliRunner

from dar.cli.app import app
from dar.cli.compare import comparison_table
from dar.compare.arms import Arm, at_learning_rates, parse_arms
from dar.compare.runs import Outcome, run_all
from dar.compare.summary import summarize, write_frontier
from dar.config.recipe import dump_recipe, load_recipe
from dar.console import Console
from dar.errors import ConfigError
from dar.record.alerts import Alert
from dar.record.folder import RunFolder

KEYS = ("eval/reward", "eval/kl/ref", "eval/completions/mean_length", "eval/completions/clipped_ratio", "eval/entropy")


def outcome_of(name: str, seed: int, folder: Path, *, rate: float = 1e-3, error: str | None = None) -> Outcome:
    return Outcome(Arm(name, name), seed, folder, rate, error)


def make_run(
    folder: Path,
    *,
    steps: int,
    rewards: list[float],
    kls: list[float],
    finished: bool = True,
    gold: float | None = None,
) -> Path:
    """A run folder as training leaves it, its numbers made up."""
    RunFolder(folder).start(make_spec(steps=max(steps, 1)), {})
    rows: list[dict[str, Any]] = [{"step": 0, **dict(zip(KEYS, (rewards[0], kls[0], 5.0, 0.0, 1.0)))}]
    rows += [{"step": step, "loss": 1.0, "step_time": 2.0, "kl/old_k3": 0.1 * step} for step in range(1, steps + 1)]
    rows.append({"step": steps, **dict(zip(KEYS, (rewards[1], kls[1], 7.0, 0.25, 0.5)))})
    for row in (rows[0], rows[-1]) if gold is not None else ():
        row["eval/gold"] = gold
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "model").mkdir()
    return folder


def test_methods_are_named_by_commas_or_one_by_one_with_overrides():
    assert parse_arms(["dar,grpo", "slow:dar,optim.learning_rate=1e-6,algorithm.alpha=0"]) == [
        Arm("dar", "dar"),
        Arm("grpo", "grpo"),
        Arm("slow", "dar", ("optim.learning_rate=1e-6", "algorithm.alpha=0")),
    ]
    assert parse_arms(["rloo,optim.learning_rate=1e-6"])[0].name == "rloo"


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["dar", "dar,algorithm.alpha=0"], "called dar"), ([""], "no method"), (["x:dar,alpha"], "'alpha'.*no override")],
)
def test_methods_that_cannot_be_told_apart_or_read_are_refused(texts: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_arms(texts)


def test_every_method_is_tried_at_every_rate_but_one_that_has_its_own():
    arms = at_learning_rates(parse_arms(["dar,grpo", "slow:dar,optim.learning_rate=1e-6"]), "2e-5,4e-5")
    assert [(arm.name, arm.label, arm.changes) for arm in arms] == [
        ("dar", "dar-lr2e-05", ("optim.learning_rate=2e-05",)),
        ("dar", "dar-lr4e-05", ("optim.learning_rate=4e-05",)),
        ("grpo", "grpo-lr2e-05", ("optim.learning_rate=2e-05",)),
        ("grpo", "grpo-lr4e-05", ("optim.learning_rate=4e-05",)),
        ("slow", "slow", ("optim.learning_rate=1e-6",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("1e-5,fast", "write numbers with commas"), ("1e-5,1e-05", "a rate is named twice")]
)
def test_learning_rates_that_are_no_numbers_or_the_same_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=rf"--learning-rates {text}: {message}"):
        at_learning_rates([Arm("dar", "dar")], text)


def test_a_method_stands_in_the_table_at_its_best_rate_and_one_without_a_stopped_run_goes_first(tmp_path: Path):
    outcomes = []
    for name, rate, rewards in (("dar", 1e-5, (1.0, 2.0)), ("dar", 2e-5, (1.0, 3.0)), ("grpo", 1e-5, (0.5, 0.5))):
        for seed, reward in enumerate(rewards):
            folder = make_run(tmp_path / f"{name}{rate}{seed}", steps=1, rewards=[0.0, reward], kls=[0.0, 1.0])
            outcomes.append(outcome_of(name, seed, folder, rate=rate))
    summary = summarize(outcomes)
    assert [(row["method"], row["learning_rate"], row["reward"]["mean"]) for row in summary["tried"]] == [
        ("dar", 1e-5, 1.5),
        ("dar", 2e-5, 2.0),
        ("grpo", 1e-5, 0.5),
    ]
    assert {name: row["learning_rate"] for name, row in summary["methods"].items()} == {"dar": 2e-5, "grpo": 1e-5}

    # An alert ended one of the runs at the higher rate: its reward is of a policy that went astray.
    outcomes[2] = replace(outcomes[2], stopped_by=Alert(1, "kl", "stop", "kl/ref", 9.0, 8.0, "too far"))
    summary = summarize(outcomes)
    assert summary["methods"]["dar"]["learning_rate"] == 1e-5
    assert [row["num_stopped"] for row in summary["tried"]] == [0, 1, 0]


def test_where_there_is_a_gold_reward_it_chooses_the_rate_and_the_table_says_so(tmp_path: Path):
    outcomes = []
    for rate, end, gold in ((1e-5, 1.0, 0.75), (2e-5, 2.0, 0.5)):
        folder = make_run(tmp_path / str(rate), steps=1, rewards=[0.0, end], kls=[0.0, 1.0], gold=gold)
        outcomes.append(outcome_of("dar", 0, folder, rate=rate))
    summary = summarize(outcomes)
    assert (summary["chosen_by"], summary["methods"]["dar"]["learning_rate"]) == ("gold", 1e-5)
    assert summary["runs"][0]["curve"][-1] == {"step": 1, "reward": 1.0, "kl_ref": 1.0, "gold": 0.75}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(summary))
    text = console.export_text()
    assert "+0.750" in text
    assert "each method at the learning rate of its highest gold reward" in " ".join(text.split())


def test_figures_are_the_last_evaluations_and_means_with_students_interval(tmp_path: Path):
    folders = [make_run(tmp_path / f"a{seed}", steps=2, rewards=[0.0, 1.0 + seed], kls=[0.0, 4.0]) for seed in (0, 1)]
    outcomes = [outcome_of("dar", seed, folder) for seed, folder in enumerate(folders)]
    summary = summarize([*outcomes, outcome_of("grpo", 0, tmp_path / "none", error="it broke")])
    dar = summary["methods"]["dar"]
    assert (dar["num_runs"], dar["num_stopped"]) == (2, 0)
    # Rewards 1 and 2: mean 1.5, s = 1/√2, and t(0.975, 1 degree of freedom) = 12.7062.
    assert dar["reward"]["mean"] == 1.5
    assert dar["reward"]["half_width"] == pytest.approx(12.7062 / math.sqrt(2) / math.sqrt(2), rel=1e-5)
    assert dar["kl_ref"] == {"mean": 4.0, "half_width": 0.0}
    assert dar["missing_eos"]["mean"] == 0.25
    # kl/old of steps 1 and 2 is .1 and .2; each step took 2 s.
    assert dar["kl_old_per_step"]["mean"] == pytest.approx(0.15)
    assert dar["seconds"]["mean"] == 4.0
    assert summary["runs"][0]["curve"] == [
        {"step": 0, "reward": 0.0, "kl_ref": 0.0},
        {"step": 2, "reward": 1.0, "kl_ref": 4.0},
    ]
    assert summary["failed"] == [{"method": "grpo", "learning_rate": 1e-3, "seed": 0, "error": "it broke"}]


def test_one_run_has_no_interval(tmp_path: Path):
    folder = make_run(tmp_path / "a", steps=1, rewards=[0.0, 1.0], kls=[0.0, 1.0])
    assert summarize([outcome_of("dar", 0, folder)])["methods"]["dar"]["reward"] == {"mean": 1.0}


def test_the_table_of_one_seed_is_whole_in_80_columns(tmp_path: Path):
    outcomes = [
        outcome_of(name, 0, make_run(tmp_path / name, steps=1, rewards=[0.0, -0.574], kls=[0.0, 125.49]), rate=4e-5)
        for name in ("online_dpo", "dar_adaptive")
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(summarize(outcomes)))
    lines = [line.split() for line in console.export_text().splitlines()]
    headings = [["method", "rate", "reward", "KL", "to", "π₀", "length", "missing", "EOS", "entropy", "min"]]
    figures = ["4e-05", "-0.574", "125.490", "7.0", "25.0%", "0.500", "0.0"]
    assert [line for line in lines if line in headings] == headings
    assert [line for line in lines if "4e-05" in line] == [["online_dpo", *figures], ["dar_adaptive", *figures]]


def test_the_frontier_shows_each_method_at_its_best_rate(tmp_path: Path):
    outcomes = [
        outcome_of("dar", 0, make_run(tmp_path / str(rate), steps=1, rewards=[0.0, end], kls=[0.0, end]), rate=rate)
        for rate, end in ((1e-5, 1.0), (2e-5, 2.0))
    ]
    write_frontier(summarize(outcomes), tmp_path / "both.png")
    write_frontier(summarize(outcomes[1:]), tmp_path / "best.png")
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "best.png").read_bytes()


def test_finished_runs_are_kept_a_failing_one_is_reported_and_the_others_go_on(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    recipe = write_recipe(
        data={"train": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")},
        steps=1,
        algorithm={"type": "dar", "beta": 0.7},
    )
    out = tmp_path / "out"
    arms = parse_arms(["dar", "broken:dar,model=/nowhere/at/all", "grpo"])
    notes: list[str] = []
    outcomes = run_all(recipe, [], arms, [0], out, notes.append)
    assert [(outcome.arm.name, outcome.is_finished) for outcome in outcomes] == [
        ("dar", True),
        ("broken", False),
        ("grpo", True),
    ]
    assert "does not exist" in str(outcomes[1].error)
    # The recipe's own method keeps the recipe's settings; overrides for all runs reach every one.
    assert load_recipe(out / "dar-seed0" / "config.yaml").algorithm.model_dump()["beta"] == 0.7
    assert load_recipe(out / "grpo-seed0" / "config.yaml").algorithm.type == "grpo"
    assert any(re.fullmatch(r"1 more to train: \d+ (s|min) so far, about \d+ (s|min) left", line) for line in notes)
    before = (out / "dar-seed0" / "metrics.jsonl").read_bytes()
    notes.clear()
    again = run_all(recipe, [], arms[:1], [0], out, notes.append)
    assert again[0].is_finished
    assert notes == ["[1/1] dar, seed 0: finished before"]
    assert (out / "dar-seed0" / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_recipe_is_not_taken_for_this_one(write_recipe: Callable[..., Path], tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, steps=1)
    out = tmp_path / "out"
    folder = make_run(out / "dar-seed0", steps=1, rewards=[0.0, 1.0], kls=[0.0, 1.0])
    before = [f"output_dir={folder}", "seed=0", "optim.learning_rate=0.5"]
    (folder / "config.yaml").write_text(dump_recipe(load_recipe(recipe, before)))
    with pytest.raises(ConfigError, match=r"(?s)optim\.learning_rate: 0\.5 → 0\.001.*another --out"):
        run_all(recipe, [], parse_arms(["best_of_n", "dar"]), [0], out, lambda _: None)
    # Refused before anything ran.
    assert not (out / "best_of_n-seed0").exists()


def test_an_unfinished_run_is_resumed(write_recipe: Callable[..., Path], tmp_path: Path):
    recipe = write_recipe(data={"train": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")})
    out = tmp_path / "out"
    run_all(recipe, ["steps=2"], parse_arms(["dar"]), [0], out, lambda _: None)
    for file in (out / "dar-seed0" / "model").iterdir():
        file.unlink()
    (out / "dar-seed0" / "model").rmdir()
    assert run_all(recipe, ["steps=2"], parse_arms(["dar"]), [0], out, lambda _: None)[0].is_finished
    assert "continuing after step 2" in (out / "dar-seed0.log").read_text()


def test_a_request_to_end_lets_the_run_save_and_starts_no_other(write_recipe: Callable[..., Path], tmp_path: Path):
    prompts, out = str(tmp_path / "prompts.jsonl"), tmp_path / "out"
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, steps=1000, checkpoint={"every": 1000})
    folder = RunFolder(out / "dar-seed0")

    def end_it_after_a_step() -> None:
        while not any("loss" in row for row in folder.metrics()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_it_after_a_step)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, [], parse_arms(["dar,grpo"]), [0], out, lambda _: None)
    thread.join()
    last = max(row["step"] for row in folder.metrics())
    assert [path.name for path in folder.checkpoints.iterdir()] == [f"step-{last}"]
    assert not (out / "grpo-seed0").exists()


def test_runs_side_by_side_share_the_cores_and_one_that_is_ended_ends_the_others_whole(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    prompts, out = str(tmp_path / "prompts.jsonl"), tmp_path / "out"
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, steps=1000, checkpoint={"every": 1000})
    folders = [RunFolder(out / f"dar-seed{seed}") for seed in (5, 6)]

    def end_one_once_both_have_begun() -> None:
        while not all(any("loss" in row for row in folder.metrics()) for folder in folders):
            time.sleep(0.05)
        children = [each for each in multiprocessing.active_children() if each.pid]
        os.kill(int(children[0].pid or 0), signal.SIGTERM)

    thread, notes = threading.Thread(target=end_one_once_both_have_begun), list[str]()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, [], parse_arms(["dar"]), [5, 6, 7], out, notes.append, num_parallel=2)
    thread.join()
    for folder in folders:
        last = max(row["step"] for row in folder.metrics())
        assert [path.name for path in folder.checkpoints.iterdir()] == [f"step-{last}"]
        assert json.loads((folder.path / "environment.json").read_text())["threads"] == 1
    assert not (out / "dar-seed7").exists()
    assert sorted(note for note in notes if "interrupted" in note) == [
        "[1/3] dar, seed 5: interrupted", "[2/3] dar, seed 6: interrupted"
    ]  # fmt: skip


def test_a_run_that_an_alert_stopped_is_done_with_its_reason_until_the_alerts_change(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    # The tiny model hardly ever ends within 8 tokens, so that the first step already breaks the rule.
    rule = {"type": "missing_eos", "max": 0.01, "window": 1, "action": "stop"}
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, steps=2, alerts=[rule])
    out, notes = tmp_path / "out", list[str]()
    (outcome,) = run_all(recipe, [], parse_arms(["dar"]), [0], out, notes.append)
    assert outcome.is_finished
    assert outcome.stopped_by is not None
    assert (outcome.stopped_by.step, outcome.stopped_by.rule) == (1, "missing_eos")
    assert re.search(r"^\[1/1\] dar, seed 0: stopped after step 1 by the alert missing_eos: .+", notes[-1])
    before = (out / "dar-seed0" / "metrics.jsonl").read_bytes()
    notes.clear()
    assert run_all(recipe, [], parse_arms(["dar"]), [0], out, notes.append) == [outcome]
    assert re.search(r"^\[1/1\] dar, seed 0: stopped before, after step 1 by the alert missing_eos", notes[0])
    assert (out / "dar-seed0" / "metrics.jsonl").read_bytes() == before

    (run,) = summarize([outcome])["runs"]
    assert run["stopped_by"]["rule"] == "missing_eos"
    (again,) = run_all(recipe, ["alerts=[]"], parse_arms(["dar"]), [0], out, lambda _: None)
    assert again.stopped_by is None
    assert [row["step"] for row in RunFolder(out / "dar-seed0").metrics() if "loss" in row] == [1, 2]


def test_a_method_with_a_run_that_was_stopped_early_has_the_figures_all_its_runs_have(tmp_path: Path):
    outcomes = [
        outcome_of("dar", 0, make_run(tmp_path / "a", steps=2, rewards=[0.0, 1.0], kls=[0.0, 1.0])),
        outcome_of("dar", 1, make_run(tmp_path / "b", steps=0, rewards=[0.0, 3.0], kls=[0.0, 0.0])),
    ]
    dar = summarize(outcomes)["methods"]["dar"]
    assert dar["reward"]["mean"] == 2.0
    assert "kl_old_per_step" not in dar


def test_a_recipe_without_heldout_prompts_is_refused_before_anything_runs(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ConfigError, match=r"needs data\.heldout and rewards"):
        run_all(write_recipe(), [], parse_arms(["dar"]), [0], tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_table_json_and_plot(write_recipe: Callable[..., Path], tmp_path: Path):
    recipe = write_recipe(
        data={"train": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")}, steps=1
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", str(recipe), "-a", "best_of_n", "--seeds", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "best_of_n" in result.output
    found = json.loads((out / "comparison.json").read_text())
    assert found["methods"]["best_of_n"]["num_runs"] == 2
    assert (out / "frontier.png").is_file()
    again = CliRunner().invoke(
        app, ["compare", str(recipe), "-a", "best_of_n", "--seeds", "2", "-o", str(out), "--json"]
    )
    assert json.loads(again.stdout) == found
    assert again.stderr.count("finished before") == 2


def test_the_command_tries_learning_rates_and_a_later_call_adds_methods(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    prompts, out = str(tmp_path / "prompts.jsonl"), tmp_path / "out"
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, steps=1)
    command = ["compare", str(recipe), "-a", "best_of_n", "--learning-rates", "1e-3,2e-3", "-o", str(out)]
    first = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "each method at the learning rate of its highest reward, then the other rates" in " ".join(
        first.output.split()
    )
    tried = json.loads((out / "comparison.json").read_text())["tried"]
    second = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "-a", "rloo,optim.learning_rate=1e-3"])
    assert second.exit_code == 0, second.output
    assert second.output.count("finished before") == 2
    found = json.loads((out / "comparison.json").read_text())
    assert found["tried"][:2] == tried
    assert [(row["method"], row["learning_rate"]) for row in found["tried"]] == [
        ("best_of_n", 1e-3),
        ("best_of_n", 2e-3),
        ("rloo", 1e-3),
    ]
    assert sorted(path.parent.name for path in out.glob("*/config.yaml")) == [
        "best_of_n-lr0.001-seed0",
        "best_of_n-lr0.002-seed0",
        "rloo-seed0",
    ]


def test_the_command_says_which_run_was_stopped_and_by_what(write_recipe: Callable[..., Path], tmp_path: Path):
    rule = {"type": "missing_eos", "max": 0.01, "window": 1, "action": "stop"}
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, steps=2, alerts=[rule])
    result = CliRunner().invoke(app, ["compare", str(recipe), "-a", "dar", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "dar, learning rate 0.001, seed 0: stopped after step 1 by the alert missing_eos; its figures are" in said


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_frontier_is_a_picture_whatever_the_names_are(tmp_path: Path):
    folder = make_run(tmp_path / "a", steps=1, rewards=[0.0, 1.0], kls=[0.0, 1.0])
    names = (r"$\frac{$", "a$b$", "\x1b\u202e", "caf\udce9")
    assert write_frontier(summarize([outcome_of(name, 0, folder) for name in names]), tmp_path / "frontier.png")
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.size == (1200, 800)
