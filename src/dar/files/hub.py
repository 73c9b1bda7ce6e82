"""The Hub: whether a model or data set can be had at all, and how a model gets there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session

from dar.errors import CheckpointError, ConfigError
from dar.files.paths import missing
from dar.shown import words


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


def upload(folder: Path, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Uploads a model's folder, and returns the address of the commit.

    Args:
        folder: of the model.
        repository: `ME/NAME`; made where there is none.
        private: of a new repository; by default as the account says.
        token: by default the one of `hf auth login`.

    Raises:
        CheckpointError: the Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
    except Exception as error:
        raise CheckpointError(
            f"nothing was uploaded to {repository} ({type(error).__name__}: {words(error).splitlines()[0]}). It needs "
            "the Hub in reach, a name ME/NAME, and a token that may write (`hf auth login` or HF_TOKEN)"
        ) from error
