"""The toy recipe: what α does to reward, to the distance from π₀, and to a policy's will to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dar.assembly.loop import build_loop
from dar.config.recipe import RECIPES, load_recipe
from dar.policies.text.toy import toy_folder

RECIPE = RECIPES / "toy.yaml"


def final_evaluation(folder: Path, alpha: float) -> dict[str, Any]:
    spec = load_recipe(RECIPE, [f"algorithm.alpha={alpha}", f"output_dir={folder}", "logging.old_kl_prompts=0"])
    loop = build_loop(spec, quiet=True)
    loop.run(resume=False)
    return [row for row in loop.folder.metrics() if "eval/reward" in row][-1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "cache"))


def test_reward_kl_and_missing_ends_fall_as_alpha_rises(tmp_path: Path):
    # Measured with seed 0: reward 21.6, 18.3, 3.0; KL 35.8, 24.6, .86 nats; missing EOS .92, .85, .13. The bounds leave
    # half of each gap for another machine's rounding.
    none, some, all_of_it = (final_evaluation(tmp_path / str(alpha), alpha) for alpha in (0.0, 0.1, 1.0))
    assert none["eval/reward"] > 20 > some["eval/reward"] > 10 > all_of_it["eval/reward"] > 1
    assert none["eval/kl/ref"] > 30 > some["eval/kl/ref"] > 12 > all_of_it["eval/kl/ref"] > 0
    missing = "eval/completions/clipped_ratio"
    assert none[missing] > some[missing] > 0.5 > all_of_it[missing]


def test_the_toy_is_made_once_and_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = toy_folder()
    weights = (first / "model.safetensors").read_bytes()
    (first / "model.safetensors").touch()
    assert toy_folder() == first
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "other"))
    second = toy_folder()
    assert second != first
    assert (second / "model.safetensors").read_bytes() == weights
