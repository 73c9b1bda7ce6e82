"""Written beside its place and renamed, so that a kill leaves the old or the new, never half of one."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove_rests(folder: Path) -> None:
    """Removes what a killed run was writing or removing in a folder: it has no other name by now."""
    for rest in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        shutil.rmtree(rest, ignore_errors=True)
