"""`dar plan` and `dar train`: one run of a recipe."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dar.cli.common import (
    AsJson,
    Overrides,
    Overwrite,
    RecipeArgument,
    Resume,
    hide_file_progress,
    print_json,
    say_next,
)
from dar.cli.trial import show_trial
from dar.console import Console, new_table

if TYPE_CHECKING:
    from rich.table import Table

    from dar.assembly.plan import Plan
    from dar.config.run import RunSpec

OnCluster = Annotated[
    str | None,
    typer.Option(
        help="A run on a Ray cluster: local (started on this machine for the run), auto (the one that this machine is "
        "part of) or ray://host:port. Who takes part: cluster.samplers=2 and the like.",
        show_default=False,
    ),
]


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    is_tried: Annotated[
        bool, typer.Option("--try", help="Also load the model and take one step: samples, rewards, seconds.")
    ] = False,
    cluster: OnCluster = None,
    hardware: Annotated[
        Path | None,
        typer.Option("--cluster-spec", exists=True, help="Also the step, on paper, on the hardware of this YAML file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what one step of a recipe will do — rows, tokens, passes, memory — without loading any weights.

    (A .gguf model is converted into the cache on first use.) Nothing is left behind, by --try neither.
    """
    from dar.config.hardware import HardwareSpec
    from dar.config.recipe import load_recipe

    changes = [*(overrides or []), *([f"cluster.address={cluster}"] if cluster else [])]
    spec = load_recipe(recipe, changes)
    there = load_recipe(hardware, kind=HardwareSpec) if hardware else None
    from dar.assembly.plan import make_plan

    hide_file_progress()
    found = make_plan(spec, there)
    console = Console()
    if not as_json:
        console.print(_plan_table(str(recipe), spec, found))
    trial = None
    if is_tried:
        from dar.assembly.trial import try_step

        Console(stderr=True).print("taking one step…", style="dim")
        trial = try_step(spec, num_heldout_prompts=found.num_heldout_prompts)
    if as_json:
        tried = {"trial": dataclasses.asdict(trial)} if trial else {}
        print_json({**dataclasses.asdict(found), "peak_gb": found.peak_gb} | tried)
        return
    if trial:
        show_trial(console, spec, trial)
    say_next(partial(console.print, soft_wrap=True), ["train", recipe, *changes])


def _plan_table(title: str, spec: RunSpec, found: Plan) -> Table:
    shown = new_table(title, "", "", is_text=True)
    dropped = f", {found.num_dropped} dropped" if found.num_dropped else ""
    options = ", ".join(f"{key} {value}" for key, value in spec.algorithm.model_dump(exclude={"type"}).items())
    memory = ", ".join(f"{name} {size:.3g}" for name, size in found.memory_gb.items())
    for label, value in (
        ("algorithm", f"{spec.algorithm.type}: {options}"),
        ("policy", f"{spec.model.path}, {found.num_parameters:,} parameters"),
        ("device", f"{found.device}, matrix products in {found.compute_dtype}"),
        ("prompts", f"{found.num_train_prompts} to train on{dropped}, {found.num_heldout_prompts} held out"),
        ("prompt length", f"{found.mean_prompt_length:.0f} tokens on average, {found.longest_prompt} at most"),
        (
            "one step",
            f"{spec.prompts_per_step} prompts × {spec.num_generations} completions = {found.rows_per_step} rows",
        ),
        (
            "",
            f"at most {found.max_completion_tokens_per_step:,} tokens sampled of {found.max_padded_tokens_per_step:,}",
        ),
        ("passes", "; ".join(found.passes)),
        ("run", f"{spec.steps} steps = {found.epochs:.2f} epochs"),
        ("memory (estimate)", f"{found.peak_gb:.3g} GB at most; by phase: {memory}"),
        *(("cluster", line) for line in found.cluster),
        *(("moved", f"{size:,.4g} MB of {name}") for name, size in found.moved_mb.items()),
        *(("on paper", line) for line in (found.on_paper.lines() if found.on_paper else ())),
        *(("alerts", notice) for notice in spec.silent_alerts),
        ("run folder", spec.output_dir),
    ):
        shown.add_row(label, value)
    return shown


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_changed_recipe: Annotated[
        bool, typer.Option("--allow-changed-recipe", help="Resume although the recipe has changed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    cluster: OnCluster = None,
    as_json: AsJson = False,
) -> None:
    """Train a policy as a recipe says; Ctrl-C finishes the step and saves.

    Exit codes: 0 finished, 2 an error, 3 stopped by an alert of the recipe, 130 stopped by Ctrl-C.
    """
    from dar.config.recipe import load_recipe

    spec = load_recipe(recipe, [*(overrides or []), *([f"cluster.address={cluster}"] if cluster else [])])
    # Only a recipe that makes sense is worth waiting for torch.
    from dar.collective import own_rank
    from dar.record.folder import RunFolder
    from dar.report.record import run_record
    from dar.report.run import load_run
    from dar.run.display import Display

    hide_file_progress()
    # With --json only the result goes to standard output.
    console = Console(stderr=as_json)
    command = shlex.join(["dar", *sys.argv[1:]])
    settings: dict[str, Any] = {"resume": resume, "allow_changed_recipe": allow_changed_recipe, "overwrite": overwrite}
    if spec.cluster is None:
        from dar.assembly.loop import build_loop
        from dar.assembly.training import run_loop

        loop = build_loop(spec, quiet=quiet, console=console, **settings)
        result = run_loop(loop, resume=resume, command=command)
    else:
        from dar.cluster.start import train_on_cluster

        result = train_on_cluster(spec, quiet=quiet, console=console, command=command, **settings)
    is_main, folder = own_rank() == 0, RunFolder(spec.output_dir)
    display = Display(num_steps=spec.steps, quiet=quiet or not is_main, console=console)
    if as_json and is_main:
        print_json(run_record(load_run(folder.path)))
    if result.steps < spec.steps and result.stopped_by is not None:
        # Whoever asked for quiet still wants to know why there is no model.
        reason = f"the alert {result.stopped_by.rule}: {result.stopped_by.message}"
        text = (
            f"dar: stopped after step {result.steps} of {spec.steps} by {reason}. Continue all the same with --resume."
        )
        if is_main:
            Console(stderr=True).print(text, soft_wrap=True)
        raise typer.Exit(3)
    if result.steps < spec.steps:
        display.note(f"stopped after step {result.steps} of {spec.steps}; continue with --resume")
        raise typer.Exit(130)
    display.note(f"the trained model is in {folder.model}")
    if not as_json:
        plain = [] if (folder.model / "chat_template.jinja").is_file() else ["--plain"]
        length = ["--max-tokens", str(spec.sampling.max_completion_length)]  # the model may read no more
        sample = ["sample", folder.model, "How was your day?", *plain, *length]
        is_text = spec.model.library == "transformers"
        say_next(display.note, ["report", folder.path], *([sample] if is_text else []))
