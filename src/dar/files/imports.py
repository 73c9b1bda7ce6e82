"""Where code of one's own is: `package.module:name`, from the working directory too, or `folder/file.py:name`."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from dar.errors import ConfigError
from dar.files.paths import expanded, missing

_NOT_ONES_OWN = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), "<")


def located(path: str) -> tuple[str, str, str]:
    """The folder in which a module is looked for first, the module and the name in it.

    Raises:
        ConfigError: there is no such file.
    """
    where, _, name = path.rpartition(":")
    if not where.endswith(".py"):
        return str(Path.cwd()), where, name
    file = Path(expanded(where)).absolute()
    if not file.is_file():
        raise ConfigError(f"{path}: {missing(where)}")
    return str(file.parent), file.stem, name


def raised_at(error: BaseException) -> str:
    """` (my_rewards.py, line 3, in score)`: the innermost line of one's own code behind an error, if there is one."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_ONES_OWN) and "-packages" not in frame.filename
    ]
    if not own:
        return ""
    return f" ({own[-1].filename.removeprefix(f'{Path.cwd()}/')}, line {own[-1].lineno}, in {own[-1].name})"
