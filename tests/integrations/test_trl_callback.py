"""The run folder of a run of TRL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet
import pytest
import torch

from dar.errors import CheckpointError, ConfigError
from dar.record.folder import RunFolder

pytest.importorskip("trl", reason="the extra dar-rlhf[trl] is not installed")

from conftest import make_model, make_tokenizer
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from dar.integrations.trl import RunRecorder

TIMES = ("time", "step_time", "runtime")


def short(completions: list[Any], **_: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def letters(completions: list[Any], **_: Any) -> list[float | None]:
    return [sum(letter.isascii() for letter in text) / 10 if text else None for text in completions]


class Spy:
    """A reward function that remembers what it was given and what it said."""

    __name__ = "spy"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[float]]] = []

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        self.calls.append((completions, short(completions)))
        return self.calls[-1][1]


def make_trainer(
    folder: Path, rewards: Any = short, *, kind: str = "grpo", heldout: bool = True, **changes: Any
) -> Any:
    config: Any
    config, trainer = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
    settings: dict[str, Any] = {
        **{
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "activation_checkpointing": False,
        },
        **{"model_init_kwargs": {"dtype": "float32"}},
        **{"output_dir": str(folder / "trl"), "num_generations_eval": 2},
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "num_generations": 4, "max_steps": 2},
        **{"max_completion_length": 8, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "seed": 3},
    }
    prompts = Dataset.from_list([{"prompt": word} for word in ("say a", "say bee", "say sea", "say dee")])
    make_model().save_pretrained(folder / "model")  # where TRL loads π₀ from, too
    return trainer(
        model=str(folder / "model"),
        reward_funcs=rewards,
        args=config(**{**settings, **changes}),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(3)) if heldout else None,
        processing_class=make_tokenizer(chat=False),
    )


def record(trainer: Any, folder: Path, **asked: Any) -> RunFolder:
    trainer.add_callback(RunRecorder(trainer, folder / "run", **asked))
    trainer.train()
    return RunFolder(folder / "run")


def columns(folder: RunFolder, name: str) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(folder.path / "completions" / f"{name}.parquet").to_pydict()


def test_what_is_written_is_what_was_sampled_scored_and_measured(tmp_path: Path):
    spy = Spy()
    trainer = make_trainer(tmp_path, spy, beta=0.04)
    folder = record(trainer, tmp_path, completions_every=1, gold=[letters])
    lines = folder.metrics()
    assert [(line["step"], "reward" in line) for line in lines] == [(0, False), (1, True), (2, True), (2, False)]
    # Two batches of 4 completions, the last of 2, per evaluation; one of 8 per step.
    evaluations, steps = spy.calls[:2], spy.calls[2:4]
    for step, (texts, rewards) in enumerate(steps, start=1):
        table, line = columns(folder, f"step-{step}"), lines[step]
        assert (table["completion"], table["reward"], table["reward/spy"]) == (texts, rewards, rewards)
        assert line["reward"] == pytest.approx(fmean(rewards))
        assert line["rewards/spy/mean"] == pytest.approx(fmean(rewards))
        # TRL's is over the batch; here, as everywhere, the mean over prompts.
        assert line["reward_std"] == pytest.approx(fmean(torch.tensor(rewards).reshape(2, 4).std(1).tolist()))
        assert line["completions/mean_length"] == pytest.approx(fmean(table["length"]))
        assert line.keys() >= {"loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "step_time", "kl"}
        assert line.keys() >= {"completions/repetition", "completions/distinct_2", "completions/group_overlap_2"}
        assert not [key for key in line if key.startswith("eval")]
        advantages = torch.tensor(table["advantage"]).reshape(2, 4)
        assert advantages.sum(1).abs().max() < 1e-4
    first, last = columns(folder, "heldout-step-0"), columns(folder, "heldout-step-2")
    assert first["completion"] == [text for texts, _ in evaluations for text in texts]
    assert first["position"] == last["position"] == [0, 0, 1, 1, 2, 2]
    assert first["prompt"] == last["prompt"]
    for line, table in ((lines[0], first), (lines[3], last)):
        assert line["eval/reward"] == pytest.approx(fmean(table["reward"]))
        expected = [math.nan if value is None else value for value in letters(table["completion"])]
        assert table["gold"] == pytest.approx(expected, nan_ok=True)
        assert line["eval/gold"] == line["eval/gold/letters/mean"]
        assert line["eval/gold"] == pytest.approx(fmean(value for value in expected if not math.isnan(value)))
        assert line["eval/kl/ref"] == pytest.approx(fmean(table["kl_ref"]), abs=1e-5)
        assert not line.keys() & {"eval/loss", "eval/num_tokens", "eval/epoch"}
        assert line["eval/entropy"] > 0
    assert lines[0]["eval/kl/ref"] == pytest.approx(0.0, abs=1e-4)
    assert lines[3]["eval/kl/ref"] > 0.01


def test_a_recorder_changes_nothing_that_training_draws(tmp_path: Path):
    weights = []
    for name in ("with", "without"):
        trainer = make_trainer(tmp_path / name)
        if name == "with":
            record(trainer, tmp_path, gold=[letters])
        else:
            trainer.eval_dataset = None
            trainer.train()
        weights.append(torch.cat([each.flatten() for each in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_a_resumed_run_leaves_what_one_that_was_not_stopped_leaves(tmp_path: Path):
    # Within an epoch: TRL's order of prompts begins anew where it is resumed at the end of one.
    whole = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    asked: dict[str, Any] = {"completions_every": 1, "gold": [letters]}
    once = record(make_trainer(tmp_path / "once", beta=0.04, **whole), tmp_path / "once", **asked)
    here = tmp_path / "twice"
    record(make_trainer(here, beta=0.04, **whole), here, **asked)
    with pytest.raises(CheckpointError, match="already holds a run"):
        record(make_trainer(here, beta=0.04, **whole), here, **asked)
    trainer = make_trainer(here, beta=0.04, **whole)
    trainer.add_callback(RunRecorder(trainer, here / "run", **asked))
    trainer.train(resume_from_checkpoint=str(here / "trl" / "checkpoint-1"))
    twice = RunFolder(here / "run")

    def comparable(folder: RunFolder) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in folder.metrics()]

    assert [line["step"] for line in comparable(twice)] == [0, 1, 1, 2, 2]
    assert comparable(twice) == comparable(once)
    files = [sorted(path.name for path in (folder.path / "completions").iterdir()) for folder in (once, twice)]
    assert files[0] == files[1]
    assert all(columns(once, file[:-8]) == columns(twice, file[:-8]) for file in files[0])


def test_an_alert_stops_the_run_and_the_best_policy_stays(tmp_path: Path):
    alert = {"type": "missing_eos", "max": 0.0, "window": 1, "action": "stop"}
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=100)
    folder = record(trainer, tmp_path, alerts=[alert], best="eval/reward")
    assert trainer.state.global_step == 1
    assert (tmp_path / "trl" / "checkpoint-1").is_dir()
    assert [(row["step"], row["rule"], row["action"]) for row in folder.alerts()] == [(1, "missing_eos", "stop")]
    best = folder.best_record()
    assert best == {
        **{"step": 0, "metric": "eval/reward", "mode": "max"},
        "value": folder.metrics()[0]["eval/reward"],
    }
    assert (folder.best / "model.safetensors").is_file()
    assert not (folder.best / "training_args.bin").exists()


def test_rloo_is_recorded_with_its_drift(tmp_path: Path):
    folder = record(make_trainer(tmp_path, kind="rloo", beta=0.05), tmp_path, completions_every=2, alerts=["no_signal"])
    lines = folder.metrics()
    table = columns(folder, "step-2")
    assert not (folder.path / "completions" / "step-1.parquet").exists()
    assert lines[1]["kl/ref"] == pytest.approx(0.0, abs=1e-4)
    assert lines[2]["kl/ref"] == pytest.approx(fmean(table["kl_ref"]), abs=1e-5)
    assert lines[2]["kl"] == lines[2]["kl/ref_k3_per_token"] > 0


def test_settings_are_what_is_not_the_default_and_no_secret(tmp_path: Path):
    trainer = make_trainer(tmp_path, hub_token="hf_abcdefgh", beta=0.04)
    recorder = RunRecorder(trainer, tmp_path / "run")
    settings = recorder.spec.settings
    assert settings["beta"] == 0.04
    assert "temperature" not in settings
    assert "hf_abcdefgh" not in json.dumps(settings)
    assert (recorder.spec.num_generations, recorder.spec.prompts_per_step) == (4, 2)


@pytest.mark.parametrize(
    ("asked", "trained", "said"),
    [
        ({"alerts": [{"type": "kl", "max": 1.0}]}, {}, "beta above 0"),
        ({"alerts": [{"type": "kl", "max": 1.0}]}, {"beta": 0.1}, "samples: heldout"),
        ({"alerts": [{"type": "overoptimization", "min_fall": 0.1}]}, {}, "evaluation.rewards are gold"),
        ({"alerts": [{"type": "repetition", "samples": "heldout"}]}, {"heldout": False}, "eval_dataset"),
        ({"best": "eval/gold"}, {}, "eval/reward"),
        ({"gold": [letters]}, {"heldout": False}, "eval_dataset"),
        ({"gold": [letters, letters]}, {}, "one name"),
        ({"alerts": [{"type": "retention", "task": "a", "max_drop": 0.1}]}, {}, "no task of lm-eval is asked here"),
    ],
)
def test_what_could_never_be_measured_is_refused(tmp_path: Path, asked: Any, trained: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        RunRecorder(make_trainer(tmp_path, **trained), tmp_path / "run", **asked)


def test_every_evaluation_draws_the_same_random_numbers(tmp_path: Path):
    folder = record(make_trainer(tmp_path, learning_rate=0.0), tmp_path)
    assert columns(folder, "heldout-step-0") == columns(folder, "heldout-step-2")
