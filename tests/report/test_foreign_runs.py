"""Runs of TRL and verl, read as they are: what their files say, under the right names, and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import make_model, make_tokenizer
from support.page_reader import ReadPage
from support.run_folders import write_run

from dar.errors import CheckpointError, ConfigError, DataError
from dar.report.kinds import RecordedRun
from dar.report.missing import missing
from dar.report.page import render_page
from dar.report.run import load_runs, load_trainings
from dar.report.spending import spending

TABLE = {"step": [4] * 2, "prompt": ["a", "b"], "completion": ["x", "y"], "good": [1.0, None], "advantage": [0.5, -0.5]}


def opened(*folders: Path) -> tuple[RecordedRun, ReadPage]:
    runs = load_trainings(folders)
    assert isinstance(runs, list)
    run = runs[0]
    assert isinstance(run, RecordedRun)
    return run, ReadPage(render_page(runs))


def trl_folder(folder: Path, *history: dict[str, Any], table: dict[str, Any] | None = None, **state: Any) -> Path:
    """A folder as trl 1.16 leaves it, but for the weights."""
    (folder / "checkpoint-4").mkdir(parents=True)
    state = {"global_step": 4, "max_steps": 8, "logging_steps": 2, "log_history": history} | state
    (folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "completions").mkdir()
    pyarrow.parquet.write_table(pa.table(table or TABLE), folder / "completions" / "completions_00004.parquet")
    return folder


def verl_dump(folder: Path, step: int, scores: list[Any], **more: list[Any]) -> None:
    """As verl 0.9.1's RayPPOTrainer._write_generations: each line one json.dumps of these keys and the reward's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{step}.jsonl").open("w") as file:
        for i, score in enumerate(scores):
            row = {"input": f"ask {i // 2}", "output": f"<b>{i}", "gts": str(i), "score": score, "step": step}
            row |= {key: values[i] for key, values in more.items()}
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


@pytest.fixture
def verl_run(tmp_path: Path) -> Path:
    folder = tmp_path / "verl"
    for step in (1, 2):
        verl_dump(folder / "rollouts", step, [0.0, step, 0.0, step], pred=["p", None, 1, {"k": 2}], acc=[True] * 4)
    for step in (0, 2):
        verl_dump(folder / "validations", step, [step, 1.0, 1.0, 1.0], reward=[step, 1.0, 1.0, 1.0])
    lines = [{"step": step, "data": {"timing_s/step": 3.0, "actor/kl_loss": None}} for step in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return folder


def test_a_run_that_trl_made(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed (extra trl)")
    make_model().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")

    def letters(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(set(each[0]["content"]))) for each in completions]

    settings: dict[str, Any] = {"report_to": [], "use_cpu": True, "max_steps": 2, "save_steps": 2, "logging_steps": 1}
    settings |= {"num_generations": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    rows = [{"prompt": [{"role": "user", "content": f"write {i}"}]} for i in range(2)]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), max_completion_length=4, log_completions=True, beta=0.1,
        eval_strategy="steps", eval_steps=2, disable_tqdm=True, **settings,
    )  # fmt: skip
    data = pytest.importorskip("datasets").Dataset.from_list(rows)
    trl.GRPOTrainer(str(tmp_path / "tiny"), letters, config, data, data).train()
    run, page = opened(tmp_path / "out")
    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert run.series("reward") == ([1, 2], [row["reward"] for row in history if "reward" in row])
    assert run.series("kl", heldout=True)[1] == [row["eval_kl"] for row in history if "eval_kl" in row]
    assert (run.method, run.spec.trainer, run.is_finished) == ("GRPO", f"TRL {trl.__version__}", True)
    assert {"reward", "length", "eos", "entropy", "kl_per_token"} <= page.data["plots"].keys()
    assert "trl/reward_std" in page.data["metrics"]
    assert "reward_std" not in page.data["metrics"]
    first = page.chunk("0")
    assert [first["prompts"][i].partition(" ")[0] for i in first["prompt"]] == ["write"] * 2
    assert first["reward"] == first["parts"]["letters"]
    assert "ended" not in first
    labels = [chunk["label"] for chunk in page.data["chunks"]]
    assert labels == ["logged at step 1", "logged at step 2, the evaluation’s among them"]
    assert missing(run).keys() == {
        "Intervals", "Drift from π₀", "Size of each update", "Proxy and gold", "Weights", "Drift per token"
    }  # fmt: skip


