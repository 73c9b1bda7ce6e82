"""`dar eval ifeval` and `dar eval gsm8k`: answers that can be checked."""

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
