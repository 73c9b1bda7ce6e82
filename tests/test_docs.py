"""The documentation says what the code does: examples run, names exist, generated pages are up to date."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import typer.main
import yaml
from conftest import make_model, make_tokenizer
from peft import LoraConfig
from support.flows import FLOW_METHODS, flow_recipe
from support.flows import ROWS as LABELS
from test_layering import FLOORS
from transformers import PrinterCallback

from dar.algorithms.base import Algorithm
from dar.assembly.algorithm import build_algorithm
from dar.assembly.loop import build_loop
from dar.cli.app import app
from dar.config.algorithm import AlgorithmSpec
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.control import ControlSpec
from dar.config.model import ModelSpec
from dar.config.recipe import load_recipe
from dar.config.reward_model import RewardModelSpec
from dar.config.run import RunSpec
from dar.policies.text.loading import load_tokenizer
from dar.trainer import run_loop

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "src/dar/recipes").glob("*.yaml"))


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


@pytest.mark.parametrize("name", ["generate_recipes", "generate_api", "generate_scaling"])
def test_generated_page_is_what_the_code_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    generator = importlib.import_module(name)
    assert generator.TARGET.read_text(encoding="utf-8") == generator.render(), f"run python docs/{name}.py"


def ported(table: str) -> str:
    """The script of a table's right side; "the same" is what the left side has."""
    lines = []
    for row in table.strip().splitlines()[2:]:
        theirs, ours = (re.findall("`([^`]+)`", cell) for cell in row.strip("| ").split(" | "))
        lines += theirs[:1] if " | the same" in row else ours[:1]
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["GRPO", "DPO"])
def test_script_ported_from_trl_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| {name} with TRL .*?\n\n", page, re.DOTALL | re.MULTILINE)
    script = ported(table)
    for key, small in (("max_steps=100", "2"), ("max_completion_length=256", "4"), ("max_completion_length=512", "4")):
        script = script.replace(key, f"{key.split('=')[0]}={small}")
    rows = [{"prompt": "ab"[index % 2], "chosen": "ab", "rejected": "dd"} for index in range(64)]
    known = {
        "train": rows,
        "test": rows[:2],
        "model": "toy:letters",
        "tokenizer": load_tokenizer(ModelSpec(path="toy:letters")),
        "reward": lambda completions, **columns: [float(len(text)) for text in completions],
        "LoraConfig": LoraConfig,
        "MyCallback": PrinterCallback,
    }
    exec(script, known)
    assert (tmp_path / "out" / "model" / "README.md").is_file()


@pytest.mark.parametrize("block", every_block("python"))
def test_python_compiles(block: str) -> None:
    compile(block, "<documentation>", "exec")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads(path: Path) -> None:
    kind = RewardModelSpec if is_of_reward_model(path) else ControlSpec if path.stem.endswith("control") else RunSpec
    spec = load_recipe(path, kind=kind)
    assert spec.output_dir.startswith("runs/")


def is_of_reward_model(path: Path) -> bool:
    """Whether a recipe is one of `dar reward-model`."""
    return path.stem.endswith("reward_model")


@pytest.mark.parametrize("block", every_block("yaml"))
def test_recipe_in_a_page_loads(block: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block, encoding="utf-8")
    load_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"(?:src/dar|tests)/[\w/]+\.py", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def shell_lines() -> Iterator[list[str]]:
    """The words of every command in the pages' shell blocks."""
    for page in PAGES:
        for line in "".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
            yield shlex.split(line, comments=True)


def test_commands_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in filter(None, shell_lines()):
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "dar":
            command, rest = typer.main.get_command(app), words[1:]
            while subcommands := getattr(command, "commands", None):
                command, rest = subcommands[rest[0]], rest[1:]
            options = {option for parameter in command.params for option in parameter.opts}
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


