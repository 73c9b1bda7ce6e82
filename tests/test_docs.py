"""The documentation says what the code does: examples run, names exist, generated pages are up to date."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import typer.main

from dar.build import build_loop
from dar.cli import app
from dar.recipe import load_recipe
from dar.trainer import run_loop

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def every_block(language: str) -> list[object]:
    """Every block of every page, as pytest parameters."""
    return [
        pytest.param(block, id=f"{page.name}-{index}")
        for page in PAGES
        for index, block in enumerate(blocks(page, language))
    ]


def anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_recipe_reference_is_what_the_specs_say() -> None:
    path = ROOT / "docs" / "generate_recipes.py"
    spec = importlib.util.spec_from_file_location("generate_recipes", path)
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.TARGET.read_text(encoding="utf-8") == generator.render(), "run python docs/generate_recipes.py"


@pytest.mark.parametrize("block", every_block("python"))
def test_python_compiles(block: str) -> None:
    compile(block, "<documentation>", "exec")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads(path: Path) -> None:
    assert load_recipe(path).output_dir.startswith("runs/")


@pytest.mark.parametrize("block", every_block("yaml"))
def test_recipe_in_a_page_loads(block: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block, encoding="utf-8")
    load_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}, which has no such heading"


def shell_lines() -> Iterator[list[str]]:
    """The words of every command in the pages' shell blocks."""
    for page in PAGES:
        for line in "".join(blocks(page, "sh")).splitlines():
            yield shlex.split(line, comments=True)


def test_commands_exist() -> None:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue] - it is a group
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in filter(None, shell_lines()):
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "dar":
            options = {option for parameter in commands[words[1]].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, words


def test_readme_example_runs(tmp_path: Path, tiny_folder: Path) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    for written, here in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(tiny_folder),
        "runs/try": str(tmp_path / "run"),
        "max_steps=20": "max_steps=2",
    }.items():
        assert example.count(written) == 1, f"the example no longer says {written}"
        example = example.replace(written, here)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert re.fullmatch(r"-\d\.\d+ → -\d\.\d+", printed.getvalue().splitlines()[-1])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "algorithms.md", "python"))
def test_figures_of_the_algorithms_page(block: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "algorithms.md", "exec"), {})
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for line in printed.getvalue().splitlines():
        assert line in page, f"the page does not have the row {line}"


def test_every_metric_is_documented_and_none_is_invented(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    training = page.partition("## A training step")[2].partition("## A held-out evaluation")[0]
    documented = set(re.findall(r"^\| `([^`]+)` \|", training, re.MULTILINE))
    recorded: set[str] = set()
    for algorithm in ("dar", "rloo", "grpo"):
        # Room for some completions to end by themselves: one key is only there when some do.
        recipe = write_recipe(
            algorithm=algorithm,
            sampling={"max_completion_length": 48},
            data={"train": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")},
            output_dir=str(tmp_path / algorithm),
            steps=1,
        )
        result = run_loop(build_loop(load_recipe(recipe), quiet=True), resume=False, command="")
        keys = {re.sub("^rewards/[^/]+/", "rewards/<name>/", key) for row in result.metrics for key in row}
        evaluated = {key.replace("eval/rewards/length/", "eval/rewards/<name>/") for key in keys if "eval/" in key}
        recorded |= keys - evaluated - {key for key in keys if key.startswith("eval/")}
        unknown = {key.removeprefix("eval/") for key in evaluated} - documented - {"time"}
        assert not unknown, f"held-out metrics that the page does not have: {unknown}"
    assert recorded == documented
    assert "`eval/time`" in page


def test_completion_columns_are_documented(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(steps=1, logging={"completions_every": 1})
    run_loop(build_loop(load_recipe(recipe), quiet=True), resume=False, command="")
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("## Completions")[2]
    documented = re.findall(r"^\| `([^`]+)` \|", page.rpartition("| column |")[2], re.MULTILINE)
    columns = pyarrow.parquet.read_schema(tmp_path / "run" / "completions" / "step-1.parquet").names
    assert [name.replace("reward/length", "reward/<name>") for name in columns] == documented
