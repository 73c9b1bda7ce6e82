"""Written beside its place, synced and renamed, so that a kill leaves the old or the new, never half of one or none."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from dar.errors import CheckpointError

_WRITING, _REMOVING, _REPLACED = ".writing-", ".removing-", ".replaced-"


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A path beside `target` at which the block makes a file or a folder, which then takes the target's place.

    All of it is on the disk before it has its name, and may be read by whom the umask lets. Where the block raises,
    what was there stays as it was. A link is followed, and a folder that lacks is made.

    Raises:
        CheckpointError: it cannot be written; an OSError of the block's says so, too.
    """
    real = Path(os.path.realpath(target))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with _aside(real, _WRITING) as scratch:
            yield scratch
            usual = scratch.with_name(f"{scratch.name}.usual")
            usual.touch()  # with the mode that the umask gives, where some libraries' files are their owner's alone
            for path in (*scratch.rglob("*"), scratch):
                if path.is_file():
                    path.chmod(usual.stat().st_mode)
                _sync(path)
            _take_place(scratch, real)
            _sync(real.parent)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def write_text(target: Path, text: str) -> None:
    """Replaces a file by one with that text. Raises as `written`."""
    with written(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def remove(folder: Path) -> None:
    """Removes a folder, if it is there; a kill leaves it whole or without its name."""
    if folder.exists():
        with _aside(folder, _REMOVING) as scratch:
            os.replace(folder, scratch)


def remove_rests(folder: Path) -> None:
    """Finishes what a killed process left half-done in a folder: an old one gets its name back where there is no new
    one, and all else that was being written or removed goes."""
    for kept in folder.glob(f"{_REPLACED}*"):
        with suppress(FileNotFoundError):  # another process of the same run was quicker
            _restore(kept)
    for rest in (*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_REMOVING}*")):
        shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def _aside(target: Path, prefix: str) -> Iterator[Path]:
    """The target's name in a folder beside it, which is removed at the end with whatever stands there then."""
    with TemporaryDirectory(prefix=f"{prefix}{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder, target.name)


def _take_place(new: Path, target: Path) -> None:
    if not (new.is_dir() and target.exists()):
        os.replace(new, target)
    elif not _exchanged(new, target):
        kept = target.with_name(f"{_REPLACED}{target.name}")
        if kept.exists():
            _restore(kept)
        os.replace(target, kept)
        try:
            os.replace(new, target)
        except OSError:
            os.replace(kept, target)
            raise
        os.replace(kept, new)


def _restore(kept: Path) -> None:
    target = kept.with_name(kept.name.removeprefix(_REPLACED))
    if target.exists():
        remove(kept)
    else:
        os.replace(kept, target)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two have changed places at once, which Linux can do on most file systems."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
