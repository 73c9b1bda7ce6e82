"""A module imports only from floors below its own, so that the house can be read from the ground up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dar

SOURCE = Path(dar.__file__).parent

# From the ground up. A floor is one file or one package; a package's files may import each other. What
# stands on one line has the same height: neither sees the other.
FLOORS = (
    ("bounded", "shown"),
    ("console", "errors"),
    ("files",),
    ("verifiable",),
    ("config",),
    ("training_config",),
    ("reward_config",),
    ("ops", "collective", "low_rank"),
    ("batch",),
    ("advantages",),
    ("objectives",),
    ("algorithms",),
    ("policies",),
    ("rollout",),
    ("sandbox",),
    ("rewards",),
    ("data",),
    ("judge",),
    ("record",),
    ("learn",),
    ("run", "integrations"),
    ("report", "reward_model", "control"),
    ("assembly",),
    ("cluster",),
    ("evaluate",),
    ("arguments",),
    ("compare", "trainer"),
    ("reward_trainer",),
    ("cli",),
    ("__main__",),
)
ALLOWED_IN_THE_MATHS = {"__future__", "collections", "dataclasses", "enum", "math", "scipy", "torch", "typing", "dar"}
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}
# The package's own face re-exports from several floors (the trainers only when they are first used).
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def part_of(path: Path) -> str:
    """The file or package right below `dar` that a module belongs to."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_parts(source: str, *, parts: set[str]) -> Iterator[tuple[int, str]]:
    """(line, part of `dar`) of every import of the package, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which floor they reach"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "dar" and len(pieces) > 1 and pieces[1] in parts:
                yield node.lineno, pieces[1]


def imported_packages(path: Path) -> set[str]:
    """The top-level packages a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_module_has_a_floor():
    assert MODULES
    homeless = {part_of(path) for path in MODULES} - HEIGHT.keys()
    assert not homeless, f"give these a floor in FLOORS: {sorted(homeless)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_imports_only_from_its_own_package_and_floors_below(path: Path):
    own = part_of(path)
    wrong = [
        f"line {line}: {own} imports {part}"
        for line, part in imported_parts(path.read_text(encoding="utf-8"), parts=set(HEIGHT))
        if part != own and HEIGHT[part] >= HEIGHT.get(own, -1)
    ]
    assert not wrong, f"{path.relative_to(SOURCE)} looks up or sideways: {'; '.join(wrong)}"


@pytest.mark.parametrize(
    "name",
    [
        "shown.py",
        "errors.py",
        "files",
        "config",
        "training_config.py",
        "reward_config.py",
    ],
)
def test_reading_a_recipe_needs_no_torch(name: str):
    heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "numpy"}
    for path in modules_of(name):
        assert not imported_packages(path) & heavy


@pytest.mark.parametrize("name", ["learn", "run"])
def test_the_loop_knows_of_a_policy_only_its_protocol(name: str):
    for path in modules_of(name):
        source = path.read_text(encoding="utf-8")
        reached = set(re.findall(r"dar\.(?:policies|rollout\.in_process)[.\w]*", source))
        assert reached <= {"dar.policies.protocol", "dar.policies.precision"}, path


@pytest.mark.parametrize("name", ["ops.py", "advantages.py", "objectives"])
def test_the_maths_imports_no_models_and_no_files(name: str):
    for path in modules_of(name):
        assert imported_packages(path) <= ALLOWED_IN_THE_MATHS


def modules_of(name: str) -> list[Path]:
    """The module of that name, or every module of the package."""
    found = SOURCE / name
    modules = sorted(found.rglob("*.py")) if found.is_dir() else [found]
    assert modules
    return modules


def test_the_reader_of_imports_sees_every_way_to_write_one():
    source = (
        "import dar.cli\nfrom dar import trainer\nfrom dar.assembly import x\ndef f():\n    from dar.cli.app import y\n"
    )
    found = list(imported_parts(source, parts=set(HEIGHT)))
    assert found == [(1, "cli"), (2, "trainer"), (3, "assembly"), (5, "cli")]
