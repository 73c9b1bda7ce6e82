"""`dar export`: a trained model for other programs, and to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import AsJson, hide_file_progress, print_json
from dar.console import Console
from dar.errors import CheckpointError, ConfigError


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
            help="Upload it, and the run's report, to ME/NAME on the Hub; private if new.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained model as a folder that transformers, peft or vLLM load, with its tokenizer and card."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and nothing is overwritten: name a new folder")
    if dtype not in (None, "bf16", "fp32"):
        raise ConfigError(f"--dtype is {dtype}, and must be bf16 or fp32")
    from dar.assembly.export import export_model, push_model

    hide_file_progress()
    base = export_model(run, out, merge=merge, dtype=dtype)
    try:
        address = None if push is None else push_model(out, run, push, private=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {out} is written: later, hf upload {push} {out}") from error
    if as_json:
        print_json({"folder": str(out), "base": base, "uploaded": address})
        return
    what = f"an adapter of {base}, which it needs (--merge puts the two together)" if base else "the whole model"
    Console().print(f"{out} has {what}" + (f"; uploaded: {address}" if address else ""), soft_wrap=True)