def test_trl_figures_are_means_of_what_was_logged_and_take_no_name_of_another_meaning(tmp_path: Path) -> None:
    online = trl_folder(
        tmp_path / "online",
        {"step": 2, "reward": 2.0, "rewards/good/mean": 1.0, "step_time": 3.0, "kl": float("nan"), "entropy": None},
        {"step": 4, "reward": 4.0, "rewards/good/mean": 2.0, "step_time": 5.0, "entropy": 1.0},
        {"step": 4, "eval_reward": 3.0, "eval_loss": 0.1, "eval_runtime": 7.0},
        {"step": 4, "train_runtime": 99.0, "train_loss": 0.0},
    )
    run, page = opened(online)
    spent = spending(run)
    assert spent is not None
    assert (spent.steps, spent.seconds) == (2 * 3.0 + 2 * 5.0, 23.0)
    assert [row["step"] for row in run.steps] == [2, 4]  # and no step of what sums up the whole call
    assert run.evaluations == [{"step": 4, "reward": 3.0, "eval_loss": 0.1, "time": 7.0}]
    assert "Not finite, and left out: entropy of step 2, kl of step 2." in page.prose
    assert "each figure is the mean since the one before" in page.prose
    assert "reward" not in page.chunk("0")  # twice the single reward: it has a weight, which is not in the folder
    assert page.chunk("0")["parts"] == {"good": [1.0, None]}
    offline = trl_folder(tmp_path / "offline", {"step": 1, "loss": 0.6, "entropy": 2.0, "rewards/accuracies": 0.5})
    shutil.rmtree(offline / "completions")
    run, page = opened(offline)
    assert run.steps == [{"step": 1, "loss": 0.6, "trl/entropy": 2.0, "rewards/accuracies": 0.5}]
    assert {"Reward", "Time", "Completions"} <= missing(run).keys()
    both = ReadPage(render_page(load_runs([write_run(tmp_path / "ours"), online, offline])))
    assert [row[0] for row in both.table("recipe")] == ["dar", "online", "offline"]
    sets = trl_folder(tmp_path / "sets", {"step": 4, "eval_a_loss": 1.0, "eval_a_runtime": 1.0, "eval_reward": 2.0})
    assert opened(sets)[0].evaluations == [{"step": 4, "a/a_loss": 1.0, "a/a_runtime": 1.0, "a/reward": 2.0}]


def test_dumps_of_verl_are_training_and_validation_with_their_log(verl_run: Path) -> None:
    run, page = opened(verl_run)
    assert run.steps == [{"step": step, "timing_s/step": 3.0, "reward": step / 2} for step in (1, 2)]
    assert run.evaluations == [{"step": 0, "reward": 0.75}, {"step": 2, "reward": 1.25}]
    assert "a change of +0.500 ± 6.353" in page.prose  # prompts' means change by 1 and 0: t = 12.7062, deviation √½
    assert [chunk["label"] for chunk in page.data["chunks"]] == [
        "held-out, after step 0", "training step 1", "training step 2", "held-out, after step 2"
    ]  # fmt: skip
    chunk = page.chunk("1")
    assert (chunk["text"], chunk["reward"]) == (["<b>0", "<b>1", "<b>2", "<b>3"], [0, 1, 0, 1])
    assert chunk["parts"]["pred"] == ["p", None, "1", '{"k": 2}']
    assert "`timing_s/…`" in missing(run)["Time"]
    with (verl_run / "rollouts" / "2.jsonl").open("a") as file:
        file.write('{"input": "ask')
    assert opened(verl_run / "rollouts")[0].steps == run.steps


def test_scores_that_are_no_numbers_make_no_mean(tmp_path: Path) -> None:
    verl_dump(tmp_path / "v", 1, [1.0, float("nan"), "high", None])
    run, page = opened(tmp_path / "v")
    assert (run.steps, page.chunk("0")["reward"]) == ([], [1.0, None, None, None])
    assert "A score is no finite number, so the step has no mean reward: " in page.prose
    assert "none is beside the dump" in page.prose


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"log_history": [', r"trainer_state.json is not JSON that can be read"),
        ("[]", "is no trainer state as transformers writes it"),
        ('{"global_step": 4, "log_history": [{"loss": 1}]}', "is no trainer state as transformers writes it"),
    ],
)
def test_a_damaged_trainer_state_is_said(tmp_path: Path, text: str, message: str) -> None:
    folder = trl_folder(tmp_path / "out")
    (folder / "checkpoint-4" / "trainer_state.json").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(folder)


def test_what_cannot_be_read_of_others_is_said(tmp_path: Path, verl_run: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config.yaml, trainer_state.json \(TRL\) or N.jsonl \(verl\)"):
        opened(tmp_path / "empty")
    with pytest.raises(DataError, match="has no column 'completion', as TRL writes it; found step, prompt"):
        opened(trl_folder(tmp_path / "bare", table={"step": [4], "prompt": ["a"]}))
    broken = trl_folder(tmp_path / "broken")
    (broken / "completions" / "completions_00004.parquet").write_text("no parquet")
    with pytest.raises(CheckpointError, match=r"completions_00004.parquet cannot be read"):
        opened(broken)
    (verl_run / "rollouts" / "1.jsonl").write_text('{"input": "a", "output": "b"}\n')
    with pytest.raises(DataError, match=r"1.jsonl: line 1 has no 'score'"):
        opened(verl_run)
    shutil.copytree(verl_run / "validations", verl_run / "others")
    with pytest.raises(DataError, match="has no 'score'"):
        opened(verl_run)
    shutil.rmtree(verl_run / "rollouts")
    with pytest.raises(ConfigError, match="both hold verl's validations: give the folder of a single run"):
        opened(verl_run)
