"""`make setup`: a Python that does not fit is named before pip tries, and the right one then begins anew. `make demo`
trains, or goes on where it stopped, and then reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = f"""#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} -c "import sys
sys.version_info, sys.version = (*map(int, '@VERSION@'.split('.')), 0), '@VERSION@'
if '@VERSION@' == '3.13': sys.modules['ensurepip'] = None
$2"
echo "@VERSION@ $1 $2 $3" >> log
[ "$2" = venv ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python
[ "$2 @VERSION@ $3" != "pip 3.14 install" ]
"""
"""A Python that is of a version when asked, and writes down what it is told. 3.13 has no venv, and 3.14's pip fails."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


DAR = """#!/bin/sh
echo "$*" >> log
[ "$1" = report ] && exit 0
mkdir -p runs/quickstart && touch runs/quickstart/config.yaml
[ -z "$STOPPED" ]
"""
"""A `dar` that writes down what it is told, and whose training can be stopped."""


@pytest.fixture
def setup(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        fake = tmp_path / "bin" / f"python{version}"
        fake.write_text(FAKE.replace("@VERSION@", version))
        fake.chmod(0o755)
    shutil.copy(tmp_path / "bin" / "python3.10", tmp_path / "bin" / "python3")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    found = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment = found | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(*words: str) -> tuple[str, list[str]]:
        (tmp_path / "log").write_text("")
        done = subprocess.run(
            ["make", "setup", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.stderr, (tmp_path / "log").read_text().splitlines()

    return run


def test_python_that_does_not_fit_is_named_before_anything_is_made(setup):
    said, told = setup()
    assert said.startswith("dar needs Python 3.11 or newer; python3 is 3.10: make setup PYTHON=python3.12")
    assert told == []
    said, told = setup("PYTHON=python3.13")
    assert said.startswith(
        "python3.13 cannot make .venv: it lacks the module venv (on Debian: apt install python3-venv)"
    )
    assert told == []


def test_environment_is_made_anew_after_a_failure_and_for_another_python_only(setup, tmp_path: Path):
    fresh = "-m venv --clear"
    said, told = setup("PYTHON=python3.14")
    assert "Error" in said
    assert told[0] == f"3.14 {fresh}"
    said, told = setup("PYTHON=python3.12")
    assert (said, told[0], len(told)) == ("", f"3.12 {fresh}", 4)
    # Whole: whatever python3 is, .venv's own goes on.
    assert setup() == ("", [])
    assert setup("PYTHON=python3.12") == ("", [])
    os.utime(tmp_path / ".venv" / ".installed", (0, 0))  # older than what it was made of
    said, told = setup()
    assert (said, [line.split()[:3] for line in told]) == ("", [["3.12", "-m", "pip"]] * 3)
    said, told = setup("PYTHON=python3.11")
    assert (said, told[0], len(told)) == ("", f"3.11 {fresh}", 4)


def test_demo_ends_with_a_report_whether_it_is_begun_resumed_or_repeated(tmp_path: Path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/python", ".venv/.installed", ".venv/bin/dar"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(DAR)
        file.chmod(0o755)
    os.utime(tmp_path / ".venv" / ".installed")
    found = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}

    def demo(**environment: str) -> tuple[bool, list[str]]:
        (tmp_path / "log").write_text("")
        done = subprocess.run(["make", "demo"], cwd=tmp_path, env=found | environment, capture_output=True, check=False)
        return done.returncode == 0, (tmp_path / "log").read_text().splitlines()

    train, report = "train quickstart", "report runs/quickstart"
    assert demo(STOPPED="yes") == (False, [train])
    assert demo() == demo() == (True, [f"{train} --resume", report])
    shutil.rmtree(tmp_path / "runs")
    assert demo() == (True, [train, report])
