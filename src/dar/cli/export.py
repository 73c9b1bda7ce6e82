"""`dar export`: a trained model for other programs, and to the Hub."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import AsJson, hide_file_progress, print_json
from dar.console import Console
from dar.errors import ConfigError
from dar.shown import words


class Precision(StrEnum):
    """What weights can be written in."""

    fp32, bf16 = "fp32", "bf16"


def export(
    run: Annotated[
        Path,
        typer.Argument(help="A run (its model/ is meant), or a model's folder: RUN/best.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="The new folder.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Make one model of an adapter and its base.")] = False,
    dtype: Annotated[
        Precision | None, typer.Option(help="Precision of the weights; by default as they are.", show_default=False)
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            help="Upload it too, to this repository of the Hub (ME/NAME); made private if it is new.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained model as a folder that transformers, peft or vLLM load, with its tokenizer and card."""
    source = run.expanduser() / "model" if (run.expanduser() / "config.yaml").is_file() else run.expanduser()
    if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        hint = "The run is not finished: go on with dar train … --resume, or name its best/ if it has one"
        raise ConfigError(f"{source} holds no model. {hint if source.name == 'model' else 'Name the folder of a run'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and nothing is overwritten: name a new folder")
    if push is not None:
        _require_login(push)
    import torch

    from dar.assembly.export import export_model

    hide_file_progress()
    asked = {None: None, Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[dtype]
    base = export_model(source, out, merge=merge, dtype=asked)
    address = None if push is None else _uploaded(out, push)
    if as_json:
        print_json({"folder": str(out), "base": base, "uploaded": address})
        return
    what = f"an adapter of {base}, which it needs (--merge puts the two together)" if base else "the whole model"
    Console().print(f"{out} has {what}" + (f"; uploaded to {address}" if address else ""), soft_wrap=True)


def _require_login(repository: str) -> None:
    """Raises ConfigError where the Hub cannot be reached or does not know who asks: before anything is written."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

    try:
        validate_repo_id(repository)
        headers = build_hf_headers(token=True)
        hf_raise_for_status(get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=20))
    except Exception as error:
        raise _not_uploaded(repository, error) from error


def _uploaded(folder: Path, repository: str) -> str:
    """The address the folder has on the Hub now."""
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise _not_uploaded(repository, error) from error
    return str(address)


def _not_uploaded(repository: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"nothing is uploaded to {repository} ({type(error).__name__}: {words(error).splitlines()[0]}). It needs "
        "the Hub in reach, a name OWNER/NAME that is yours, and a token that may write (`hf auth login`, or HF_TOKEN)"
    )
