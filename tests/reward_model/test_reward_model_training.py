"""Training reward models: learning, exact resume, and a folder that transformers loads and scores the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from support.ranks import on_ranks
from support.reward_models import save_classifier
from support.rows import write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from dar import RewardConfig, RewardTrainer
from dar.cli.app import app
from dar.config.recipe import load_recipe
from dar.config.reward_model import RewardModelSpec
from dar.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from dar.policies.precision import Precision
from dar.reward_model.build_loop import build_reward_model_loop
from dar.reward_model.score_model import ScoreModel
from dar.reward_model.training import RewardModelResult, run_reward_model

CPU = Precision(torch.device("cpu"), torch.float32)
FP32 = {"device": "cpu", "precision": "fp32"}
WORDS = ("rain", "tea", "stone", "moss", "lamp", "fog", "corn", "ink")


def write_recipe(tmp_path: Path, *, chat: bool = True, **changes: Any) -> Path:
    """The chosen answer says yes, the rejected one no; lengths differ."""
    if not (tmp_path / "base").exists():
        make_model().save_pretrained(tmp_path / "base")
        make_tokenizer(chat=chat).save_pretrained(tmp_path / "base")
    rows = [
        {"prompt": f"Is {word} {adjective}?", "chosen": f"yes{'!' * (index % 3)}", "rejected": "no, " + word,
         "lead": index % 2}
        for index, (word, adjective) in enumerate((word, adjective) for word in WORDS for adjective in ("wet", "dry"))
    ]  # fmt: skip
    write_rows(tmp_path / "pairs.jsonl", rows)
    recipe: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "data": {
            "train": {"path": str(tmp_path / "pairs.jsonl"), "max_rows": 12},
            "heldout": str(tmp_path / "pairs.jsonl"),
            "wrap_as_user": chat,
        },
        "optim": {"learning_rate": 3e-3},
        "pairs_per_step": 4,
        "steps": 6,
        "output_dir": str(tmp_path / "run"),
        "checkpoint": {"every": 2},
        "runtime": FP32,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def train(recipe: Path, *overrides: str, resume: bool = False) -> RewardModelResult:
    spec = load_recipe(recipe, overrides, kind=RewardModelSpec)
    return run_reward_model(build_reward_model_loop(spec, resume=resume, quiet=True), resume=resume, command="test")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("step_time", "memory/peak_gb")} for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_it_learns_reports_and_is_loaded_by_transformers(tmp_path: Path):
    result = train(write_recipe(tmp_path), "steps=20")
    run = tmp_path / "run"
    before, after = result.evaluation["before"], result.evaluation["after"]
    # A new head is 0: every pair is a tie, and costs log 2.
    assert (before["accuracy"], before["loss"]) == (0.5, pytest.approx(0.6931472))
    assert after["accuracy"] > 0.9
    assert after["num_pairs"] == 16
    assert after["longer_wins_accuracy"] == 0.0, "no, rain is longer than yes!!"
    assert json.loads((run / "evaluation.json").read_text()) == result.evaluation
    assert (run / "config.yaml").is_file()
    assert (run / "environment.json").is_file()
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [0, *range(1, 21), 20]
    assert rows[0] == {"step": 0, **{f"eval/{key}": before[key] for key in ("loss", "accuracy", "ece", "mean_margin")}}
    assert rows[1].keys() >= {"loss", "accuracy", "margin", "mean_reward", "grad_norm", "learning_rate", "epoch"}
    assert "longer wins" in (run / "model" / "README.md").read_text()
    require_same_scores_of_transformers(run)


def test_python_trains_what_the_recipe_does(tmp_path: Path):
    recipe = write_recipe(tmp_path, checkpoint={"every": 50})
    whole = train(recipe)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    settings: dict[str, Any] = {
        "learning_rate": 3e-3, "max_steps": 6, "pairs_per_step": 4, "device": "cpu", "precision": "fp32",
        "overrides": ["data.wrap_as_user=true"],
    }  # fmt: skip

    def trainer(folder: str, **changes: Any) -> RewardTrainer:
        given = {"model": tmp_path / "base", "train_dataset": rows[:12], "eval_dataset": rows}
        return RewardTrainer(args=RewardConfig(output_dir=tmp_path / folder, **settings), **given | changes)  # pyright: ignore[reportArgumentType]

    python = trainer("python")
    result = python.train()
    assert metrics_of(tmp_path / "python") == metrics_of(tmp_path / "run")
    assert_same_weights(tmp_path / "python", tmp_path / "run")
    assert (result.evaluation, result.model_dir) == (whole.evaluation, str(tmp_path / "python" / "model"))
    assert repr(result).startswith(f"RewardModelResult(6 of 6 steps in {tmp_path}/python; held-out accuracy 50.0% → ")
    assert python.evaluate()["eval/accuracy"] == whole.evaluation["after"]["accuracy"]
    copy = python.save_model(tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == Path(result.model_dir, "model.safetensors").read_bytes()
    # A classifier given as an object is trained on as the one in its folder.
    given = AutoModelForSequenceClassification.from_pretrained(result.model_dir, torch_dtype=torch.bfloat16)
    saved = given.save_pretrained(tmp_path / "half") or make_tokenizer().save_pretrained(tmp_path / "half")
    assert saved
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    for folder, model in (("object", given), ("path", str(tmp_path / "half"))):
        trainer(folder, model=model, processing_class=tokenizer).train()
    assert_same_weights(tmp_path / "object", tmp_path / "path")
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    trainer("lora", peft_config=adapter).train()
    assert (tmp_path / "lora" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"model": make_model(), "peft_config": LoraConfig(task_type="CAUSAL_LM"), "max_steps": 3, "args": None},
         ["no argument max_steps: it belongs into args", "args must be a RewardConfig, got None", "model is a LlamaFor",
          r"it needs task_type='SEQ_CLS'"]),
        ({"train_dataset": []}, ["^train_dataset has no rows$"]),
        ({"train_dataset": None}, ["^train_dataset is missing"]),
        ({"args": RewardConfig(output_dir="run")}, [r"either steps or epochs \(max_steps or num_train_epochs\)"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_told_at_once(changes: dict[str, Any], messages: list[str]):
    given = {"model": "toy:letters", "args": RewardConfig(output_dir="run", max_steps=1), "train_dataset": [{"a": 1}]}
    with pytest.raises(ConfigError) as caught:
        RewardTrainer(**given | changes)
    for message in messages:
        assert re.search(message, str(caught.value))


def test_names_of_trl_are_what_they_are_there():
    config = RewardConfig(output_dir="run", num_train_epochs=2, max_length=64, center_rewards_coefficient=0.01)
    spec = config.reward_model_spec(model="m", train="t", heldout=None)
    assert (spec.epochs, spec.steps, spec.loss.centering_coef) == (2, None, 0.01)
    assert (spec.data.max_length, spec.data.long_pairs) == (64, "drop")
    with pytest.raises(ConfigError, match="no 'per_device_train_batch_size': pairs_per_step is the whole batch"):
        RewardConfig(output_dir="run", per_device_train_batch_size=2)  # pyright: ignore[reportCallIssue]


def require_same_scores_of_transformers(run: Path) -> None:
    """The saved folder in transformers, as a padded batch, against the packed pass and what the training reported."""
    spec = load_recipe(run / "config.yaml", kind=RewardModelSpec)
    model: Any = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    rows = [json.loads(line) for line in Path(spec.data.train.path).read_text().splitlines()]
    texts = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
        for row in rows
        for name in ("chosen", "rejected")
    ]
    batch = tokenizer.apply_chat_template(texts, return_dict=True, return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].view(-1, 2)
    ids = [tuple(tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]) for text in texts]
    module = ScoreModel(model)
    assert module.way == "packed"
    packed = module.score(list(zip(ids[::2], ids[1::2], strict=True)), CPU, max_tokens=10_000)
    torch.testing.assert_close(torch.tensor(packed), scores, rtol=1e-5, atol=1e-5)
    reported = json.loads((run / "evaluation.json").read_text())["after"]["mean_margin"]
    assert float((scores[:, 0] - scores[:, 1]).mean()) == pytest.approx(reported, rel=1e-5, abs=1e-5)


def test_training_goes_on_from_a_classifier(tmp_path: Path):
    folder = save_classifier(tmp_path / "classifier")
    result = train(write_recipe(tmp_path), f"model={folder}", "steps=2")
    assert result.evaluation["before"]["mean_margin"] != 0.0
    require_same_scores_of_transformers(tmp_path / "run")
    with pytest.raises(ConfigError, match="has 2 outputs"):
        train(write_recipe(tmp_path), f"model={save_classifier(tmp_path / 'two', num_labels=2)}", "output_dir=x")


def test_a_last_step_that_overflows_leaves_no_model_and_keeps_the_checkpoint_before(tmp_path: Path):
    recipe = write_recipe(tmp_path, optim={"learning_rate": 1e-12, "weight_decay": 1e9}, checkpoint={"every": 1})
    loop = build_reward_model_loop(load_recipe(recipe, ["steps=2"], kind=RewardModelSpec), quiet=True)
    take = loop.step

    def hasty(step: int) -> dict[str, float]:
        if step == 2:
            loop.spec = load_recipe(recipe, ["steps=2", "optim.learning_rate=3e38"], kind=RewardModelSpec)
        return take(step)

    loop.step = hasty
    with pytest.raises(NonFiniteError, match="the update at step 2 overflowed"):
        run_reward_model(loop, resume=False, command="test")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert not (tmp_path / "run" / "model").exists()


def test_adapter_is_merged_into_the_saved_model(tmp_path: Path):
    recipe = write_recipe(tmp_path, model={"path": str(tmp_path / "base"), "lora": {"rank": 4}})
    result = train(recipe, "steps=20", "optim.learning_rate=1e-2")
    assert result.evaluation["after"]["accuracy"] > 0.9
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    require_same_scores_of_transformers(tmp_path / "run")


def test_padding_is_told_from_the_end_of_a_text(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "base")
    train(recipe, "steps=1")
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.pad_token == "<|padding|>"
    assert saved.pad_token_id != saved.eos_token_id
    # The token's embedding is no random one: the model it was made of is found again.
    train(recipe, "steps=1", resume=True)
    require_same_scores_of_transformers(tmp_path / "run")


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path):
    recipe = write_recipe(tmp_path, loss={"margin_column": "lead", "label_smoothing": 0.1, "centering_coef": 0.01})
    for name, tokens in ("whole", 100_000), ("parts", 1):
        train(recipe, f"runtime.max_tokens_per_microbatch={tokens}", f"output_dir={tmp_path / name}", "steps=3")
    for one, other in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_loss_is_margin_smoothing_and_centering_together(tmp_path: Path):
    settings = {"margin_column": "lead", "label_smoothing": 0.1, "centering_coef": 0.5}
    spec = load_recipe(
        write_recipe(tmp_path, loss=settings, model=str(save_classifier(tmp_path / "c"))), kind=RewardModelSpec
    )
    loop = build_reward_model_loop(spec, quiet=True)
    pairs = [loop.pairs[index] for index in loop.order.indices(0)]
    scores = torch.tensor(loop.module.score([(p.chosen, p.rejected) for p in pairs], loop.precision, max_tokens=1000))
    lead = scores[:, 0] - scores[:, 1] - torch.tensor([pair.margin for pair in pairs])
    terms = -0.9 * lead.sigmoid().log() - 0.1 * (-lead).sigmoid().log() + 0.5 * scores.sum(1) ** 2
    assert {pair.margin for pair in loop.pairs} == {0.0, 1.0}
    assert loop.step(1)["loss"] == pytest.approx(float(terms.mean()), rel=1e-4)


def test_killed_training_resumes_to_the_same_bytes(tmp_path: Path):
    recipe = write_recipe(tmp_path, steps=100, checkpoint={"every": 20})
    train(recipe, f"output_dir={tmp_path / 'whole'}")
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dar", "reward-model", str(recipe), f"output_dir={run}", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not (run / "checkpoints" / "step-20").exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline, "the training never got there"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "model").exists()
    train(recipe, f"output_dir={run}", resume=True)
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert_same_weights(run, tmp_path / "whole")


def test_command_prints_a_table_or_json(tmp_path: Path):
    recipe = write_recipe(tmp_path, steps=1)
    printed = CliRunner().invoke(app, ["reward-model", str(recipe), f"output_dir={tmp_path / 'a'}"])
    assert printed.exit_code == 0, printed.output
    assert "longer wins" in printed.output
    assert "chosen longer by" in printed.output
    as_json = CliRunner().invoke(app, ["reward-model", str(recipe), f"output_dir={tmp_path / 'b'}", "--json"])
    found = json.loads(as_json.output)
    assert found["evaluation"].keys() == {"before", "after"}
    assert (found["steps"], found["num_steps"]) == (1, 1)


def test_an_error_between_two_checkpoints_saves_the_last_finished_step(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    train(recipe, f"output_dir={tmp_path / 'whole'}")
    loop = build_reward_model_loop(load_recipe(recipe, kind=RewardModelSpec), quiet=True)
    backward = loop._backward

    def failing(*arguments: Any, **others: Any) -> None:
        if others["where"] == "step 4":
            raise NonFiniteError("the loss is not finite at step 4")
        backward(*arguments, **others)

    loop._backward = failing
    with pytest.raises(NonFiniteError, match="step 4"):
        loop.run(resume=False)
    assert sorted(path.name for path in loop.folder.checkpoints.iterdir()) == ["step-2", "step-3"]
    train(recipe, resume=True)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "say how long to train: either steps or epochs"),
        ({"epochs": 1.0}, "say how long to train: either steps or epochs"),
        ({"rewards": ["sentiment"]}, "unknown key 'rewards'"),
        ({"optim": {"null_space": "x.jsonl"}}, "optim.null_space restricts policies"),
        (
            {"model": {"path": "m", "lora": {"rank": {"start": 4, "every": 2}}}},
            "model.lora.rank shrinks in policies only",
        ),
        ({"checkpoint": {"best": {"metric": "eval/reward"}}}, "checkpoint.best chooses among policies"),
        ({"loss": {"label_smoothing": 0.5}}, "loss.label_smoothing"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path, **changes), kind=RewardModelSpec)


def test_epochs_become_steps():
    spec = RewardModelSpec.model_validate({"model": "m", "data": "d", "epochs": 1.5, "output_dir": "o"})
    assert (spec.num_steps(100), spec.num_steps(1)) == (9, 1)


def test_refusals(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    with pytest.raises(DataError, match=r"16 of 16 pairs have a conversation of more than 5 tokens|12 of 12 pairs"):
        train(recipe, "data.max_length=5")
    with pytest.raises(DataError, match="no pair is left"):
        train(recipe, "data.max_length=5", "data.long_pairs=drop")
    with pytest.raises(CheckpointError, match="no run to resume: "):
        train(recipe, resume=True)
    train(recipe, "steps=1")
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(recipe)
    with pytest.raises(CheckpointError, match=r"pairs_per_step: 4 → 2"):
        train(recipe, "steps=1", "pairs_per_step=2", resume=True)
    make_model(seed=9).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="another initial model"):
        train(recipe, "steps=1", resume=True)


def test_two_ranks_train_the_same_reward_model(tmp_path: Path):
    """Five pairs a step, of seventeen held out, in micro-batches of different numbers."""
    recipe = write_recipe(tmp_path, pairs_per_step=5, steps=3, runtime={"max_tokens_per_microbatch": 60, **FP32})
    train(recipe, f"output_dir={tmp_path / 'one'}")
    command = ("-m", "dar", "reward-model", str(recipe), f"output_dir={tmp_path / 'two'}")
    ranks = on_ranks(*command, cwd=tmp_path)
    said = ranks.stdout.decode()
    assert ranks.returncode == 0, said
    assert said.count("held-out after training") == said.count("the reward model is in") == 1
    for one, other in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert one.pop("num_tokens", 0) == other.pop("num_tokens", 0)
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    first, second = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    for name, tensor in first.items():
        # A step of Adam is lr · m/√v, whose sign and size follow the rounding of the smallest gradients.
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