# Settings that bring metrics of their own, by a name for the run.
WITH_SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive": {"algorithm": {"type": "dar", "beta": {"target_kl": 0.1}}},
    "overlong": {"algorithm": {"type": "dapo", "overlong_tokens": 8}},
    "replay": {"algorithm": {"type": "r2vpo", "replay": 1}, "steps": 2},
    "stale": {
        "sampling": {"max_completion_length": 32, "max_staleness": 1},
        "engine": {"type": "support.engines:ThreadedEngine"},
        "steps": 2,
    },
    "resampled": {"sampling": {"max_completion_length": 32, "resample_tied": {"max_rounds": 1}}},
    "ranks": {"model": {"lora": {"rank": {"start": 4, "every": 1}}}},
}
HELD_OUT = ("dar", "awr", "sft")
"""Evaluated on held-out prompts: a method that reads π₀, one that does not, and one that samples nothing."""
OWN = {
    # One step is to see every row: a pair to invert, one to punish and two to retain.
    "trace": {"prompts_per_step": 4},
    # No reward is below 0.
    "maxrl": {"rewards": [{"type": "length", "target": 4, "threshold": -6.9}]},
}
"""What a method's step needs of a recipe."""
SOMETIMES = {"completions/mean_terminated_length", "reward_length/r2_within"}
"""Keys a single step need not have: where no completion ended, where nothing varies within a prompt."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The metric keys of a step of every method, and of the settings above; rewards' own names as `<name>`."""
    folder = tmp_path_factory.mktemp("metrics")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    # Every column any method reads: a row is a prompt, a demonstration, a pair and a group with rewards.
    rows = [
        {"prompt": f"say {word}: ", "completion": word, "chosen": word, "rejected": "no"}
        | {"completions": [word, "no"], "rewards": [1.0, 0.0], "ref_rewards": [0.5]}
        | {"chosen_complies": word > "c", "rejected_complies": word == "a"}
        for word in ("a", "bee", "sea", "dee")
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    recipe: dict[str, Any] = {
        "rewards": [{"type": "length", "target": 4}],
        # Room for some completions to end by themselves, so that lengths and with them rewards differ.
        "sampling": {"max_completion_length": 32},
        "prompts_per_step": 2,
        "num_generations": 4,
        "steps": 1,
        # Of which completions of either prompt differ in length.
        "seed": 10,
        "evaluation": {"num_generations": 1, "max_prompts": 2},
        "runtime": {"device": "cpu", "precision": "fp32"},
    }
    found: dict[str, set[str]] = {}
    methods: dict[str, dict[str, Any]] = {name: {"algorithm": name} | OWN.get(name, {}) for name in ALGORITHM_SPECS}
    for name, changes in (methods | WITH_SETTINGS).items():
        path = folder / "recipe.yaml"
        sources = ("train", "heldout") if name in HELD_OUT else ("train",)
        data = dict.fromkeys(sources, str(folder / "rows.jsonl"))
        if name in FLOW_METHODS:
            data = {"train": str(folder / "labels.json")}
            Path(data["train"]).write_text(json.dumps(LABELS))
            changes |= flow_recipe(folder / "flow")
        model = {"path": str(folder / "model"), **changes.get("model", {})}
        own = {"model": model, "data": data, "output_dir": str(folder / name)}
        path.write_text(yaml.safe_dump(recipe | changes | own))
        result = run_loop(build_loop(load_recipe(path), quiet=True), resume=False, command="")
        keys = {re.sub("rewards/(length|brightness)/", "rewards/<name>/", key) for row in result.metrics for key in row}
        keys = {re.sub(r"/step_\d+/\w+/", "/step_<k>/<ratio>/", key) for key in keys}
        found[name] = {re.sub(r"/from_.+", "/from_<edge>", key) for key in keys}
    return found


def training(keys: set[str]) -> set[str]:
    """The keys of the training steps."""
    return {key for key in keys if not key.startswith("eval/")}


def documented_metrics() -> set[str]:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    steps = page.partition("## A training step")[2].partition("## A held-out evaluation")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", steps, re.MULTILINE))


def test_every_metric_is_documented_and_none_is_invented(recorded: dict[str, set[str]]) -> None:
    assert set().union(*map(training, recorded.values())) == documented_metrics()


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_metrics_are_documented(recorded: dict[str, set[str]], name: str) -> None:
    evaluated = {key.removeprefix("eval/") for key in recorded[name] if key.startswith("eval/")}
    assert "kl/ref" in evaluated, "π₀ is measured whatever the method reads"
    assert evaluated <= documented_metrics() | {"time"}


@pytest.mark.parametrize("name", ALGORITHM_SPECS)
def test_methods_have_the_metrics_the_page_says(recorded: dict[str, set[str]], name: str) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("## Which method has which")[2].partition("## Completions")[0]
    expected, told = set[str](), set[str]()
    for keys, methods in re.findall(r"^\| (`.*) \| (.*) \|$", table, re.MULTILINE):
        told |= names_in(keys)
        kinds = ["all that sample"] if name in FLOW_METHODS else ["all that sample", "all that sample texts"]
        samples = methods in kinds and not ALGORITHM_SPECS[name].logged
        if samples or name in names_in(methods):
            expected |= names_in(keys)
    everyone = documented_metrics() - told
    assert training(recorded[name]) - SOMETIMES == (expected | everyone) - SOMETIMES


def names_in(cell: str) -> set[str]:
    """The words in backticks."""
    return set(re.findall(r"`([^`]+)`", cell))


def test_readme_has_a_row_for_every_method() -> None:
    table = section(ROOT / "README.md", "## Algorithms")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\w[^|]*) \|$", table, re.MULTILINE)
    assert [name for name, state in rows if state == "works"] == list(ALGORITHM_SPECS)
    assert all(state == "works" for _, state in rows)


