"""`dar compare`: one recipe with several methods."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dar.cli.common import AsJson, Overrides, RecipeArgument, print_json, say_next
from dar.console import Console, new_table
from dar.files.atomic import write_text
from dar.files.paths import expanded
from dar.record.measures import BY_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dar.record.measures import Measure


def compare(
    recipe: RecipeArgument,
    algorithms: Annotated[
        list[str],
        typer.Option(
            "--algorithms",
            "-a",
            help="Methods, comma-separated; or one method with overrides of its own, repeated: "
            "-a dar,grpo -a 'slow:dar,optim.learning_rate=1e-6'.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each method, with seeds 0, 1, …")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of these seeds, instead of 0.")] = 0,
    num_parallel: Annotated[
        int,
        typer.Option(
            "--parallel", "-j", min=1, max=64, help="Runs at a time; of several each has an equal share of the cores."
        ),
    ] = 1,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Try every method at each of these, comma-separated (2e-5,4e-5), and show the best one each. A method "
            "with an optim.learning_rate of its own stays at that.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the runs, comparison.json and frontier.png.")
    ] = Path("runs/compare"),
    as_json: AsJson = False,
) -> None:
    """Train one recipe with several methods on the same prompts, and put the held-out figures side by side.

    Run it again to continue, or with further methods beside these to add them: runs that are finished, or that an
    alert has stopped, are not repeated.
    """
    from dar.compare.arms import at_learning_rates, parse_arms
    from dar.compare.runs import run_all
    from dar.compare.summary import summarize, write_frontier

    # With --json only comparison.json's content goes to standard output.
    console = Console(stderr=as_json)
    arms = parse_arms(algorithms)
    if learning_rates is not None:
        arms = at_learning_rates(arms, learning_rates)
    out = Path(expanded(out))
    with console.status("") as status:
        outcomes = run_all(
            recipe,
            overrides or [],
            arms,
            range(first_seed, first_seed + seeds),
            out,
            console.print,
            status.update,
            num_parallel=num_parallel,
        )
    summary = summarize(outcomes)
    write_text(out / "comparison.json", json.dumps(summary, indent=2) + "\n")
    written = [out / "comparison.json"]
    if summary["runs"]:
        if write_frontier(summary, out / "frontier.png"):
            written.append(out / "frontier.png")
        if not as_json:
            console.print(comparison_table(summary))
    for run in summary["runs"]:
        if alert := run["stopped_by"]:
            console.print(
                f"{run['method']}, learning rate {run['learning_rate']:g}, seed {run['seed']}: stopped after step "
                f"{alert['step']} by the alert {alert['rule']}; its figures are of its last evaluation, after step "
                f"{run['curve'][-1]['step']}"
            )
    console.print(", ".join(map(str, written)))
    if as_json:
        print_json(summary)
    elif summary["runs"]:
        say_next(partial(console.print, soft_wrap=True), ["report", out])
    if summary["failed"]:
        raise typer.Exit(1)


def _caption(summary: dict[str, Any]) -> str:
    text = "min: minutes of the steps"
    if any("half_width" in row["reward"] for row in summary["tried"]):
        text = f"mean over seeds ± half of its 95 % interval; {text}"
    if len(summary["tried"]) > len(summary["methods"]):
        best = BY_KEY[summary["chosen_by"]].label
        text += f"; each method at the learning rate of its highest {best}, then the other rates"
    return text


def comparison_table(summary: dict[str, Any]) -> Table:
    """What `dar.compare.summary.summarize` found: every method's best learning rate first, the other rates below."""
    from dar.compare.summary import MEASURED

    methods, tried = list(summary["methods"].values()), summary["tried"]
    # The size of a step is measured on few completions that were just trained on; it is in comparison.json.
    shown = [key for key in MEASURED if key != "kl_old_per_step" and any(key in row for row in tried)]
    measured = {key: MEASURED[key] for key in shown}
    headings = ["method", "rate", *(one.label for one in measured.values())]
    found = new_table("held-out prompts, last evaluation", *headings, caption=_caption(summary))
    for row in methods:
        found.add_row(*_cells(row, measured))
    found.add_section()
    for row in tried:
        if row not in methods:
            found.add_row(*_cells(row, measured), style="dim")
    return found


def _cells(row: dict[str, Any], measured: Mapping[str, Measure]) -> list[str]:
    cells = [row["method"], f"{row['learning_rate']:g}"]
    for key, measure in measured.items():
        found = [row[key][part] for part in ("mean", "half_width") if part in row.get(key, {})]
        mean, *half = (measure.shown(value / 60 if key == "seconds" else value) for value in found) if found else [""]
        cells.append("\n± ".join([mean, *(text.removeprefix("+") for text in half)]))
    return cells
