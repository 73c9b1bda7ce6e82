"""`dar export`: a trained model for other programs, and to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dar.cli.common import AsJson, hide_file_progress, print_json
from dar.console import Console
from dar.errors import ConfigError
from dar.shown import words

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def export(
    run: Annotated[
        Path, typer.Argument(help="A run (its model/ is meant), or a model's folder: RUN/best.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The new folder.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Make one model of an adapter and its base.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Write the weights in bf16, or fp32.", show_default=False)] = None,
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
    source = run / "model" if (run / "config.yaml").is_file() else run
    if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        hint = "The run is not finished: go on with dar train … --resume, or name its best/ if it has one"
        raise ConfigError(f"{source} holds no model. {hint if source.name == 'model' else 'Name the folder of a run'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and nothing is overwritten: name a new folder")
    if dtype not in (None, "bf16", "fp32"):
        raise ConfigError(f"--dtype is {dtype}, and must be bf16 or fp32")
    address = None
    if push is not None:
        # Before anything is written: whoever is not logged in is to know at once.
        address = str(_on_hub(push, lambda hub: hub.create_repo(push, private=True, exist_ok=True)))
    from dar.assembly.export import export_model

    hide_file_progress()
    base = export_model(source, out, merge=merge, dtype=dtype)
    if push is not None:
        _on_hub(push, lambda hub: hub.upload_folder(repo_id=push, folder_path=out))
    if as_json:
        print_json({"folder": str(out), "base": base, "uploaded": address})
        return
    what = f"an adapter of {base}, which it needs (--merge puts the two together)" if base else "the whole model"
    Console().print(f"{out} has {what}" + (f"; uploaded to {address}" if address else ""), soft_wrap=True)


def _on_hub(repository: str, ask: Callable[[HfApi], Any]) -> Any:
    from huggingface_hub import HfApi

    try:
        return ask(HfApi())
    except Exception as error:
        raise ConfigError(
            f"nothing is uploaded to {repository} ({type(error).__name__}: {words(error).splitlines()[0]}). It needs "
            "the Hub in reach, a name ME/NAME, and a token that may write (`hf auth login` or HF_TOKEN)"
        ) from error
