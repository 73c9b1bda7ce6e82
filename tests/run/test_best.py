"""The best policy: which evaluation it is of, what replaces it, and what a resumed run makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.handmade import make_spec
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dar.assembly.loop import build_loop
from dar.cli.app import app
from dar.config.recipe import load_recipe
from dar.errors import CheckpointError
from dar.record.folder import RunFolder
from dar.run.best import BestPolicy
from dar.trainer import run_loop

WriteRecipe = Callable[..., Path]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "best" / "best.json").read_text())


def considered(tmp_path: Path, best: dict[str, str], values: list[float | None]) -> list[int]:
    """The steps that were saved, of evaluations 0, 1, … with these values (None: not measured)."""
    folder = RunFolder(tmp_path / "run")

    def save(target: Path, *, card: str, notes: dict[str, str]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        (target / "best.json").write_text(notes["best.json"])

    spec = make_spec(data={"train": "t.jsonl", "heldout": "h.jsonl"}, checkpoint={"best": best})
    policy: Any = SimpleNamespace(save=save)
    keeper = BestPolicy(spec, policy, folder)
    lines = [{} if value is None else {best["metric"]: value} for value in values]
    return [step for step, line in enumerate(lines) if keeper.consider(step, line)]


@pytest.mark.parametrize(
    ("mode", "values", "saved"),
    [
        ("max", [0.0, 1.0, 1.0, 0.5, 2.0], [0, 1, 4]),  # the first of equals stays
        ("min", [0.0, 1.0, -1.0, -1.0, -2.0], [0, 2, 4]),
        ("max", [None, -5.0, None, -4.0], [1, 3]),  # not measured is not best
    ],
)
def test_only_what_is_better_replaces_the_best(tmp_path: Path, mode: str, values: list[float | None], saved: list[int]):
    assert considered(tmp_path, {"metric": "eval/reward", "mode": mode}, values) == saved
    assert record(tmp_path / "run")["step"] == saved[-1]


def test_record_of_another_metric_is_not_one_to_beat(tmp_path: Path):
    considered(tmp_path, {"metric": "eval/reward", "mode": "max"}, [9.0])
    other = {"metric": "eval/rewards/sentiment/mean", "mode": "max"}
    assert considered(tmp_path, other, [0.5, 0.4]) == [0]
    assert record(tmp_path / "run") == {"step": 0, "value": 0.5, **other}


def test_the_card_of_the_best_lists_the_alerts_so_far(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    alert = {"step": 1, "rule": "kl", "value": 26.0, "threshold": 25.0, "message": "KL is 26", "action": "mark"}
    (folder.path / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    cards: list[str] = []
    policy: Any = SimpleNamespace(save=lambda _target, *, card, notes: cards.append(card))
    best = {"metric": "eval/reward", "mode": "max"}
    spec = make_spec(data={"train": "t.jsonl", "heldout": "h.jsonl"}, checkpoint={"best": best})
    keeper = BestPolicy(spec, policy, folder)
    assert keeper.consider(1, {"eval/reward": 1.0})
    assert "* step 1, kl (mark): KL is 26\n" in cards[0]


@pytest.fixture
def recipe(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """Evaluations after steps 0, 4, 8 and 12, by which time the length has been learned."""
    prompts = str(tmp_path / "prompts.jsonl")
    return write_recipe(
        data={"train": prompts, "heldout": prompts},
        algorithm="rloo",
        rewards=[{"type": "length", "target": 3}],
        prompts_per_step=4,
        evaluation={"every": 4},
        optim={"learning_rate": 1e-2},
        checkpoint={"every": 4, "keep": 9, "best": "eval/reward"},
        steps=12,
    )


def train(recipe: Path, *overrides: str, resume: bool = False, allow: bool = False) -> Path:
    spec = load_recipe(recipe, overrides)
    loop = build_loop(spec, resume=resume, allow_changed_recipe=allow, quiet=True)
    run_loop(loop, resume=resume, command="test")
    return Path(spec.output_dir)


def test_best_holds_the_weights_of_the_step_it_says_and_is_an_ordinary_model(recipe: Path, tmp_path: Path):
    run = train(recipe)
    rows = [row for row in RunFolder(run).metrics() if "eval/reward" in row]
    best = max(rows, key=lambda row: row["eval/reward"])
    found = record(run)
    assert found == {"step": best["step"], "metric": "eval/reward", "mode": "max", "value": best["eval/reward"]}
    assert found["step"] > 0
    weights = load_file(run / "best" / "model.safetensors")
    (shard,) = (run / "checkpoints" / f"step-{found['step']}").glob("shard-*")
    checkpoint = {name.removeprefix("policy."): tensor for name, tensor in load_file(shard).items()}
    shared = weights.keys() & checkpoint.keys()
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(weights[name], checkpoint[name]), name
    AutoModelForCausalLM.from_pretrained(run / "best")
    sampled = CliRunner().invoke(app, ["sample", str(run / "best"), "say a", "--num", "1", "--max-tokens", "2"])
    assert sampled.exit_code == 0
    assert f"Trained with `dar` for {found['step']} steps" in (run / "best" / "README.md").read_text()


def test_resumed_run_ends_with_the_same_best(recipe: Path, tmp_path: Path):
    """As if killed before step 8 was saved: what came after step 4 is forgotten, the best with it, and found again."""
    run = train(recipe)
    assert record(run)["step"] > 4
    before = {file.name: file.read_bytes() for file in (run / "best").iterdir()}
    for step in (8, 12):
        (run / "checkpoints" / f"step-{step}").rename(tmp_path / f"step-{step}")
    train(recipe, resume=True)
    assert {file.name: file.read_bytes() for file in (run / "best").iterdir()} == before


def test_best_of_what_did_not_happen_does_not_stay(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.best.mkdir()
    (folder.best / "best.json").write_text(json.dumps({"step": 4, "metric": "eval/reward", "mode": "max", "value": 1}))
    folder.forget_after(4)
    assert folder.best.is_dir()
    folder.forget_after(3)
    assert not folder.best.exists()


def test_damaged_record_is_an_error_that_says_what_to_do(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.best.mkdir()
    (folder.best / "best.json").write_text("{half")
    with pytest.raises(CheckpointError, match=r"cannot read .*best\.json: it is not JSON.*repair or remove it"):
        folder.best_record()


def test_nothing_is_kept_unless_asked_for(recipe: Path):
    run = train(recipe, "checkpoint.best=null", "steps=1")
    assert not (run / "best").exists()
