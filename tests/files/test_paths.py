"""Files shipped inside installed packages are found without importing the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dar.errors import ConfigError
from dar.files.paths import expanded, resolve_path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose import fails, with one data file."""
    folder = tmp_path / "site" / "boxed_data"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "inner" / "rows.jsonl").write_text("{}\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.mark.parametrize("path", ["some/model", "./x.jsonl", "/tmp/x", "a~/x", "packages:x/y"])
def test_ordinary_path_is_left_alone(path: str):
    assert resolve_path(path) == path


def test_file_of_a_package_is_found_without_importing_it(package: Path):
    assert resolve_path("package:boxed_data/inner/rows.jsonl") == str(package / "inner" / "rows.jsonl")
    assert "boxed_data" not in sys.modules


def test_folder_of_a_package_is_found(package: Path):
    assert resolve_path("package:boxed_data/inner") == str(package / "inner")


@pytest.mark.parametrize("name", ["no_such_package", "no-such-package", "boxed_data.inner", "", "this"])
def test_package_that_is_not_installed_is_refused(package: Path, name: str):
    with pytest.raises(ConfigError, match="is not installed in this environment") as caught:
        resolve_path(f"package:{name}/rows.jsonl")
    assert str(caught.value).startswith(f"package:{name}/rows.jsonl: the package '{name}'")


def test_missing_file_of_a_package_is_refused(package: Path):
    with pytest.raises(ConfigError, match=r"the installed package 'boxed_data' has no file 'inner/none\.jsonl'"):
        resolve_path("package:boxed_data/inner/none.jsonl")


def test_prompts_of_the_shipped_recipes_are_found():
    assert Path(resolve_path("package:dar/prompts/reviews_train.jsonl")).is_file()


def test_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded("~/runs/a") == resolve_path("~/runs/a") == expanded(Path("~/runs/a")) == "/home/somebody/runs/a"


def test_home_folder_of_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"~no-such-user/x: the home folder it begins with is not known"):
        resolve_path("~no-such-user/x")
