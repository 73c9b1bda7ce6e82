"""What several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dar.errors import ConfigError
from dar.shown import redacted

if TYPE_CHECKING:
    from dar.config.base import Spec

    SpecT = TypeVar("SpecT", bound=Spec)

RecipeArgument = Annotated[
    Path, typer.Argument(help="A recipe: a YAML file (reference: docs/recipes.md).", show_default=False)
]
ModelArgument = Annotated[
    str, typer.Argument(help="A Hub id, folder (such as RUN/model) or .gguf file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as algorithm.alpha=0.5 optim.learning_rate=1e-5.", show_default=False
    ),
]

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir from its newest checkpoint.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Start again in an output_dir that holds a run, of which nothing is kept."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of what people read.")]


def spec_of(kind: type[SpecT], values: dict[str, Any], settings: Sequence[str], *, command: str) -> SpecT:
    """A spec from a command's options and `key.path=value` settings, the latter having the last word.

    Raises:
        ConfigError: a value is not allowed.
    """
    from pydantic import ValidationError

    from dar.config.recipe import apply_override, explain

    for setting in settings:
        apply_override(values, setting)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{command}: " + "; ".join(explain(error, values))) from error


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """JSON on standard output: for programs, and in ASCII alone, so that none of it does anything to a terminal."""
    typer.echo(redacted(json.dumps(value, indent=indent)))


def hide_file_progress() -> None:
    """transformers' bars tell of files, not of the run, and would break up ours; its warnings become ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
