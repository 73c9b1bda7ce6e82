"""What several commands share."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dar.console import Console
from dar.errors import ConfigError
from dar.shown import redacted

if TYPE_CHECKING:
    from dar.config.base import Spec

    SpecT = TypeVar("SpecT", bound=Spec)


def complete_recipe(incomplete: str) -> list[str]:
    """What the name of a recipe may become, for the shell."""
    from dar.config.recipe import RECIPES

    return [file.stem for file in RECIPES.glob("*.yaml")] + glob.glob(f"{glob.escape(incomplete)}*.y*ml")


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """What `key.path=value` may become, for the shell."""
    from dar.config.control import ControlSpec
    from dar.config.reward_model import RewardModelSpec
    from dar.config.run import RunSpec
    from dar.config.schema import allowed, recipe_schema

    kinds = {"reward-model": RewardModelSpec, "control": ControlSpec}
    schema = recipe_schema(kinds.get(ctx.info_name or "", RunSpec))
    before = ctx.params.get("overrides") or []
    if before[-1:] == ["="]:  # bash makes three words of key=value
        return allowed(schema, before[-2].split("."))[1]
    path, is_value, _ = incomplete.partition("=")
    *parents, name = path.split(".")
    known = allowed(schema, parents)[0]
    if is_value or known.get(name) is False:
        return [f"{path}={value}" for value in allowed(schema, [*parents, name])[1] or [""]]
    return [".".join([*parents, key]) + ("." if has_keys else "=") for key, has_keys in known.items()]


RecipeArgument = Annotated[
    Path,
    typer.Argument(
        help="A recipe: a YAML file, or a shipped one's name: quickstart, toy.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="A Hub id, folder (such as RUN/model) or .gguf file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as algorithm.alpha=0.5 optim.learning_rate=1e-5.",
        show_default=False,
        autocompletion=complete_override,
    ),
]

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir from its newest checkpoint.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Start again in an output_dir that holds a run, of which nothing is kept."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of what people read.")]
# Of several commands of `dar eval`.
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same completions and intervals.")
]
Out = Annotated[
    Path, typer.Option(help="Folder of settings, completions and results. Run again to continue.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = the likeliest token every time.")]
Plain = Annotated[bool, typer.Option("--plain", help="Use prompts as they are, without a chat template.")]
NumPrompts = Annotated[int | None, typer.Option(min=1, help="Only the first prompts.", show_default=False)]


def spec_of(kind: type[SpecT], values: dict[str, Any], settings: Sequence[str], *, command: str) -> SpecT:
    """A spec from a command's options and `key.path=value` settings, the latter having the last word.

    Raises:
        ConfigError: a value is not allowed.
    """
    from pydantic import ValidationError

    from dar.config.problems import explain
    from dar.config.recipe import apply_override

    for setting in settings:
        apply_override(values, setting)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{command}: " + "; ".join(explain(error, values))) from error


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """JSON on standard output: for programs, and in ASCII alone, so that none of it does anything to a terminal."""
    typer.echo(redacted(json.dumps(value, indent=indent)))


def say_next(say: Callable[[str], object], *commands: Sequence[str | Path]) -> None:
    """The commands worth typing now, written so that a shell reads them as they are."""
    for index, command in enumerate(commands):
        say(f"{'next:' if index == 0 else '     '} {shlex.join(['dar', *map(str, command)])}")


def note(text: str) -> None:
    """Progress is for people: results on standard output stay clean."""
    Console(stderr=True).print(text, style="dim")


def hide_file_progress() -> None:
    """transformers' bars tell of files, not of the run, and would break up ours; its warnings become ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
