"""The Python face: objects or paths in, an aligned model and its metrics out, and clear words where that cannot be."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.parquet
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel
from support.reward_models import make_classifier, save_classifier
from support.scripted_hub import ScriptedHub
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dar
from dar import (
    Callback,
    CheckpointError,
    ConfigError,
    DARConfig,
    DARSpec,
    DARTrainer,
    DataError,
    GRPOSpec,
    RewardError,
    RolloutError,
    Trainer,
    TrainingConfig,
)
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.preference import DPOSpec
from dar.config.recipe import dump_recipe, flatten, load_recipe
from dar.config.regression import TargetESSSpec, TargetKLSpec, VARSpec
from dar.config.rewards import LengthRewardSpec, reward_name
from dar.config.run import HubSpec
from dar.policies.text.policy import Policy
from dar.run.stopping import Control
from dar.trainer import TrainResult

ROWS = [{"prompt": [{"role": "user", "content": f"say {word}"}], "word": word} for word in ("a", "bee", "sea", "dee")]
# Rows of every kind of offline method at once: each reads its own columns.
LOGGED = [
    {
        **row,
        "completion": "yes",
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": f"no {row['word']}"}],
        "completions": ["yes", f"no {row['word']}", "eh"],
        "rewards": [1.0, -0.5, 0.25],
        "ref_rewards": [0.0, 1.0],
        "chosen_complies": index > 1,
        "rejected_complies": index == 0,
    }
    for index, row in enumerate(ROWS)
]
OFFLINE = [name for name, spec in ALGORITHM_SPECS.items() if spec.logged]
WITHOUT_REWARDS = {"reward_funcs": None, "train_dataset": LOGGED}
Config = TypeVar("Config", bound=TrainingConfig)
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "prompts_per_step": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "device": "cpu",
}


def even_share(completion_ids: list[list[int]]) -> list[float]:
    """The share of tokens with an even id."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


even_share_2 = even_share


def make_config(kind: type[Config], **changes: Any) -> Config:
    """A short run on the tiny model, with some settings replaced."""
    return kind(**{**SETTINGS, "output_dir": "run"} | changes)


def make_trainer(folder: Path, *, settings: Mapping[str, Any] | None = None, **changes: Any) -> DARTrainer:
    arguments: dict[str, Any] = {
        "model": make_model(),
        "reward_funcs": even_share,
        "args": make_config(DARConfig, **{"output_dir": str(folder / "run")} | dict(settings or {})),
        "train_dataset": ROWS,
        "processing_class": make_tokenizer(),
    }
    return DARTrainer(**arguments | changes)


def make_other_trainer(folder: Path, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "model": make_model(),
        "reward_funcs": even_share,
        "args": make_config(TrainingConfig, output_dir=str(folder / "run")),
        "train_dataset": ROWS,
        "processing_class": make_tokenizer(),
    }
    arguments["algorithm"] = "rloo"
    return Trainer(**arguments | changes)


def numbers(result: TrainResult) -> list[dict[str, float]]:
    """The metrics without what depends on the machine's mood."""
    moods = ("time", "memory", "step_time", "eval/time")
    return [{key: value for key, value in row.items() if not key.startswith(moods)} for row in result.metrics]


def model_of(trainer: Trainer) -> Any:
    assert trainer.loop is not None
    policy = trainer.loop.learner.policy
    assert isinstance(policy, Policy)
    return policy.model


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model_of(trainer).named_parameters()}


