"""The wheel alone, beside nothing but what it says it needs, trains; what is an extra is asked for by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dar.config.model import ModelSourceSpec
from dar.config.optim import AdamW8BitSpec
from dar.config.verifiable import IFEvalRewardSpec, JsonSchemaRewardSpec, MathRewardSpec, ReasoningGymRewardSpec
from dar.errors import EXTRAS, ConfigError
from dar.learn.optim import require_optimizer
from dar.policies.flow.loading import load_flow
from dar.policies.text.gguf import converted
from dar.rewards import verifiable
from dar.rewards.builtin import sentiment

ROOT = Path(__file__).parents[1]


def closure(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Every distribution that a name needs, directly or not, but for its extras."""
    found: set[str] = set()
    todo = [(name, extras)]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        for line in distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                found.add(canonicalize_name(needed.name))
                if (step := (needed.name, frozenset(needed.extras))) not in seen:
                    seen.add(step)
                    todo.append(step)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and links to the files of what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={folder}", str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("dar_rlhf-*.whl")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    for name in closure("dar-rlhf"):
        for file in distribution(name).files or ():
            link = site / file
            if ".." not in file.parts and "__pycache__" not in file.parts:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(str(file.locate())).resolve())
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={site}", str(wheel)], check=True)
    return folder / "env/bin/python"


def dar(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "dar", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_wheel_beside_what_it_needs_trains_a_shipped_recipe(python: Path, tmp_path: Path):
    done = dar(python, tmp_path, "train", "toy", "output_dir=run", "steps=2", "evaluation.num_generations=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_wheel_writes_a_project(python: Path, tmp_path: Path):
    dar(python, tmp_path, "init", "mine")
    recipe = (tmp_path / "mine" / "recipe.yaml").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in recipe  # the package with the other is not there
    files = {"recipe.yaml", "prompts.jsonl", "heldout.jsonl", "my_rewards.py"}
    assert {file.name for file in (tmp_path / "mine").iterdir()} == files


def test_extra_that_is_missing_is_named_with_its_command(python: Path, tmp_path: Path):
    done = dar(python, tmp_path, "train", "toy", "output_dir=run", "rewards=[sentiment]")
    said = "dar: the sentiment reward needs the package vaderSentiment: pip install 'dar-rlhf[sentiment]'"
    assert " ".join(done.stderr.split()) == said
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("package", "extra", "asked"),
    [
        ("vaderSentiment", "sentiment", sentiment),
        ("math_verify", "verify", lambda: verifiable.build(MathRewardSpec())),
        ("langdetect", "verify", lambda: verifiable.build(IFEvalRewardSpec())),
        ("jsonschema", "verify", lambda: verifiable.build(JsonSchemaRewardSpec(path="schema.json"))),
        ("reasoning_gym", "reasoning-gym", lambda: verifiable.build(ReasoningGymRewardSpec())),
        ("gguf", "gguf", lambda: converted(Path(__file__))),
        ("diffusers", "flow", lambda: load_flow(ModelSourceSpec(path="model"))),
        ("bitsandbytes", "bitsandbytes", lambda: require_optimizer(AdamW8BitSpec())),
    ],
)
def test_package_of_an_extra_is_asked_for_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, extra: str, asked: Callable[[], object]
):
    monkeypatch.setenv("DAR_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'dar-rlhf\[{extra}\]'$"):
        asked()


def test_extras_of_the_messages_are_those_of_the_wheel():
    told = distribution("dar-rlhf").metadata.get_all("Provides-Extra") or []
    assert set(EXTRAS.values()) == {*told} - {"all"}
