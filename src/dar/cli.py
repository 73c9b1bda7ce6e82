"""The command line: `dar train`, `dar plan`, `dar compare`, `dar sample`."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from dar import __version__
from dar.errors import ConfigError, DarError

app = typer.Typer(
    name="dar",
    help="Align a language model online, and know what the run did. First: dar plan RECIPE, then dar train RECIPE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[Path, typer.Argument(help="A recipe: a YAML file (reference: docs/recipes.md).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as algorithm.alpha=0.5 optim.learning_rate=1e-5.", show_default=False
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dar {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)]
    )
    _settings["debug"] = debug


_settings = {"debug": False}


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in output_dir from its newest checkpoint.")
    ] = False,
    allow_changed_recipe: Annotated[
        bool, typer.Option("--allow-changed-recipe", help="Resume although the recipe has changed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train a policy as a recipe says; Ctrl-C finishes the step and saves."""
    from dar.recipe import load_recipe

    spec = load_recipe(recipe, overrides or [])
    # Only a recipe that makes sense is worth waiting for torch.
    from dar.build import build_loop
    from dar.trainer import run_loop

    _hide_file_progress()
    loop = build_loop(spec, resume=resume, allow_changed_recipe=allow_changed_recipe, quiet=quiet)
    result = run_loop(loop, resume=resume, command=shlex.join(["dar", *sys.argv[1:]]))
    if result.steps < spec.steps:
        loop.display.note(f"stopped after step {result.steps} of {spec.steps}; continue with --resume")
        raise typer.Exit(130)
    loop.display.note(f"the trained model is in {loop.folder.model}")


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None) -> None:
    """Say what one step of a recipe will do — rows, tokens, passes, memory — without loading any weights.

    (A .gguf model is converted into the cache on first use.)
    """
    from dar.recipe import load_recipe

    spec = load_recipe(recipe, overrides or [])
    from dar.plan import make_plan

    _hide_file_progress()
    found = make_plan(spec)
    table = Table(title=str(recipe), title_justify="left", show_header=False)
    dropped = f", {found.num_dropped} dropped" if found.num_dropped else ""
    total = found.weights_gb + found.optimizer_gb + found.microbatch_gb
    for label, value in (
        ("algorithm", f"{spec.algorithm.type}: {_options(spec.algorithm.model_dump(exclude={'type'}))}"),
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
        (
            "memory (estimate)",
            f"{total:.3g} GB = weights {found.weights_gb:.3g} + gradients and optimizer {found.optimizer_gb:.3g} "
            f"+ one micro-batch {found.microbatch_gb:.3g}",
        ),
        ("run folder", spec.output_dir),
    ):
        table.add_row(label, Text(value))
    Console().print(table)


