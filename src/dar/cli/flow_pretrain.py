"""`dar flow-pretrain`: the flow-matching model that a recipe aligns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import Overrides, RecipeArgument, say_next
from dar.errors import ConfigError


def flow_pretrain(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Make the small flow-matching model that a recipe begins with, as its model.pretrain says, at model.path."""
    from dar.config.flow import FlowModelSpec
    from dar.config.recipe import load_recipe

    model = load_recipe(recipe, overrides or []).model
    if not isinstance(model, FlowModelSpec) or model.pretrain is None:
        raise ConfigError(f"{recipe} names no model to make: its model.type is to be flow, with model.pretrain")
    folder = Path(model.path).expanduser()
    if folder.exists() and not overwrite:
        raise ConfigError(f"{folder} is there already: --overwrite replaces it, or name another model.path")
    from dar.policies.flow.pretraining import pretrained
    from dar.policies.saving import save_model
    from dar.run.card import front_matter
    from dar.run.display import Display

    display = Display(num_steps=model.pretrain.steps)
    with display.counting("flow matching", model.pretrain.steps) as advance:
        network, loss = pretrained(model.pretrain, advance)
    size = sum(parameter.numel() for parameter in network.parameters())
    said = f"{size:,} parameters, {model.pretrain.steps} steps of flow matching, loss {loss:.3f}"
    card = [
        *front_matter(library="diffusers", base_model="", tags=["flow-matching"]),
        "# Digits of scikit-learn",
        "",
        said,
        "",
    ]
    save_model(network, None, folder, card="\n".join(card))
    display.note(f"{folder}: {said}")
    say_next(display.note, ["train", recipe, *(overrides or [])])
