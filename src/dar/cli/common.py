"""What several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="A recipe: a YAML file (reference: docs/recipes.md).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as algorithm.alpha=0.5 optim.learning_rate=1e-5.", show_default=False
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of what people read.")]


def hide_file_progress() -> None:
    """transformers' bars tell of files, not of the run, and would break up ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
