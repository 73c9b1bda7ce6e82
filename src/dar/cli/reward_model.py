"""`dar reward-model`: train a reward model on preference pairs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from dar.cli.common import Overrides, Overwrite, RecipeArgument, Resume, hide_file_progress, print_json, say_next
from dar.console import Console, new_table


def reward_model(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON, and nothing else.")] = False,
) -> None:
    """Train a reward model on preference pairs (Bradley–Terry); Ctrl-C finishes the step and saves."""
    from dar.config.recipe import load_recipe
    from dar.config.reward_model import RewardModelSpec

    spec = load_recipe(recipe, overrides or [], kind=RewardModelSpec)
    # Only a recipe that makes sense is worth waiting for torch.
    from dar.reward_model.build_loop import build_reward_model_loop
    from dar.reward_model.training import run_reward_model

    hide_file_progress()
    loop = build_reward_model_loop(spec, resume=resume, overwrite=overwrite, quiet=as_json)
    result = run_reward_model(loop, resume=resume, command=shlex.join(["dar", *sys.argv[1:]]))
    if as_json and loop.is_main:
        print_json(dataclasses.asdict(result))
    elif "after" in result.evaluation and loop.is_main:
        Console().print(_table(result.evaluation, result.output_dir))
    if result.steps < result.num_steps:
        loop.display.note(f"stopped after step {result.steps} of {result.num_steps}; continue with --resume")
        raise typer.Exit(130)
    loop.display.note(f"the reward model is in {loop.folder.model}")
    if not as_json:
        reward = f"{{type: model, model: {json.dumps(str(loop.folder.model))}}}"
        say_next(loop.display.note, ["train", "RECIPE", f"rewards=[{reward}]"])


def _table(evaluation: dict[str, Any], title: str) -> Table:
    """Before and after; then the accuracy by length difference."""
    before, after = evaluation["before"], evaluation["after"]
    caption = "± standard error; longer, shorter: by tokens"
    shown = new_table(f"{title}: {after['num_pairs']} held-out pairs", "", "before", "after", caption=caption)
    for label, key, error in (
        ("accuracy", "accuracy", "accuracy_se"),
        ("  longer wins", "longer_wins_accuracy", "length_se"),
        ("  shorter wins", "shorter_wins_accuracy", "length_se"),
    ):
        shown.add_row(label, *(f"{row[key]:.1%} ± {row[error]:.1%}" for row in (before, after)))
    for label, key in (("loss, nats", "loss"), ("calibration error", "ece"), ("mean margin", "mean_margin")):
        shown.add_row(label, *(f"{row[key]:z.3f}" for row in (before, after)))
    shown.add_section()
    for first, last in zip(before["by_length_difference"], after["by_length_difference"], strict=True):
        cells = [f"{row['accuracy']:.1%} ± {row['se']:.1%}" for row in (first, last)]
        shown.add_row(f"chosen longer by {_range(last)} tokens ({last['num_pairs']})", *cells)
    return shown


def _range(part: dict[str, Any]) -> str:
    low, high = part["from"], part["to"]
    if low == high:
        return f"{low}"
    return f"≤ {high}" if low is None else f"≥ {low}" if high is None else f"{low} … {high}"
