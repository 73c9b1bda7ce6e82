"""Model folders in the cache, made once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dar.errors import ConfigError
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
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"cannot write the model cache {target.parent}: {error}; set DAR_CACHE") from error
    try:
        make(scratch)
        if not target.exists():
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
