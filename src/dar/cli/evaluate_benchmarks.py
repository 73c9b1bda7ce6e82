"""`dar eval ifeval`, `gsm8k` and `lm-eval`: answers that can be checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dar.cli.common import (
    AsJson,
    MaxTokens,
    ModelArgument,
    NumPrompts,
    Out,
    Plain,
    Seed,
    Temperature,
    hide_file_progress,
    note,
    print_json,
)
from dar.console import Console

if TYPE_CHECKING:
    from dar.config.data import EvalSamplingSpec
    from dar.evaluate.benchmarks import IFEval, Share

    Tables = dict[str, dict[str, Share]]
    """Shares by name, by the title of their table."""
    Measure = Callable[[str, Path, Path, EvalSamplingSpec], tuple[IFEval | Share, Tables]]
    """(model, prompts, out, how completions are drawn) to the result and what is shown of it."""

Prompts = Annotated[Path, typer.Argument(help="The benchmark's file.", show_default=False)]


def _command(measure: Measure, description: str, default_max_tokens: int) -> Callable[..., None]:
    """The command of a benchmark whose answers are counted as right or wrong."""

    def command(
        model: ModelArgument,
        prompts: Prompts,
        out: Out,
        max_tokens: MaxTokens = default_max_tokens,
        temperature: Temperature = 0.0,
        seed: Seed = 0,
        plain: Plain = False,
        num_prompts: NumPrompts = None,
        as_json: AsJson = False,
    ) -> None:
        from dar.cli.evaluate_tables import print_shares
        from dar.config.data import EvalSamplingSpec

        hide_file_progress()
        sampling = EvalSamplingSpec(
            max_tokens=max_tokens, temperature=temperature, seed=seed, is_plain=plain, num_prompts=num_prompts
        )
        result, tables = measure(model, prompts, out, sampling)
        if as_json:
            print_json(dataclasses.asdict(result))
            return
        for title, shares in tables.items():
            print_shares(Console(), title, shares)

    command.__doc__ = description
    return command


def _ifeval(model: str, prompts: Path, out: Path, sampling: EvalSamplingSpec) -> tuple[IFEval, Tables]:
    from dar.evaluate.commands import run_ifeval

    result = run_ifeval(model, prompts, out, sampling, note)
    overall = {
        "prompts, strict": result.prompt_strict,
        "instructions, strict": result.instruction_strict,
        "prompts, loose": result.prompt_loose,
        "instructions, loose": result.instruction_loose,
    }
    return result, {f"IFEval: {model}": overall, "by kind of instruction, strict": result.kinds}


def _gsm8k(model: str, prompts: Path, out: Path, sampling: EvalSamplingSpec) -> tuple[Share, Tables]:
    from dar.evaluate.commands import run_gsm8k

    result = run_gsm8k(model, prompts, out, sampling, note)
    return result, {f"GSM8K: {model}": {"right": result}}


ifeval = _command(
    _ifeval,
    """Which verifiable instructions a model follows: IFEval, strict and loose.

    dar eval ifeval RUN/model input_data.jsonl --out evals/ifeval
    """,
    default_max_tokens=1024,
)
gsm8k = _command(
    _gsm8k,
    """The share of GSM8K's questions a model answers right, zero-shot.

    dar eval gsm8k RUN/model test.jsonl --out evals/gsm8k
    """,
    default_max_tokens=512,
)


def lm_eval(
    model: ModelArgument,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks or groups: arc_easy,piqa.", show_default=False)],
    out: Out,
    include_path: Annotated[
        str | None, typer.Option(help="A folder of your own tasks, in lm-eval's YAML.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples; else as the task says.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of each task.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one pass.")] = 8,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask in the model's chat template.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The tasks of EleutherAI's lm-evaluation-harness, by its own code (dar-rlhf[lm-eval]).

    dar eval lm-eval RUN/best --tasks arc_easy,piqa --limit 200 --out evals/lm
    """
    from dar.cli.evaluate_tables import print_lm_eval
    from dar.config.data import LMEvalSpec
    from dar.evaluate.commands import run_lm_eval

    hide_file_progress()
    spec = LMEvalSpec(
        num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, chat_template=chat_template,
        include_path=include_path
    )  # fmt: skip
    result = run_lm_eval(model, [name.strip() for name in tasks.split(",")], out, spec, seed, note)
    if as_json:
        print_json(result)
    else:
        print_lm_eval(Console(), f"lm-eval: {model}", result)
