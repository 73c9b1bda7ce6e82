"""`dar control`: train a controller."""

from __future__ import annotations

import typer

from dar.cli.common import Overrides, Overwrite, RecipeArgument, Resume, say_next


def control(
    recipe: RecipeArgument, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """Train a controller with SAC on uncertain MuJoCo dynamics, its layers' rank adapting (AdaRL)."""
    from dar.config.control import ControlSpec
    from dar.config.recipe import load_recipe

    spec = load_recipe(recipe, overrides or [], kind=ControlSpec)
    from dar.control.loop import ControlLoop

    loop = ControlLoop(spec, resume=resume, overwrite=overwrite, quiet=False)
    done = loop.run(resume=resume)
    if done < loop.num_steps:
        loop.display.note(f"stopped after step {done} of {loop.num_steps}; continue with --resume")
        raise typer.Exit(130)
    loop.save_model()
    loop.display.note(f"the controller is in {loop.folder.model}")
    say_next(loop.display.note, ["report", loop.folder.path])
