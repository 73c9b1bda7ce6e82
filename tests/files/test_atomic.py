"""Files and folders change whole: whatever a kill or an error interrupts, the old one is there or the new one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dar.errors import CheckpointError
from dar.files import atomic
from dar.files.atomic import write_text, written


def write_folder(target: Path, text: str) -> None:
    with written(target) as scratch:
        (scratch / "inner").mkdir(parents=True)
        for name in ("weights", "inner/config"):
            (scratch / name).write_text(text)


def content(target: Path) -> dict[str, str]:
    return {str(file.relative_to(target)): file.read_text() for file in target.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int):
    """safetensors makes files of mode 0600, whatever the umask."""
    before = os.umask(umask)
    try:
        with written(tmp_path / "model") as scratch:
            (scratch / "inner").mkdir(parents=True)
            os.close(os.open(scratch / "inner" / "weights", os.O_CREAT, mode=0o600))
        write_text(tmp_path / "metrics", "text")
    finally:
        os.umask(before)
    found = [(tmp_path / name).stat().st_mode & 0o777 for name in ("model/inner/weights", "metrics", "model/inner")]
    assert found == [mode, mode, 0o777 & ~umask]
    assert names(tmp_path) == ["metrics", "model"]


@pytest.mark.skipif(sys.platform != "linux", reason="what the system call of Linux does")
def test_two_folders_change_places_at_once(tmp_path: Path):
    for name in ("one", "two"):
        write_folder(tmp_path / name, name)
    assert atomic._exchanged(tmp_path / "one", tmp_path / "two")
    assert content(tmp_path / "one")["weights"] == "two"
    assert not atomic._exchanged(tmp_path / "one", tmp_path / "absent")
    assert names(tmp_path) == ["one", "two"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(one: Path, other: Path) -> None:
        calls.append(f"rename to {other.name}")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_folder(tmp_path / "model", "new")
    assert sorted(calls[:4]) == ["sync config", "sync inner", "sync model", "sync weights"]
    assert calls[4:] == ["rename to model", f"sync {tmp_path.name}"]
    calls.clear()
    write_text(tmp_path / "file", "new")
    assert calls == ["sync file", "rename to file", f"sync {tmp_path.name}"]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["fsync", "replace", "write_text"])
def test_an_error_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    write_text(tmp_path / "file", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path if name == "write_text" else os, name, full_disk)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
            write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_between_the_two_renames_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
):
    write_folder(tmp_path / "model", "old")
    replace, calls = os.replace, list[Any]()

    def renamed(*paths: Path) -> None:
        calls.append(paths)
        (full_disk if len(calls) == failing else replace)(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchanged", lambda one, other: False)
        patch.setattr(os, "replace", renamed)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
            write_folder(tmp_path / "model", "new")
    assert content(tmp_path / "model") == {"weights": "old", "inner/config": "old"}
    assert names(tmp_path) == ["model"]


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "text"


KILLED = """
import os, sys
from pathlib import Path
from dar.errors import CheckpointError
from dar.files import atomic

task, can_exchange, root = sys.argv[1], sys.argv[2] == "True", Path(sys.argv[3])
if not can_exchange:
    atomic._exchanged = lambda one, other: False

def write(text):
    with atomic.written(root / "target") as scratch:
        if task == "file":
            scratch.write_text(text)
        else:
            scratch.mkdir()
            for name in ("a", "b"):
                (scratch / name).write_text(text)

def found():
    target = root / "target"
    files = [target] if target.is_file() else [target / "a", target / "b"]
    return {file.read_text() if file.exists() else None for file in files}

def child(limit):
    count = 0
    def kill(event, args):
        nonlocal count
        if event.split(".")[0] in ("open", "os", "shutil", "tempfile", "ctypes"):
            count += 1
            if count == limit:
                os._exit(9)
    sys.addaudithook(kill)
    if task == "remove":
        atomic.remove(root / "target")
    else:
        write("new")
    os._exit(0)

seen, limit, code = set(), 0, 9
while code:
    limit += 1
    write("old")
    pid = os.fork()
    if pid == 0:
        child(limit)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    atomic.remove_rests(root)
    (state,) = found()  # all files the same
    seen.add(state)
    assert [file.name for file in root.iterdir()] == ([] if state is None else ["target"]), limit
print(limit, sorted(map(str, seen)))
"""


@pytest.mark.parametrize("can_exchange", [True, False], ids=["at once", "two renames"])
@pytest.mark.parametrize(
    ("task", "states"), [("file", ["new", "old"]), ("folder", ["new", "old"]), ("remove", ["None", "old"])]
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, task: str, states: list[str], can_exchange: bool
):
    command = [sys.executable, "-c", KILLED, task, str(can_exchange), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    moments, _, seen = result.stdout.partition(" ")
    assert int(moments) > 8
    assert seen.strip() == str(states)
