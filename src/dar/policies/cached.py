"""Model folders in the cache, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dar.errors import ConfigError
from dar.files.atomic import written
from dar.files.paths import cache_root


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made now unless it was before; one that is not whole is never there.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    target = cache_root() / name
    if (target / "config.json").exists():
        return target
    try:
        with written(target) as scratch:
            make(scratch)
    except OSError as error:
        raise ConfigError(f"cannot write the model cache {target.parent}: {error}; set DAR_CACHE") from error
    return target