class Collector:
    """Keeps what callbacks are told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        self.rows.append({"step": step, **metrics})


class Spoiler:
    """Edits what it is told."""

    def on_metrics(self, step: int, metrics: dict[str, float], control: Control) -> None:
        metrics.clear()


class Asks:
    """Asks something of the run after a step."""

    def __init__(self, step: int, ask: Callable[[Control], None]) -> None:
        self.step, self.ask = step, ask

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        if step == self.step and "loss" in metrics:
            self.ask(control)


class Crash(Exception):
    """Stands for a process that dies in the middle of a run."""


class CrashAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        if step == self.step:
            raise Crash


# --- training --------------------------------------------------------------------------------------------------------


def test_two_steps_on_objects_change_the_model_and_leave_a_run_folder(tmp_path: Path):
    collector = Collector()
    trainer = make_trainer(tmp_path, callbacks=[Spoiler(), collector])
    result = trainer.train()
    assert (result.steps, result.output_dir) == (2, str(tmp_path / "run"))
    assert [row["step"] for row in result.metrics] == [1, 2]
    assert result.metrics[0]["kl/ref"] == pytest.approx(0.0, abs=1e-3)
    assert collector.rows == result.metrics
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.metrics
    trained, before = weights(trainer), dict(make_model().named_parameters())
    assert all(not torch.equal(trained[name], before[name]) for name in trained)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(parameter, trained[name]) for name, parameter in saved.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert "aligned with DAR" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_callback_may_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stops = Asks(1, lambda control: control.stop("it is good enough"))
    result = make_trainer(tmp_path, settings={"max_steps": 3}, callbacks=[stops]).train()
    assert (result.steps, result.stopped_by) == (1, None)
    assert "stopped after step 1: it is good enough" in capsys.readouterr().out
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    assert not (run / "model").exists()
    assert make_trainer(tmp_path, settings={"max_steps": 3}).train(resume_from_checkpoint=True).steps == 3


def test_a_callback_may_have_the_run_saved_and_evaluated(tmp_path: Path):
    def both(control: Control) -> None:
        control.save()
        control.evaluate()

    settings = {"max_steps": 3, "save_steps": 0}
    result = make_trainer(tmp_path, settings=settings, eval_dataset=ROWS[:1], callbacks=[Asks(1, both)]).train()
    assert [row["step"] for row in result.metrics if "eval/reward" in row] == [0, 1, 3]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-1", "step-3"}


def test_metrics_say_what_the_rewards_said(tmp_path: Path):
    seen: list[float] = []

    def remembered(completion_ids: list[list[int]]) -> list[float]:
        seen.extend(even_share(completion_ids))
        return seen[-len(completion_ids) :]

    result = make_trainer(tmp_path, reward_funcs=remembered, settings={"max_steps": 1}).train()
    assert len(seen) == 2 * 4
    assert result.metrics[0]["reward"] == pytest.approx(sum(seen) / 8, rel=1e-6)
    assert result.metrics[0]["rewards/remembered/mean"] == pytest.approx(sum(seen) / 8, rel=1e-6)
    assert result.metrics[0]["tokens/completion"] == result.metrics[0]["completions/mean_length"] * 8


def test_paths_train_exactly_as_the_objects_they_name(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    by_object = make_trainer(tmp_path / "objects", reward_funcs=[even_share, "sentiment"])
    by_path = make_trainer(
        tmp_path / "paths",
        model=str(tiny_folder),
        processing_class=None,
        train_dataset=str(rows),
        reward_funcs=[f"{__name__}:even_share", "sentiment"],
    )
    assert numbers(by_object.train()) == numbers(by_path.train())
    expected = weights(by_object)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in weights(by_path).items())
    assert by_path.spec.model.path == str(tiny_folder)
    assert by_path.spec.data.train.path == str(rows)


def test_dataset_and_generator_train_exactly_as_the_list(tmp_path: Path):
    results = [
        numbers(make_trainer(tmp_path / str(index), train_dataset=rows).train())
        for index, rows in enumerate([ROWS, datasets.Dataset.from_list(ROWS), (row for row in ROWS)])
    ]
    assert results[0] == results[1] == results[2]
    assert numbers(make_trainer(tmp_path / "other", settings={"seed": 1}).train()) != results[0]


def test_columns_reach_the_reward(tmp_path: Path):
    words: list[str] = []

    def score(completions: list[Any], prompts: list[Any], word: list[str]) -> list[float]:
        assert [prompt[-1]["content"] for prompt in prompts] == [f"say {each}" for each in word]
        words.extend(word)
        return [0.0] * len(completions)

    make_trainer(tmp_path, reward_funcs=score).train()
    assert sorted(words) == sorted(row["word"] for row in ROWS for _ in range(4))


def test_what_rewards_log_is_in_tables_and_metrics_and_they_know_the_step(tmp_path: Path):
    def even(completion_ids: Any, word: Any, trainer_state: Any, log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("word", word)
        log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
        return even_share(completion_ids)

    result = make_trainer(tmp_path, reward_funcs=even, eval_dataset=ROWS[:2]).train()
    rows = [row for row in result.metrics if "rewards/even/progress" in row]
    assert [row["rewards/even/progress"] for row in rows] == [0.0, 0.5]
    rows = [row for row in result.metrics if "eval/reward" in row]
    assert [row["eval/rewards/even/progress"] for row in rows] == [0.0, 1.0]
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "heldout-step-2.parquet")
    assert table["extra/even/word"].to_pylist() == [row["word"] for row in ROWS[:2] for _ in range(4)]


def test_async_reward_trains(tmp_path: Path):
    async def judge(completion_ids: list[list[int]]) -> list[float]:
        return even_share(completion_ids)

    expected = make_trainer(tmp_path / "a", reward_funcs=even_share).train().metrics[-1]["loss"]
    assert make_trainer(tmp_path / "b", reward_funcs=judge).train().metrics[-1]["loss"] == expected


def test_held_out_prompts_are_sampled_before_and_after(tmp_path: Path):
    trainer = make_trainer(tmp_path, eval_dataset=ROWS[:1], settings={"max_steps": 3, "eval_steps": 2})
    rows = [row for row in trainer.train().metrics if "eval/reward" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert rows[0]["eval/kl/ref"] == 0.0
    assert rows[-1]["eval/kl/ref"] > 0.0
    completions = tmp_path / "run" / "completions"
    assert {f"heldout-step-{step}.parquet" for step in (0, 2, 3)} <= {file.name for file in completions.iterdir()}


def test_every_method_is_known_by_its_name(tmp_path: Path):
    for name, spec in ALGORITHM_SPECS.items():
        changes = WITHOUT_REWARDS if spec.logged else {}
        assert make_other_trainer(tmp_path, algorithm=name, **changes).spec.algorithm == spec()


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [("rloo", {}), (GRPOSpec(beta=0.0, updates=2), {}), *((name, WITHOUT_REWARDS) for name in OFFLINE),
     (DPOSpec(beta=0.5), WITHOUT_REWARDS)],
)  # fmt: skip
def test_methods_train_by_their_name_or_spec(tmp_path: Path, algorithm: Any, changes: dict[str, Any]):
    trainer = make_other_trainer(tmp_path, algorithm=algorithm, **changes)
    assert trainer.spec.algorithm == (ALGORITHM_SPECS[algorithm]() if isinstance(algorithm, str) else algorithm)
    assert len(trainer.spec.rewards) == (0 if changes else 1)
    result = trainer.train()
    assert result.steps == 2
    assert all(math.isfinite(value) for row in result.metrics for value in row.values())
    assert len({"reward", "rollout/logprob_gap"} & result.metrics[0].keys()) == (0 if changes else 2)
    if not changes:
        assert result.metrics[0]["rewards/even_share/mean"] == result.metrics[0]["reward"]
    assert not torch.equal(weights(trainer)["model.norm.weight"], make_model().model.norm.weight)


@pytest.mark.parametrize("target", [TargetKLSpec(target_kl=1.0), TargetESSSpec(target_ess=0.5)])
def test_beta_may_be_chosen_each_step(tmp_path: Path, target: Any):
    trainer = make_other_trainer(tmp_path, algorithm=DARSpec(beta=target))
    assert trainer.spec.algorithm == DARSpec(beta=target)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(trainer.spec))
    assert load_recipe(recipe) == trainer.spec
    assert trainer.train().steps == 2
    assert load_recipe(tmp_path / "run" / "config.yaml") == trainer.spec


def test_first_step_of_dpo_knows_no_preference(tmp_path: Path):
    # The policy is π₀: every margin is 0, the loss −log σ(0) = log 2, and no chosen one is ahead.
    first = make_other_trainer(tmp_path, algorithm="dpo", reward_funcs=None, train_dataset=LOGGED).train().metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_preferences_train_the_same_from_every_kind_of_rows(tmp_path: Path):
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in LOGGED]
    whole = [{name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")} for row in pairs]
    texts = [row | {name: row[name][0]["content"] for name in ("chosen", "rejected")} for row in pairs]
    given = [pairs, whole, texts, datasets.Dataset.from_list(pairs), datasets.Dataset.from_list(whole)]
    found = []
    for index, rows in enumerate(given):
        args = make_config(TrainingConfig, output_dir=str(tmp_path / str(index)))
        trainer = Trainer(make_model(), None, args, rows, algorithm="dpo", processing_class=make_tokenizer())
        found.append(numbers(trainer.train()))
    assert all(each == found[0] for each in found)


def test_offline_method_measures_held_out_samples_with_the_rewards(tmp_path: Path):
    trainer = make_other_trainer(tmp_path, algorithm="dpo", train_dataset=LOGGED, eval_dataset=ROWS[:1])
    rows = [row for row in trainer.train().metrics if "eval/reward" in row]
    assert [row["step"] for row in rows] == [0, 2]
    assert all(0.0 <= row["eval/rewards/even_share/mean"] <= 1.0 for row in rows)


def test_rewards_are_weighted_in_their_order(tmp_path: Path):
    def size(completion_ids: list[list[int]]) -> list[int]:
        return [len(ids) for ids in completion_ids]

    trainer = make_trainer(tmp_path, reward_funcs=[even_share, size], settings={"reward_weights": [2.0, -1.0]})
    metrics = trainer.train().metrics[0]
    expected = 2 * metrics["rewards/even_share/mean"] - metrics["rewards/size/mean"]
    assert metrics["reward"] == pytest.approx(expected, rel=1e-5)


def test_rewards_of_every_kind_are_scored_together(tmp_path: Path):
    scorer = save_classifier(tmp_path / "scorer")
    given = [even_share, "sentiment", f"{__name__}:even_share_2", LengthRewardSpec(target=4), scorer,
             {"type": "regex", "pattern": "e"}, AutoModelForSequenceClassification.from_pretrained(scorer),
             make_classifier(seed=1), {"type": "model", "name": "by_dict", "model": str(scorer)}]  # fmt: skip
    tokenizers = [*[None] * 7, make_tokenizer(), None]
    settings = {"reward_weights": [float(index) for index in range(9)]}
    trainer = make_trainer(tmp_path, reward_funcs=given, reward_processing_classes=tokenizers, settings=settings)
    assert [reward.weight for reward in trainer.spec.rewards] == settings["reward_weights"]
    metrics = trainer.train().metrics[0]
    scores = [metrics[f"rewards/{reward_name(reward)}/mean"] for reward in trainer.spec.rewards]
    assert metrics["reward"] == pytest.approx(sum(index * score for index, score in enumerate(scores)), rel=1e-4)
    # The same model by its path, as an object with the tokenizer it came with, and as a recipe has it.
    assert scores[4] == pytest.approx(scores[6], rel=1e-5) == scores[8]
    assert scores[7] != pytest.approx(scores[4], rel=1e-3)


def test_a_weight_is_given_once(tmp_path: Path):
    reward = {"type": "length", "target": 3, "weight": 2.0}
    assert make_trainer(tmp_path, reward_funcs=reward).spec.rewards[0].weight == 2.0
    with pytest.raises(ConfigError, match=r"reward_funcs has the weight 2.0, and reward_weights gives it another"):
        make_trainer(tmp_path, reward_funcs=reward, settings={"reward_weights": [1.0]})


# --- what a trainer has ----------------------------------------------------------------------------------------------


def test_policy_is_evaluated_saved_and_reported_at_any_time(tmp_path: Path):
    given = {"eval_dataset": ROWS[:2], "settings": {"max_steps": 3}, "peft_config": lora()}
    trainer = make_trainer(tmp_path, **given)
    before = trainer.evaluate()
    assert not (tmp_path / "run").exists()
    result = trainer.train()
    assert numbers(result) == numbers(make_trainer(tmp_path / "never_asked", **given).train())
    first, last = (row for row in result.metrics if "eval/reward" in row)
    assert {key: first[key] for key in before} == before
    after = trainer.evaluate()
    assert after == {key: last[key] for key in after} != before
    assert repr(result) == f"TrainResult(steps=3, output_dir='{tmp_path}/run', stopped_by=None)"
    assert result.report().read_text().startswith("<!doctype html>")
    assert trainer.save_model(tmp_path / "copy") == tmp_path / "copy"
    weights_file = "adapter_model.safetensors"
    assert (tmp_path / "copy" / weights_file).read_bytes() == Path(result.model_dir, weights_file).read_bytes()
    assert (trainer.model, trainer.tokenizer.chat_template) == (model_of(trainer), make_tokenizer().chat_template)
    with pytest.raises(ConfigError, match=r"completions would be replaced, and holds .*\.parquet and no model"):
        trainer.save_model(tmp_path / "run" / "completions")
    with pytest.raises(CheckpointError, match=r"nothing was uploaded to me/it \(OfflineModeIsEnabled"):
        trainer.push_to_hub("me/it")
    with pytest.raises(ConfigError, match="has trained its model already"):
        trainer.train(resume_from_checkpoint=True)


def test_a_finished_run_is_uploaded_whole_and_an_upload_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"hub_model_id": "lab/it", "max_steps": 1}
    with ScriptedHub(monkeypatch) as hub:
        hub.status = 403
        with pytest.raises(CheckpointError, match=r"nothing was uploaded to lab/it .*or `dar export .* --push lab/it`"):
            make_trainer(tmp_path, settings=settings).train()
        assert hub.commits == []
        hub.status = 200
        trainer = make_trainer(tmp_path, settings=settings)
        result = trainer.train(resume_from_checkpoint=True)
        sent = {file.name: file.read_bytes() for file in Path(result.model_dir).iterdir()}
        report = result.report().read_bytes()
        assert hub.commits == [("lab/it", "main", {**sent, "report.html": report})]
        assert (hub.made[-1]["organization"], hub.made[-1]["name"]) == ("lab", "it")
        assert hub.made[-1]["visibility"] == "private"
        assert trainer.push_to_hub("me/other", private=False) == f"{hub.url}/me/other/commit/{'a' * 40}"
        repository, branch, again = hub.commits[-1]
        assert (repository, branch, hub.made[-1]["visibility"]) == ("me/other", "main", "public")
        assert {name: again[name] for name in ("model.safetensors", "report.html")} == {
            "model.safetensors": sent["model.safetensors"],
            "report.html": report,
        }


@pytest.mark.parametrize(
    ("account", "repository", "message"),
    [
        (None, "me/it", r"does not say whose the token is \(HfHubHTTPError: .*Nothing was trained"),
        ({"name": "me", "orgs": [{"name": "lab"}]}, "you/it", "is that of me, who may write to me, lab"),
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, "me/it", "the token of me may only read"),
    ],
)
def test_a_hub_that_would_refuse_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: dict[str, Any] | None, repository: str, message: str
):
    with ScriptedHub(monkeypatch) as hub:
        hub.account = account
        with pytest.raises(ConfigError, match=f"hub.repository is {repository}, but .*{message}"):
            make_trainer(tmp_path, settings={"hub_model_id": repository}).train()
    assert not (tmp_path / "run").exists()


def test_without_a_token_or_a_hub_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(tmp_path, settings={"hub_model_id": "me/it"})
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(ConfigError, match=r"does not say whose the token is \(OfflineModeIsEnabled"):
        trainer.train()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("dar.files.hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="there is no token to write with: `hf auth login`, or set HF_TOKEN"):
        trainer.train()


def test_what_is_not_there_yet_is_said(tmp_path: Path):
    trainer = make_trainer(tmp_path, model="toy:letters")
    for ask, message in (
        (trainer.evaluate, "pass held-out prompts as eval_dataset"),
        (trainer.save_model, r"call train\(\) first"),
        (lambda: trainer.model, r"toy:letters is not loaded yet: train\(\) does that"),
    ):
        with pytest.raises(ConfigError, match=message):
            ask()


def test_errors_speak_of_python(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"Start without resume_from_checkpoint=True\.$"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(DataError, match=r"\(In Python: data.long_prompts is overrides=.* is max_completion_"):
        make_trainer(tmp_path, train_dataset=[{"prompt": "a" * 300}]).train()


# --- the reference ---------------------------------------------------------------------------------------------------


def test_given_reference_is_what_the_policy_is_held_against(tmp_path: Path):
    other = tmp_path / "other"
    make_model(seed=1).save_pretrained(other)
    reference = make_model(seed=1)
    by_object = make_trainer(tmp_path / "a", ref_model=reference).train()
    by_path = make_trainer(tmp_path / "b", ref_model=str(other)).train()
    assert by_object.metrics[0]["kl/ref"] > 1.0
    assert numbers(by_object) == numbers(by_path)
    before = dict(make_model(seed=1).named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in reference.named_parameters())


def test_model_cannot_be_its_own_reference_object(tmp_path: Path):
    model = make_model()
    with pytest.raises(ConfigError, match="ref_model"):
        make_trainer(tmp_path, model=model, ref_model=model).train()


# --- adapters --------------------------------------------------------------------------------------------------------


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def test_adapter_is_trained_on_a_base_that_stays(tmp_path: Path):
    trainer = make_trainer(tmp_path, peft_config=lora(lora_dropout=0.5))
    result = trainer.train()
    assert result.metrics[0]["kl/ref"] == pytest.approx(0.0, abs=1e-3)
    trained, base = weights(trainer), dict(make_model().named_parameters())
    frozen = {name: tensor for name, tensor in trained.items() if "lora_" not in name}
    adapters = {name: tensor for name, tensor in trained.items() if "lora_B" in name}
    assert len(frozen) == len(base)
    names = {name: name.replace("base_model.model.", "").replace(".base_layer", "") for name in frozen}
    assert all(torch.equal(tensor, base[names[name]]) for name, tensor in frozen.items())
    assert adapters
    assert all(tensor.any() for tensor in adapters.values())
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    ids = torch.arange(8).unsqueeze(0)
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "run" / "model"))
    torch.testing.assert_close(loaded(ids).logits, model_of(trainer)(ids).logits)


def test_ranks_shrink_by_an_override_and_not_beside_another_adapter(tmp_path: Path):
    shrinking = {"overrides": ["model.lora.rank={start: 8, energy: 0.9, every: 1}"], "max_steps": 2}
    with pytest.raises(ConfigError, match="peft_config and overrides both describe an adapter"):
        make_trainer(tmp_path, settings=shrinking, peft_config=lora()).train()
    last = make_trainer(tmp_path, settings=shrinking).train().metrics[-1]
    assert last["lora/cut"] == 14
    assert last["lora/rank_max"] < 8


def test_adapter_that_is_not_zero_at_the_start_is_refused(tmp_path: Path):
    with pytest.raises(
        RolloutError, match=r"before the first step the policy already differs from its reference"
    ) as caught:
        make_trainer(tmp_path, peft_config=lora(init_lora_weights=False)).train()
    assert "init_lora_weights" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_frozen_part_of_a_model_stays(tmp_path: Path):
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    before = dict(make_model().named_parameters())
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".layers.0." not in name}


def test_model_object_in_half_precision_is_trained_on_fp32_weights(tmp_path: Path):
    trainer = make_trainer(tmp_path, model=make_model().bfloat16())
    trainer.train()
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}


# --- resuming --------------------------------------------------------------------------------------------------------

LONGER = {"max_steps": 4, "save_steps": 1, "lr_scheduler_type": "linear"}


@pytest.mark.parametrize(
    "changes", [{"eval_dataset": ROWS[:1]}, {"algorithm": VARSpec(), **WITHOUT_REWARDS}], ids=["online", "offline"]
)
def test_run_that_died_goes_on_to_the_same_bytes(tmp_path: Path, changes: dict[str, Any]):
    def trainer(folder: str, **more: Any) -> Trainer:
        args = make_config(TrainingConfig, **{"output_dir": str(tmp_path / folder), **LONGER})
        return make_other_trainer(tmp_path, args=args, **{"algorithm": "rloo", **changes, **more})

    whole = trainer("whole")
    expected = numbers(whole.train())
    with pytest.raises(Crash):
        trainer("cut", callbacks=[CrashAt(3)]).train()
    resumed = trainer("cut")
    assert numbers(resumed.train(resume_from_checkpoint=True)) == expected
    last = weights(whole)
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(resumed).items())


def test_run_that_died_before_its_first_checkpoint_starts_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    expected = numbers(make_trainer(tmp_path / "whole").train())
    with pytest.raises(Crash):
        make_trainer(tmp_path / "cut", callbacks=[CrashAt(1)]).train()
    with caplog.at_level(logging.WARNING):
        assert numbers(make_trainer(tmp_path / "cut").train(resume_from_checkpoint=True)) == expected
    assert "has no checkpoint yet; starting from the beginning" in caplog.text


def test_damaged_newest_checkpoint_costs_a_step_and_no_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    expected = numbers(make_trainer(tmp_path / "whole", settings=LONGER).train())
    with pytest.raises(Crash):
        make_trainer(tmp_path / "cut", settings=LONGER, callbacks=[CrashAt(4)]).train()
    (newest,) = (tmp_path / "cut" / "run" / "checkpoints" / "step-3").glob("shard-*")
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        result = make_trainer(tmp_path / "cut", settings=LONGER).train(resume_from_checkpoint=True)
    assert numbers(result) == expected
    assert "step-3 is damaged (shard-00001-model-00001-of-00001.safetensors has" in caplog.text


def test_run_goes_on_from_a_checkpoint_that_is_named_and_forgets_what_came_later(tmp_path: Path):
    settings = {**LONGER, "save_total_limit": 4}
    whole = make_trainer(tmp_path, settings=settings, eval_dataset=ROWS[:1])
    expected = numbers(whole.train())
    checkpoints, last = tmp_path / "run" / "checkpoints", weights(whole)
    kept = ", ".join(str(checkpoints / f"step-{step}") for step in (4, 3, 2, 1))
    for wrong in (tmp_path, checkpoints / "step-7", 2):
        with pytest.raises(ConfigError, match=f"must be True or False, or a checkpoint of this run, .* {kept}$"):
            make_trainer(tmp_path, settings=settings).train(resume_from_checkpoint=wrong)  # pyright: ignore[reportArgumentType]
    branch = make_trainer(tmp_path, settings=settings, eval_dataset=ROWS[:1], callbacks=[CrashAt(3)])
    with pytest.raises(Crash):
        branch.train(resume_from_checkpoint=str(checkpoints / "step-2"))
    # What came after it is gone before the first new step.
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-1", "step-2"]
    again = make_trainer(tmp_path, settings=settings, eval_dataset=ROWS[:1])
    assert numbers(again.train(resume_from_checkpoint=tmp_path / "run")) == expected
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(again).items())
    (checkpoints / "step-1" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-1 is damaged; name another"):
        make_trainer(tmp_path, settings=settings, eval_dataset=ROWS[:1]).train(checkpoints / "step-1")


def test_folder_without_a_run_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no run to resume: .* exist.*Start without resume_from_checkpoint=True"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_folder_with_a_run_is_not_trained_over(tmp_path: Path):
    make_trainer(tmp_path).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"already holds a run: .*resume_from_checkpoint=True"):
        make_trainer(tmp_path).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, lambda: {"model": make_model(seed=1)}, "was trained from another initial model: π₀'s weights differ"),
        ({"ref_model": 1}, lambda: {"ref_model": make_model(seed=2)}, "π₀'s weights differ"),
        ({}, lambda: {"settings": {**LONGER, "learning_rate": 2e-2}}, r"optim\.learning_rate: 0\.01 → 0\.02"),
        ({"peft_config": lora(r=2)}, lambda: {"peft_config": lora(r=3)},
         r"is of another model: .* trainable tensors differ in name or shape"),
    ],
    ids=["initial weights", "reference", "settings", "rank"],
)  # fmt: skip
def test_run_is_not_resumed_with_another(tmp_path: Path, first: dict[str, Any], then: Any, message: str):
    if "ref_model" in first:
        first = {"ref_model": make_model(seed=1)}
    make_trainer(tmp_path, **{"settings": LONGER} | first).train()
    with pytest.raises(CheckpointError, match=message):
        make_trainer(tmp_path, **{"settings": LONGER} | first | then()).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"train_dataset": [*ROWS[:3], {**ROWS[3], "word": "other"}]}, ["data.train (its rows)"]),
        ({"train_dataset": ROWS[::-1]}, ["data.train (its rows)", "data.train (its tokens"]),
        ({"eval_dataset": ROWS[:1]}, ["data.heldout (its rows)", "data.heldout (its tokens"]),
        ({"processing_class": "dated"}, ["data.heldout (its tokens", "data.train (its tokens"]),
    ],
)
def test_run_is_not_resumed_with_other_data_unless_it_may(tmp_path: Path, changes: dict[str, Any], changed: list[str]):
    make_trainer(tmp_path, settings=LONGER, eval_dataset=ROWS[:2]).train()
    if "processing_class" in changes:
        # As of a chat template that writes today's date, on the next day.
        changes["processing_class"] = make_tokenizer()
        changes["processing_class"].chat_template = "Wednesday. {{ messages[-1].content }}"

    def resume(*, allow: bool = False) -> None:
        other = make_trainer(tmp_path, settings=LONGER, **{"eval_dataset": ROWS[:2]} | changes)
        other.train(resume_from_checkpoint=True, allow_changed_recipe=allow)

    with pytest.raises(CheckpointError) as caught:
        resume()
    _, *lines, _ = str(caught.value).splitlines()
    assert [line for line, start in zip(lines, changed, strict=True) if line.startswith(f"  {start}")] == lines
    resume(allow=True)
    resume()


def test_path_of_a_checkpoint_is_not_silently_taken_for_yes(tmp_path: Path):
    make_trainer(tmp_path).train()
    with pytest.raises((CheckpointError, ConfigError), match="no/such/checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint="no/such/checkpoint")  # pyright: ignore[reportArgumentType]


# --- what cannot run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"processing_class": None}, ConfigError, "a model given as an object needs its tokenizer: pass process"),
        ({"processing_class": make_tokenizer(chat=False)}, ConfigError, "the tokenizer has no chat template"),
        ({"model": lambda: make_model().requires_grad_(False)}, ConfigError,
         "nothing is trainable: every parameter of the model has requires_grad=False"),
        ({"ref_model": lambda: make_model(vocab_size=100)}, ConfigError, "vocabulary"),
        ({"reward_funcs": "sentment"}, ConfigError, r"unknown type 'sentment' \(did you mean 'sentiment'\?\)"),
        ({"reward_funcs": "no_such_module:score"}, ConfigError, "the module no_such_module cannot be imported"),
        ({"train_dataset": None}, ConfigError, r"train_dataset is missing: pass a datasets\.Dataset, a list of rows"),
        ({"train_dataset": []}, ConfigError, "^train_dataset has no rows$"),
        ({"train_dataset": [{"text": "a"}]}, DataError,
         r"list>: row 0 has no column 'prompt'; it has text\. .*overrides=\['data.prompt_column=…'\]"),
        ({"train_dataset": [ROWS[0], {"text": "a"}]}, DataError, "list>: row 1 has no column 'prompt'; it has text"),
        ({"train_dataset": [{"prompt": 5}]}, DataError, "list>: row 0: 'prompt' must be a non-empty string or a list"),
        ({"train_dataset": ["a"]}, ConfigError, "train_dataset: row 0 is a str, .* as {'prompt': '…'}"),
        ({"train_dataset": Path("absent.jsonl")}, DataError, "the data file absent.jsonl does not"),
        ({"train_dataset": datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS)})}, ConfigError,
         r"^train_dataset is a DatasetDict of a, .* such as data\['a'\] \(of columns: Dataset.from_dict\(data\)\)$"),
        ({"eval_dataset": datasets.Dataset.from_list(ROWS).to_iterable_dataset()}, ConfigError,
         r"eval_dataset comes row by row, .*: pass list\(data.take\(10_000\)\)"),
        ({"train_dataset": [{"prompt": "a" * 300}]}, DataError, "list>: 1 of 1 prompts are longer than 248 tokens"),
        ({"args": TrainingConfig(output_dir="run", max_steps=1)}, ConfigError,
         r"args must be a DARConfig, got a TrainingConfig: write DARConfig\(output_dir="),
        ({"args": SETTINGS}, ConfigError, r"args must be a DARConfig, got a dict: write DARConfig\(\*\*settings\)"),
        ({"model": lambda: even_share}, ConfigError,
         "model is the function even_share; expected a causal language .* Are model and reward_funcs swapped"),
        ({"model": make_classifier}, ConfigError, "model is a LlamaForSequenceClassification; .* RewardTrainer trains"),
        ({"processing_class": "gpt2"}, ConfigError, "processing_class is 'gpt2', and no tokenizer"),
        ({"peft_config": {"r": 8}}, ConfigError, r"peft_config is a dict; expected one of peft: LoraConfig\(r=16"),
        ({"callbacks": [Callback]}, ConfigError, "callbacks has the class Callback: pass an instance of it"),
        ({"tokenizer": 1}, ConfigError, "^DARTrainer has no argument tokenizer: it is called processing_class$"),
        ({"beta": 1}, ConfigError, r"has no argument beta: it belongs into args, DARConfig\(beta=…\)"),
        ({"eval_datset": 1}, ConfigError, r"has no argument eval_datset \(did you mean 'eval_dataset'\?\)"),
        ({"reward_funcs": [even_share, 3]}, ConfigError, r"reward_funcs\[1\] is 3, and no reward\. A reward is"),
        ({"reward_funcs": Asks}, ConfigError, "reward_funcs is the class Asks, and no reward"),
        ({"reward_funcs": make_model()}, ConfigError, "reward_funcs is a LlamaForCausalLM, and no reward"),
        ({"reward_funcs": make_classifier()}, ConfigError, "pass its tokenizer as reward_processing_classes"),
        ({"reward_funcs": make_classifier(num_labels=2), "reward_processing_classes": make_tokenizer()}, ConfigError,
         r"reward_funcs has 2 outputs \(num_labels\)"),
        ({"reward_funcs": lambda completions, word, prompt: []}, ConfigError,
         r"reward '<lambda>' takes prompt, which nobody passes \(did you mean 'prompts'\?\): .*, trainer_state, word$"),
        ({"reward_funcs": lambda completions, /: [], "train_dataset": "package:dar/prompts/toy.jsonl"}, ConfigError,
         "takes completions, which nobody passes: it is called by keyword"),
        ({"reward_funcs": lambda prompt: [], "train_dataset": "package:dar/prompts/toy.jsonl"}, ConfigError,
         "takes prompt, which nobody passes"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_it_begins(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
):
    models = changes.keys() & {"model", "ref_model"}
    changes = {name: made() if name in models else made for name, made in changes.items()}
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **changes).train()
    # Models are compared when the run has its folder.
    assert not (tmp_path / "run" / ("metrics.jsonl" if models else "")).exists()


gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
apple_gpu = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
NO_GPU = "but torch .* sees 0 CUDA devices; use .*=cpu"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("reward_weights", [1.0, 2.0], "reward_weights has 2 values for 1 reward functions"),
        ("max_completion_length", 256, "max_completion_length is 256, but the model reads at most 256 tokens"),
        (
            "report_to",
            ["tensorboard", "nosuch"],
            r"logging\.trackers: nosuch cannot be used here; known: .*tensorboard",
        ),
        ("warmup_steps", -1, r"(?s)DARConfig cannot be run as written:.*optim\.warmup_steps: Input should be"),
        pytest.param("device", "cuda", f"runtime.device is cuda, {NO_GPU}", marks=gpu),
        pytest.param("device", "cuda:3", f"runtime.device is cuda:3, {NO_GPU}", marks=gpu),
        pytest.param("device", "mps", "runtime.device is mps, but this torch sees no Apple GPU", marks=apple_gpu),
        ("device", "gpu", "runtime.device: 'gpu' is not a device; use auto, cpu, cuda, cuda:N or mps"),
        ("device", "meta", "use auto, cpu, cuda, cuda:N or mps"),
        ("device", "xpu", "use auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_setting_that_cannot_be_is_refused(tmp_path: Path, setting: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, settings={setting: value}).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *(({"algorithm": name, "reward_funcs": rewards}, ConfigError,
           f"^{name} learns from the rewards of its own samples: pass reward_funcs. .Only {', '.join(OFFLINE)} learn "
           "from the completions of the data.\\)$") for name in ("rloo", "online_dpo") for rewards in (None, [])),
        ({"args": None}, ConfigError, "args must be a TrainingConfig, got None: write TrainingConfig"),
        ({"algorithm": "dpo", "reward_funcs": None}, DataError,
         "<train_dataset: list>: row 0 has no column 'chosen'; preferences need prompt, chosen, rej"),
        ({"algorithm": "dpo", **WITHOUT_REWARDS, "eval_dataset": ROWS[:1]}, DataError,
         "<eval_dataset: list>: row 0 has no column 'chosen'; preferences need"),
    ],
)  # fmt: skip
def test_method_without_what_it_learns_from_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        make_other_trainer(tmp_path, **changes).train()
    assert not (tmp_path / "run").exists()


def test_failing_reward_stops_the_run_with_step_and_name(tmp_path: Path):
    calls: list[int] = []

    def judge(completions: list[Any]) -> list[float]:
        calls.append(len(completions))
        return [math.nan if len(calls) == 2 else 0.5] * len(completions)

    with pytest.raises(RewardError, match=r"reward 'judge' returned nan for row 0 at step 2; .* completion was: "):
        make_trainer(tmp_path, reward_funcs=judge).train()
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]


def test_two_functions_of_one_name_are_told_apart(tmp_path: Path):
    trainer = make_trainer(tmp_path, reward_funcs=[even_share, even_share])
    assert [reward_name(reward) for reward in trainer.spec.rewards] == ["even_share", "even_share_2"]


def test_unknown_algorithm_is_refused_with_those_there_are(tmp_path: Path):
    found = {
        "trpp": "'trpp'",
        DARSpec: "the class DARSpec",
        "rlo": "'rlo', which is not known (did you mean 'rloo'?)",
    }
    for algorithm, said in found.items():
        with pytest.raises(ConfigError) as caught:
            make_trainer(tmp_path, algorithm=algorithm, settings={"beta": 0.5})
        assert str(caught.value).startswith(f"algorithm is {said}")
        assert str(caught.value).endswith(f"or one of the names {', '.join(ALGORITHM_SPECS)}")


def test_no_method_is_taken_in_silence(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"algorithm is missing: .* GRPO script of TRL, algorithm='grpo'"):
        make_other_trainer(tmp_path, algorithm=None)


def test_all_problems_of_a_call_are_told_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        make_other_trainer(
            tmp_path, model=3, reward_funcs=None, train_dataset=[], optimizers=1, args=None, algorithm=None
        )
    message = str(caught.value)
    assert message.startswith("Trainer cannot be made of these arguments:\n  * ")
    for part in (
        "no argument optimizers: args has optim",
        "args must be",
        "model is 3",
        "has no rows",
        "algorithm is missing",
    ):
        assert part in message


def test_groups_of_one_are_not_for_every_method(tmp_path: Path):
    one = make_config(TrainingConfig, output_dir=str(tmp_path / "run"), num_generations=1)
    with pytest.raises(ConfigError, match="num_generations is 1, but grpo compares the completions of one prompt"):
        make_other_trainer(tmp_path, algorithm="grpo", args=one)
    assert make_trainer(tmp_path, settings={"num_generations": 1, "prompts_per_step": 4}).train().steps == 2


# --- configurations --------------------------------------------------------------------------------------------------


KEYS_OF_SETTINGS: list[tuple[str, Any, str]] = [
    ("max_steps", 7, "steps"),
    ("prompts_per_step", 3, "prompts_per_step"),
    ("num_generations", 3, "num_generations"),
    ("max_completion_length", 5, "sampling.max_completion_length"),
    ("temperature", 0.5, "sampling.temperature"),
    ("learning_rate", 0.25, "optim.learning_rate"),
    ("lr_scheduler_type", "cosine", "optim.schedule"),
    ("warmup_steps", 4, "optim.warmup_steps"),
    ("weight_decay", 0.1, "optim.weight_decay"),
    ("max_grad_norm", 2.0, "optim.max_grad_norm"),
    ("gradient_checkpointing", True, "model.gradient_checkpointing"),
    ("max_tokens_per_microbatch", 77, "runtime.max_tokens_per_microbatch"),
    ("torch_compile", True, "runtime.compile_layers"),
    ("precision", "bf16", "runtime.precision"),
    ("device", "cuda:1", "runtime.device"),
    ("seed", 8, "seed"),
    ("logging_steps", 9, "logging.every"),
    ("save_steps", 10, "checkpoint.every"),
    ("save_total_limit", 11, "checkpoint.keep"),
    ("eval_steps", 12, "evaluation.every"),
    ("output_dir", "elsewhere", "output_dir"),
    ("reward_weights", [2.5], "rewards.0.weight"),
    ("alpha", 0.3, "algorithm.alpha"),
    ("beta", 0.4, "algorithm.beta"),
    ("w_clip", 5.0, "algorithm.w_clip"),
    ("weight_scale", "mean", "algorithm.weight_scale"),
    ("updates", 6, "algorithm.updates"),
]


@pytest.mark.parametrize(("setting", "value", "key"), KEYS_OF_SETTINGS)
def test_setting_becomes_its_key_of_the_recipe_and_nothing_else(tmp_path: Path, setting: str, value: Any, key: str):
    before, after = (
        flatten(make_trainer(tmp_path).spec),
        flatten(make_trainer(tmp_path, settings={setting: value}).spec),
    )
    assert {name for name in before if before[name] != after[name]} == {key}
    assert after[key] == (value[0] if isinstance(value, list) else value)


def test_settings_that_are_more_than_one_key(tmp_path: Path):
    overrides = ["evaluation.num_generations=7", "seed=3"]
    spec = make_trainer(tmp_path, settings={"optim": "adafactor", "report_to": "wandb", "overrides": overrides}).spec
    assert (spec.optim.type, spec.optim.learning_rate, spec.logging.trackers) == ("adafactor", 1e-2, ["wandb"])
    assert (spec.evaluation.num_generations, spec.seed) == (7, 3)
    assert make_trainer(tmp_path, settings={"report_to": "none"}).spec.logging.trackers == []
    hub = make_trainer(tmp_path, settings={"hub_model_id": "me/it", "hub_private_repo": False}).spec.hub
    assert hub == HubSpec(repository="me/it", private=False)


def test_every_setting_is_tried_above():
    tried = {
        "optim",
        "report_to",
        "overrides",
        "hub_model_id",
        "hub_private_repo",
        *(setting for setting, _, _ in KEYS_OF_SETTINGS),
    }
    assert tried == DARConfig.model_fields.keys()


def test_objects_are_described_in_the_recipe(tmp_path: Path):
    spec = make_trainer(tmp_path, ref_model=make_model(), eval_dataset=datasets.Dataset.from_list(ROWS)).spec
    assert spec.model.path == "<LlamaForCausalLM>"
    assert spec.reference is not None
    assert spec.reference.path == "<LlamaForCausalLM>"
    assert spec.data.train.path == "<train_dataset: list>"
    assert spec.data.heldout is not None
    assert spec.data.heldout.path == "<eval_dataset: Dataset>"
    assert [reward_name(reward) for reward in spec.rewards] == ["even_share"]


def test_defaults_of_the_config_are_those_of_the_recipe():
    assert DARConfig(output_dir="run", max_steps=1).algorithm == DARSpec()


def test_letters_of_the_2025_paper_are_translated():
    config = DARConfig.from_2025(alpha_25=0.01, beta_25=0.03, output_dir="run", max_steps=1)
    assert (config.alpha, config.beta) == (pytest.approx(0.25), pytest.approx(0.04))


def test_misspelt_setting_suggests_the_nearest():
    with pytest.raises(
        ConfigError, match=r"^DARConfig: unknown key 'num_generation' \(did you mean 'num_generations'\?\)"
    ):
        make_config(DARConfig, num_generation=4)


def test_impossible_settings_are_all_named():
    with pytest.raises(ConfigError) as caught:
        make_config(DARConfig, max_steps=0, alpha=2.0, beta=0.0, w_clip=-1.0, learning_rate="1e-5")
    message = str(caught.value)
    for key in ("max_steps", "alpha", "beta", "w_clip", "learning_rate"):
        assert f"{key}: Input should be" in message


def test_required_settings_are_named():
    with pytest.raises(ConfigError, match=r"(?s)output_dir: this key is required.*max_steps: this key is required"):
        DARConfig(**{})


def test_settings_of_dar_are_not_dropped_by_the_plain_trainer(tmp_path: Path):
    args = make_config(DARConfig, output_dir=str(tmp_path / "run"), alpha=0.9)
    assert make_other_trainer(tmp_path, args=args, algorithm=None).spec.algorithm == DARSpec(alpha=0.9)


def test_settings_of_dar_beside_another_method_are_refused(tmp_path: Path):
    args = make_config(DARConfig, output_dir=str(tmp_path / "run"), beta=0.5, alpha=0.9)
    for algorithm in ("grpo", DARSpec(beta=TargetKLSpec(target_kl=1.0))):
        with pytest.raises(
            ConfigError, match="args sets alpha, beta, which algorithm=… replaces: use a TrainingConfig"
        ):
            make_other_trainer(tmp_path, args=args, algorithm=algorithm)


def test_untouched_settings_of_dar_make_room_for_a_spec(tmp_path: Path):
    spec = DARSpec(beta=TargetKLSpec(target_kl=1.0))
    assert make_trainer(tmp_path, algorithm=spec).spec.algorithm == spec


def test_model_card_names_the_trainer(tmp_path: Path):
    make_other_trainer(tmp_path, algorithm="rloo").train()
    make_trainer(tmp_path / "dar").train()
    assert "```sh\nTrainer(…).train()\n" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "```sh\nDARTrainer(…).train()\n" in (tmp_path / "dar" / "run" / "model" / "README.md").read_text()


def test_faces_are_imported_from_the_package():
    assert dar.DARTrainer is DARTrainer
    with pytest.raises(AttributeError, match="module 'dar' has no attribute 'PPOTrainer'"):
        dar.PPOTrainer  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_a_reward_function_that_raises_when_asked_its_name_is_refused(tmp_path: Path):
    class Nameless:
        def __getattr__(self, name: str) -> Any:
            raise SystemExit(name)

        def __call__(self, completions: list[Any]) -> list[float]:
            return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="a reward function raised SystemExit when asked its name: __name__"):
        make_trainer(tmp_path, reward_funcs=Nameless())
