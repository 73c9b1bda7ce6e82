"""Whether a model or data set can be had at all: from here, from the Hub's cache, or from the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session

from dar.errors import ConfigError
from dar.files.paths import missing


def require_source(path: str, kind: str) -> None:
    """Raises ConfigError where a `model` or `dataset` is neither here nor may be on a Hub that answers."""
    if Path(path).exists():
        return
    problem = f"the {kind} path {missing(path)}"
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError(problem)
    if Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type=kind)).exists():
        return
    if "/" not in path and "did you mean" in problem:
        raise ConfigError(f"{problem}. On the Hub it would be called ORG/NAME.")
    try:
        # Asked once, where loading would try again for a minute and a half.
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:
        problem += ", and the Hub, where it may be, cannot be reached (HF_HUB_OFFLINE is honoured)"
        raise ConfigError(problem) from error
