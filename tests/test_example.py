"""examples/dar_in_one_file.py: it runs, it needs no dar, and its formulas are the library's."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dar.advantages import batch_standardized, group_mean
from dar.objectives.regression import clip_log_weights, dar_log_weights

EXAMPLE = Path(__file__).parents[1] / "examples" / "dar_in_one_file.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example imported by path: examples/ is not a package."""
    spec = importlib.util.spec_from_file_location("dar_in_one_file", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its own module up while it is being defined.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_stays_short_and_imports_no_dar() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", *sys.stdlib_module_names, "torch", "transformers"}


def test_it_runs_for_two_steps(tiny_folder: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--model", str(tiny_folder), "--steps", "2", "--max-tokens", "16"]
    result = subprocess.run([*command, "--learning-rate", "1e-3"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    found = [re.fullmatch(r"step (\d): reward ([+-]\S+)  KL (\S+) nats .*  loss (\S+)", line) for line in lines]
    assert [match and match[1] for match in found] == ["1", "2"], result.stdout
    kl = [float(match[3]) for match in found if match]
    # π_t is π₀ before the first update, so every log-ratio is exactly 0; after it, it is not.
    assert kl[0] == 0.0
    assert kl[1] != 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("alpha", "beta", "w_clip"), [(0.1, 0.05, 20.0), (0.0, 0.2, 5.0), (1.0, 1.0, 3.0)])
def test_its_weights_are_the_librarys(example: ModuleType, seed: int, alpha: float, beta: float, w_clip: float) -> None:
    random = torch.Generator().manual_seed(seed)
    old, ref = (-torch.rand(16, 12, generator=random) for _ in range(2))
    mask = torch.arange(12) < torch.randint(1, 13, (16, 1), generator=random)
    advantages = torch.randn(16, generator=random)
    sums = [(values * mask).sum(1) for values in (old, ref)]
    theirs = example.weights_of(*sums, advantages, alpha=alpha, beta=beta, w_clip=w_clip)
    log_weights = dar_log_weights(old, ref, advantages, mask, alpha=alpha, beta=beta)
    torch.testing.assert_close(theirs, clip_log_weights(log_weights, w_clip), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (6, 7), (8, 1)])
def test_its_advantages_are_the_librarys(example: ModuleType, shape: tuple[int, int]) -> None:
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rewards[1] = 0.1  # a tied group
    torch.testing.assert_close(example.advantages_of(rewards), batch_standardized(group_mean(rewards)))
    assert example.advantages_of(torch.full(shape, 0.1)).eq(0).all()
    # Ties within every group, differences between groups: nothing to learn from, and no rounding blown up.
    between = torch.linspace(0.1, 0.7, shape[0]).unsqueeze(1).expand(shape)
    torch.testing.assert_close(example.advantages_of(between), batch_standardized(group_mean(between)))
