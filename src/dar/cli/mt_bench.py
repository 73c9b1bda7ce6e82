"""`dar eval mt-bench`: answers of two turns, rated by a judging model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import AsJson, MaxTokens, Out, Seed, hide_file_progress, note, print_json, spec_of
from dar.console import Console


def mt_bench(
    model: Annotated[
        str, typer.Option(help="The model: Hub id, folder (such as RUN/model) or .gguf file.", show_default=False)
    ],
    questions: Annotated[Path, typer.Option(help="MT-Bench's question.jsonl.", show_default=False)],
    references: Annotated[
        Path,
        typer.Option(help="MT-Bench's reference_answer/gpt-4.jsonl: math, reasoning and coding.", show_default=False),
    ],
    judge_prompts: Annotated[Path, typer.Option(help="MT-Bench's judge_prompts.jsonl.", show_default=False)],
    out: Out,
    base_url: Annotated[str, typer.Option(help="Of the judge, such as http://127.0.0.1:8000/v1.", show_default=False)],
    judge_model: Annotated[str, typer.Option(help="As the judge's server calls it.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="What else a recipe says of a judge's endpoint, such as concurrency=16 max_tokens=4096; without it "
            "concurrency is 8, timeout 300 and max_tokens 2048.",
            metavar="[KEY.PATH=VALUE]...",
            show_default=False,
        ),
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the judge's key.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Of every category. Without it, MT-Bench's of each.", show_default=False),
    ] = None,
    seed: Seed = 0,
    num_questions: Annotated[int | None, typer.Option(min=1, help="Only the first ones.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Scores from 1 to 10 for answers to MT-Bench's questions of two turns, by category and turn.

    dar eval mt-bench --model RUN/model --questions question.jsonl --references gpt-4.jsonl --judge-prompts
    judge_prompts.jsonl --base-url http://127.0.0.1:8000/v1 --judge-model JUDGE --out evals/mt-bench
    """
    from dar.cli.evaluate_tables import print_mt_bench
    from dar.config.data import EvalSamplingSpec
    from dar.config.judge import JudgeEndpointSpec
    from dar.evaluate.mt_bench.run import Files, run_mt_bench

    endpoint = {"base_url": base_url, "model": judge_model, "api_key_env": api_key_env}
    usual = {"max_tokens": 2048, "concurrency": 8, "timeout": 300.0, "top_logprobs": 0}
    judge = spec_of(JudgeEndpointSpec, endpoint | usual, settings or [], command="dar eval mt-bench")
    hide_file_progress()
    files = Files(questions, references, judge_prompts)
    sampling = EvalSamplingSpec(max_tokens=max_tokens, temperature=temperature, seed=seed, num_prompts=num_questions)
    result = run_mt_bench(model, files, judge, out, sampling, note)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_mt_bench(Console(), f"MT-Bench: {model}, judged by {judge_model}", result)
