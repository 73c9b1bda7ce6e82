"""Engines of a recipe: the library's own, and a class of the user's by import path."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.assembly.engine import build_engine
from dar.assembly.loop import build_loop
from dar.assembly.plan import make_plan
from dar.config.engine import OwnEngineSpec
from dar.config.recipe import build_spec, load_recipe
from dar.errors import ConfigError
from dar.trainer import run_loop

MINE = """
import json
from dar.rollout.in_process.engine import InProcessEngine

class Mine(InProcessEngine):
    reproduces = "nothing"

    def __init__(self, *, log, max_tokens=1000):
        super().__init__(max_tokens=max_tokens)
        self.log = log

    def tell(self, *what):
        with open(self.log, "a") as file:
            file.write(json.dumps(what) + "\\n")

    def sync(self, policy, version):
        self.tell("sync", version)
        super().sync(policy, version)

    def generate(self, prompts, num_generations, **others):
        rollouts = super().generate(prompts, num_generations, **others)
        self.tell("generate", others["key"].purpose, *set(rollouts.versions))
        return rollouts

    def close(self):
        self.tell("close")

class Half:
    def sync(self, policy, version): ...

class Broken:
    def __init__(self):
        raise OSError("no such server")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(recipe: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    result = run_loop(build_loop(load_recipe(recipe, overrides), resume=resume, quiet=True), resume=resume, command="")
    moods = ("time/", "step_time", "memory/", "eval/time")
    return [{key: value for key, value in row.items() if not key.startswith(moods)} for row in result.metrics]


def test_a_class_of_the_user_s_samples_with_the_weights_of_each_step(
    here: Path, write_recipe: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    prompts = str(here / "prompts.jsonl")
    recipe = write_recipe(steps=2, data={"train": prompts, "heldout": prompts}, checkpoint={"every": 1})
    mine = ["engine.type=mine:Mine", "engine.log=log.jsonl", "output_dir=own"]
    assert make_plan(load_recipe(recipe, mine)).passes
    (here / "log.jsonl").unlink()
    assert trained(recipe, *mine) == trained(recipe, "output_dir=built-in")
    told = [json.loads(line) for line in (here / "log.jsonl").read_text().splitlines()]
    assert told == [
        ["sync", 0],
        ["generate", "sample", 0],
        ["sync", 0],
        ["generate", "heldout", 0],
        ["generate", "heldout", 0],  # to be read
        ["sync", 0],
        ["generate", "train", 0],
        ["sync", 1],
        ["generate", "train", 1],
        ["sync", 2],
        ["generate", "heldout", 2],
        ["generate", "heldout", 2],  # to be read
        ["close"],
    ]
    # (torch keeps a record of its own of what it saves.)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    trained(recipe, *mine, resume=True)
    assert "the engine reproduces nothing" in caplog.text


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("mine:Missing", "engine mine:Missing: the module mine has no callable 'Missing'"),
        ("nowhere:Mine", "engine nowhere:Mine: the module nowhere cannot be imported"),
        ({"type": "mine:Mine"}, "engine mine:Mine cannot be made: TypeError: missing a required argument: 'log'"),
        ({"type": "mine:Mine", "log": "x", "port": 1}, "TypeError: got an unexpected keyword argument 'port'"),
        ("mine:Broken", "engine mine:Broken cannot be made: OSError: no such server"),
        ("mine:Half", "engine mine:Half lacks reproduces, generate, close"),
    ],
)
def test_a_class_that_is_no_engine_is_refused_before_weights_are_loaded(here: Path, engine: Any, message: str):
    with pytest.raises(ConfigError) as refused:
        build_engine(OwnEngineSpec.model_validate(engine if isinstance(engine, dict) else {"type": engine}))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("vlm", "engine: unknown type 'vlm' (did you mean 'vllm'?); allowed: in_process, vllm, package.module:Class"),
        ({"max_cache_tokens": 0}, "engine.max_cache_tokens: Input should be greater than or equal to 1"),
        ({"log": "x"}, "engine: unknown key 'log'; allowed: type, max_cache_tokens"),
        ("a b:c", "engine: 'a b:c' is no import path: write package.module:Class"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_with_its_key(engine: Any, message: str):
    raw = {"model": "m", "data": "d", "rewards": ["sentiment"], "steps": 1, "output_dir": "o"}
    with pytest.raises(ConfigError) as refused:
        build_spec(raw | {"engine": engine}, where="r")
    assert message in str(refused.value)