def built(name: str) -> tuple[AlgorithmSpec, Algorithm]:
    """A method with its defaults."""
    spec = ALGORITHM_SPECS[name]()
    return spec, build_algorithm(spec, max_completion_length=8)  # pyright: ignore[reportArgumentType] - one of the union


def test_table_of_methods_is_what_the_code_does() -> None:
    table = section(ROOT / "docs" / "algorithms.md", "## The methods")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert [names_in(row[0]) for row in rows] == [{name} for name in ALGORITHM_SPECS]
    for name, _, completions, group, reference, critic, _, _, updates, _ in rows:
        spec, algorithm = built(name.strip("`"))
        said = (completions.startswith("data"), group == "yes", reference == "yes", critic == "yes", int(updates))
        does = (
            spec.logged is not None,
            spec.needs_group,
            algorithm.needs_reference,
            algorithm.needs_values,
            algorithm.updates,
        )
        assert said == does, name


@pytest.mark.parametrize("name", ALGORITHM_SPECS)
def test_defaults_of_the_algorithms_page(name: str) -> None:
    page = ROOT / "docs" / "algorithms.md"
    parts = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (part,) = [part for part in parts if re.search(rf"`algorithm: {name}`", part)]
    told: dict[str, str] = {}
    for table in part.split("| key | default | from |")[1:]:
        for keys, defaults in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", table.partition("\n\n")[0], re.MULTILINE):
            told |= dict(zip(re.findall(r"`(\w+)`", keys), defaults.split(", "), strict=True))
    assert told == {
        key: shown(field.default) for key, field in ALGORITHM_SPECS[name].model_fields.items() if key != "type"
    }


def shown(default: object) -> str:
    """A default as the page writes it."""
    match default:
        case None:
            return "`null`"
        case str():
            return f"`{default}`"
        case float() if math.isinf(default):
            return "`.inf`"
        case _:
            return str(default)


def test_floors_of_the_design_page() -> None:
    table = section(ROOT / "docs" / "design.md", "## The house").partition("| floor |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    told = [name.removesuffix("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert told == [name for floor in FLOORS for name in floor]


def section(page: Path, heading: str) -> str:
    """The text below a heading of the second level."""
    return page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition("\n## ")[0]


def test_completion_columns_are_documented(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(steps=1, logging={"completions_every": 1})
    run_loop(build_loop(load_recipe(recipe), quiet=True), resume=False, command="")
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("## Completions")[2]
    documented = re.findall(r"^\| `([^`]+)` \|", page.partition("| column |")[2].partition("\n\n")[0], re.MULTILINE)
    columns = pyarrow.parquet.read_schema(tmp_path / "run" / "completions" / "step-1.parquet").names
    assert [re.sub("(reward|contribution)/length", r"\1/<name>", name) for name in columns] == documented
