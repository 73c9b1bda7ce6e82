"""examples/own_method.py: a method of one's own by import path and as an object, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.handmade import make_spec

from dar import Trainer, TrainingConfig
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, Weighted
from dar.errors import ConfigError

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMES = ("time", "memory", "step_time")


def test_it_stays_short():
    assert len((EXAMPLES / "own_method.py").read_text(encoding="utf-8").splitlines()) < 60


def test_it_runs_and_the_policy_learns(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "own_method.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.splitlines()[-1].partition(" → ")
    assert float(after) > float(before) + 1


def train(folder: Path, algorithm: object) -> list[dict[str, object]]:
    good_pairs = importlib.import_module("own_method").good_pairs
    args = TrainingConfig(output_dir=str(folder), max_steps=2, prompts_per_step=4, max_completion_length=8)
    trainer = Trainer("toy:letters", good_pairs, args, "package:dar/prompts/toy.jsonl", algorithm=algorithm)  # pyright: ignore[reportArgumentType]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in trainer.train().metrics]


def test_object_and_import_path_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    SoftBest: Any = importlib.import_module("own_method").SoftBest
    by_object = train(tmp_path / "object", SoftBest(SoftBest.Spec(temperature=1.0)))
    by_path = train(tmp_path / "path", "own_method:SoftBest")
    assert by_object == by_path
    assert {row["weights/max"] for row in by_path if "loss" in row} != {1.0}
    by_object, by_path = ((tmp_path / name / "config.yaml").read_text() for name in ("object", "path"))
    assert "type: own_method:SoftBest" in by_path
    assert "temperature: 1.0" in by_object


def test_error_of_a_method_saves_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    SoftBest: Any = importlib.import_module("own_method").SoftBest

    class Breaks(SoftBest):
        weighed = 0

        def weigh(self, batch: Batch) -> tuple[Weighted, dict[str, float]]:
            self.weighed += 1
            if self.weighed == 2:
                raise ZeroDivisionError("mine")
            return super().weigh(batch)

    with pytest.raises(ZeroDivisionError, match="mine"):
        train(tmp_path / "run", Breaks(SoftBest.Spec()))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (
            {"type": "own_method:SoftBest", "temperature": 0.0},
            r"temperature: Input should be greater than 0 \(found 0.0\)",
        ),
        (
            {"type": "own_method:SoftBest", "tempreature": 1.0},
            "unknown key 'tempreature'.*mean 'temperature'",
        ),
        ({"type": "own_method:good_pairs"}, "algorithm own_method:good_pairs is no subclass of dar.Algorithm"),
        (
            {"type": "own_method:Softbest"},
            "own_method:Softbest: the module own_method has no callable 'Softbest'",
        ),
        ({"type": "not_there:Mine"}, "algorithm not_there:Mine: the module not_there cannot be imported"),
    ],
)
def test_what_is_no_method_is_refused(monkeypatch: pytest.MonkeyPatch, algorithm: dict[str, object], said: str):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = make_spec(algorithm=algorithm)
    with pytest.raises(ConfigError, match=said):
        build_algorithm(spec.algorithm, max_completion_length=8)