@app.command()
def compare(
    recipe: Recipe,
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
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds 0, 1, …")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the runs, comparison.json and frontier.png.")] = Path(
        "runs/compare"
    ),
) -> None:
    """Train one recipe with several methods on the same prompts, and put the held-out figures side by side.

    Run it again to continue: finished runs are not repeated.
    """
    from dar.compare import parse_arms, plot_frontier, run_all, summarize

    console = Console()
    outcomes = run_all(
        recipe, overrides or [], parse_arms(algorithms), range(seeds), out, lambda text: console.print(Text(text))
    )
    summary = summarize(outcomes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if summary["runs"]:
        plot_frontier(summary, out / "frontier.png")
        console.print(_comparison_table(summary))
    console.print(Text(f"{out / 'comparison.json'}, {out / 'frontier.png'}"))
    if summary["failed"]:
        raise typer.Exit(1)


_COLUMNS = (
    ("reward", "reward", "{:+.3f}"),
    ("KL π₀", "kl_ref", "{:.2f}"),
    ("KL π_t a step", "kl_old_per_step", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("no EOS", "missing_eos", "{:.0%}"),
    ("entropy", "entropy", "{:.2f}"),
    ("minutes", "minutes", "{:.1f}"),
)


def _comparison_table(summary: dict[str, Any]) -> Table:
    table = Table(title="held-out, at the end", title_justify="left")
    table.add_column("method")
    for label, _, _ in _COLUMNS:
        table.add_column(label, justify="right")
    for name, row in summary["methods"].items():
        cells = []
        for _, key, form in _COLUMNS:
            factor = 1 / 60 if key == "minutes" else 1.0
            found = row.get("seconds" if key == "minutes" else key)
            if found is None:
                cells.append("")
                continue
            cell = form.format(found["mean"] * factor)
            if "half_width" in found:
                cell += " ± " + form.replace("+", "").format(found["half_width"] * factor)
            cells.append(cell)
        table.add_row(name, *cells)
    return table


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="A Hub id, folder (such as RUN/model) or .gguf file.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="What to say to it; '-' reads standard input.", show_default=False)],
    num: Annotated[
        int | None,
        typer.Option("--num", "-n", min=1, help="Completions. [default: 3; 1 with --greedy]", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per completion.")] = 128,
    min_tokens: Annotated[int, typer.Option(min=0, help="Tokens before a completion may end with EOS.")] = 0,
    temperature: Annotated[float, typer.Option(help="Divides the logits; > 0.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token every time.")] = False,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among the k likeliest tokens only.", show_default=False)
    ] = None,
    top_p: Annotated[float, typer.Option(help="Of those, among the likeliest that reach this probability.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a completion before this text; may be repeated.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same completions.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Use the prompt as it is, without a chat template.")] = False,
) -> None:
    """Sample completions of one prompt: as training would, unless told to be greedy or to truncate."""
    from dar.build import build_prompts, context_length, resolve_precision
    from dar.policy import Policy
    from dar.policy.loading import load_model, load_tokenizer
    from dar.recipe import build_spec
    from dar.rollout import InProcessEngine, SamplingKey
    from dar.rollout.truncation import Decoding

    _hide_file_progress()
    decoding = Decoding(greedy=greedy, top_k=top_k, top_p=top_p, min_new_tokens=min_tokens, stop=tuple(stop or ()))
    if min_tokens > max_tokens:
        raise ConfigError(f"--min-tokens is {min_tokens}, but --max-tokens is {max_tokens}")
    text = sys.stdin.read() if prompt == "-" else prompt
    spec = build_spec(
        {
            "model": model,
            "data": {"train": "the prompt", "wrap_as_user": not plain},
            "rewards": ["sentiment"],
            "steps": 1,
            "output_dir": ".",
            "sampling": {"max_completion_length": max_tokens, "temperature": temperature},
        },
        where="dar sample",
    )
    tokenizer = load_tokenizer(spec.model)
    if not plain and not tokenizer.chat_template:
        raise ConfigError(f"{model} has no chat template: add --plain to give it the prompt as it is")
    causal_lm = load_model(spec.model)
    prompts = build_prompts(spec, spec.data.train, [{"prompt": text}], tokenizer, context_length(causal_lm.config))
    policy = Policy(
        causal_lm, tokenizer, resolve_precision(spec.runtime), temperature=temperature, with_reference=False
    )
    engine = InProcessEngine(policy, max_tokens=spec.runtime.max_cache_tokens)
    started = time.perf_counter()
    rollouts = engine.generate(
        prompts.prompts,
        num or (1 if greedy else 3),
        max_completion_length=max_tokens,
        key=SamplingKey(seed, "sample"),
        decoding=decoding,
    )
    seconds, num_tokens = time.perf_counter() - started, int(rollouts.groups.mask.sum())
    console = Console()
    for index, (completion, reason) in enumerate(zip(rollouts.texts, rollouts.finish_reasons, strict=True), start=1):
        console.print(Text(f"── {index} ({reason}) ──", style="dim"))
        console.print(Text(completion), soft_wrap=True)
    # Not among the completions: the same call prints the same completions, but never takes the same time.
    speed = f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens per second"
    Console(stderr=True).print(Text(speed, style="dim"))


def main() -> None:
    """Entry point: an error the library raises on purpose becomes one paragraph and exit code 2."""
    try:
        app()
    except DarError as error:
        if _settings["debug"]:
            raise
        kind = "" if isinstance(error, ConfigError) else f" ({type(error).__name__})"
        Console(stderr=True).print(Text(f"dar{kind}: {error}"), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


def _hide_file_progress() -> None:
    """transformers' bars tell of files, not of the run, and would break up ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _options(values: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
