"""`dar schema`: what a recipe may say, for editors."""

from __future__ import annotations

from typing import Annotated

import typer

from dar.cli.common import print_json


def schema(
    reward_model: Annotated[bool, typer.Option("--reward-model", help="Of a recipe of dar reward-model.")] = False,
    control: Annotated[bool, typer.Option("--control", help="Of a recipe of dar control.")] = False,
) -> None:
    """Print the JSON Schema of a recipe, with which an editor completes, explains and checks its keys."""
    from dar.config.control import ControlSpec
    from dar.config.reward_model import RewardModelSpec
    from dar.config.run import RunSpec
    from dar.config.schema import recipe_schema

    print_json(recipe_schema(RewardModelSpec if reward_model else ControlSpec if control else RunSpec))
