"""The Hub: whether a model or data set can be had at all, and how a model gets there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from dar.errors import CheckpointError, ConfigError
from dar.files.paths import missing
from dar.shown import first_line


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


def require_writable(repository: str) -> None:
    """Raises ConfigError where `upload` to `ME/NAME` would fail: no Hub in reach, no token, or none that may write."""
    said, token = f"hub.repository is {repository}, but", get_token()
    if token is None:
        raise ConfigError(f"{said} there is no token to write with: `hf auth login`, or set HF_TOKEN")
    try:
        address, headers = f"{constants.ENDPOINT}/api/whoami-v2", build_hf_headers(token=token)
        answer = get_session().get(address, headers=headers, timeout=10)
        hf_raise_for_status(answer)
        account = answer.json()
        names = [account["name"], *(each["name"] for each in account.get("orgs", ()))]
    except Exception as error:
        raise ConfigError(
            f"{said} {constants.ENDPOINT} does not say whose the token is ({first_line(error)}). Nothing was "
            "trained. An upload needs the Hub in reach (HF_HUB_OFFLINE is honoured) and a token that it knows"
        ) from error
    if repository.partition("/")[0] not in names:
        raise ConfigError(f"{said} the token is that of {names[0]}, who may write to {', '.join(names)}")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"{said} the token of {names[0]} may only read: make one that may write")


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    more: Mapping[str, bytes] | None = None,
) -> str:
    """Uploads a model's folder as one commit, and returns its address.

    Args:
        folder: of the model.
        repository: `ME/NAME`; made where there is none.
        private: of a new repository; by default as the account says.
        token: by default the one of `hf auth login`.
        more: files beside those of the folder, by name.

    Raises:
        CheckpointError: the Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    adding = [CommitOperationAdd(name, source) for name, source in {**files, **(more or {})}.items()]
    try:
        repo_id = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.create_commit(repo_id, adding, commit_message="A model trained with dar"))
    except Exception as error:
        raise CheckpointError(
            f"nothing was uploaded to {repository} ({first_line(error)}). It needs "
            "the Hub in reach, a name ME/NAME, and a token that may write (`hf auth login` or HF_TOKEN)"
        ) from error
