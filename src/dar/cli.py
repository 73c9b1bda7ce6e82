"""The command line: `dar train`, `dar plan`, `dar sample`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

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
def sample(
    model: Annotated[
        str, typer.Argument(help="A Hub id, folder (such as RUN/model) or .gguf file.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="What to say to it; '-' reads standard input.", show_default=False)],
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Completions.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per completion.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits; > 0.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same completions.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Use the prompt as it is, without a chat template.")] = False,
) -> None:
    """Sample completions of one prompt, as training would."""
    from dar.build import build_prompts, context_length, resolve_precision
    from dar.policy import Policy
    from dar.policy.loading import load_model, load_tokenizer
    from dar.recipe import build_spec
    from dar.rollout import InProcessEngine, SamplingKey

    _hide_file_progress()
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
    rollouts = InProcessEngine(policy, max_tokens=spec.runtime.max_cache_tokens).generate(
        prompts.prompts, num, max_completion_length=max_tokens, key=SamplingKey(seed, "sample")
    )
    console = Console()
    for index, (completion, reason) in enumerate(zip(rollouts.texts, rollouts.finish_reasons, strict=True), start=1):
        console.print(Text(f"── {index} ({reason}) ──", style="dim"))
        console.print(Text(completion), soft_wrap=True)


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
