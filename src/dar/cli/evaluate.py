"""`dar eval`: what judges, people and checkable answers say about models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import AsJson, MaxTokens, NumPrompts, Plain, Seed, Temperature, hide_file_progress, note, print_json
from dar.cli.evaluate_benchmarks import gsm8k, ifeval, lm_eval
from dar.cli.mt_bench import mt_bench
from dar.console import Console
from dar.errors import ConfigError

eval_app = typer.Typer(
    name="eval",
    help="Measure a model: win rates, checkable answers, MT-Bench, agreement with people. What each figure means: "
    "docs/evaluation.md.",
    no_args_is_help=True,
)

Resamples = Annotated[int, typer.Option(min=20, max=1_000_000, help="Draws of the bootstrap.")]


@eval_app.command("win-rate")
def win_rate(
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="Judgements that exist already: AlpacaEval's annotations.json, or a judgements.jsonl of dar.",
            show_default=False,
        ),
    ] = None,
    is_length_controlled: Annotated[
        bool, typer.Option("--length-controlled", help="Also AlpacaEval 2's length-controlled win rate.")
    ] = False,
    instruction_difficulty: Annotated[
        Path | None,
        typer.Option(
            help="AlpacaEval's instruction_difficulty.csv, or df_gamed.csv, with which the length-controlled win rate "
            "is the leaderboard's. Without either, the regression has no difficulty term.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model: Hub id, folder or .gguf file.", show_default=False)
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, or column:NAME of the prompts' file.", show_default=False)
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a row per prompt.", show_default=False)] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A reward, the higher one wins: a name such as sentiment, package.module:function, or a YAML file "
            "with the keys of a recipe's reward.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the evaluation. Run again to continue.", show_default=False)
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Of the prompts' file.")] = "prompt",
    category_column: Annotated[str | None, typer.Option(help="Of the prompts' file.", show_default=False)] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    plain: Plain = False,
    num_prompts: NumPrompts = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """How often a model beats a baseline, with intervals, by category, and what position and length had to do with it.

    dar eval win-rate --annotations annotations.json --length-controlled

    dar eval win-rate --model RUN/model --against BASE --prompts prompts.jsonl --judge judge.yaml --out evals/win
    """
    if instruction_difficulty is not None and not is_length_controlled:
        raise ConfigError(
            "--instruction-difficulty is a part of the length-controlled win rate: add --length-controlled"
        )
    run = {"--model": model, "--against": against, "--prompts": prompts, "--judge": judge, "--out": out}
    given = [name for name, value in run.items() if value is not None]
    if annotations is not None:
        if given:
            raise ConfigError(f"--annotations are judged already: leave {', '.join(given)} away, or --annotations")
        from dar.evaluate.annotations import read_judged_pairs

        pairs = read_judged_pairs(annotations)
    elif model and against and prompts and judge and out:
        from dar.config.data import EvalSamplingSpec
        from dar.evaluate.commands import run_win_rate

        hide_file_progress()
        sampling = EvalSamplingSpec(
            max_tokens=max_tokens, temperature=temperature, seed=seed, is_plain=plain, num_prompts=num_prompts
        )
        pairs = run_win_rate(
            model,
            against,
            prompts,
            judge,
            out,
            sampling,
            note,
            prompt_column=prompt_column,
            category_column=category_column,
        )
    else:
        missing = [name for name in run if name not in given]
        raise ConfigError(f"give --annotations FILE, or a model to evaluate: {', '.join(missing)} missing")
    from dar.cli.evaluate_tables import print_win_rate, win_rate_json
    from dar.evaluate import win_rate as rates

    controlled = None
    if is_length_controlled:
        from dar.evaluate.length_controlled import length_controlled
        from dar.run.difficulty import read_difficulty

        difficulty = None if instruction_difficulty is None else read_difficulty(instruction_difficulty)
        controlled = length_controlled(pairs, difficulty, resamples=resamples, seed=seed)
    result = rates.win_rate(pairs, resamples=resamples, seed=seed)
    if as_json:
        print_json(win_rate_json(result, controlled))
    else:
        print_win_rate(Console(), str(annotations or f"{model} against {against}"), result, controlled)


@eval_app.command("agreement")
def agreement(
    preferences: Annotated[
        Path,
        typer.Argument(
            help="Pairs that people judged: HH, LLMBar, PandaLM, or rows with prompt, chosen, rejected.",
            show_default=False,
        ),
    ],
    choices: Annotated[
        Path | None,
        typer.Option(
            help="What a judge or reward model chose: judgements.jsonl of dar (the first completion as the model), or "
            "rows with pair (the row's number, from 0), score_1 and score_2. Without it: the baselines alone.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Ask this reward or judge instead: a name, package.module:function, or a YAML file with the keys of a "
            "recipe's reward.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --judge: folder of its judgements. Run again to continue.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far a judge or reward model chooses as people do, beside what choosing the longer completion would give.

    dar eval agreement llmbar.jsonl --choices scores.jsonl

    dar eval agreement llmbar.jsonl --judge reward_model.yaml --out evals/llmbar
    """
    if (judge is None) != (out is None) or (judge is not None and choices is not None):
        raise ConfigError("give --choices FILE, or --judge and --out together, or none of the three")
    from dar.cli.evaluate_tables import agreement_json, print_agreement
    from dar.evaluate import agreement as agreements
    from dar.evaluate.preference_files import read_labeled_pairs

    labeled = read_labeled_pairs(preferences)
    chosen, judged = (None, None) if choices is None else agreements.read_choices(choices)
    if judge is not None and out is not None:
        from dar.evaluate.commands import run_choices

        hide_file_progress()
        judged = run_choices(labeled.pairs, preferences, judge, out, note)
        chosen = agreements.choices_of(judged)
    result = agreements.agreement(labeled.pairs, chosen, judged)
    if as_json:
        print_json(agreement_json(result, labeled))
    else:
        print_agreement(Console(), str(preferences), result, labeled)


eval_app.command("ifeval")(ifeval)
eval_app.command("gsm8k")(gsm8k)
eval_app.command("lm-eval")(lm_eval)
eval_app.command("mt-bench")(mt_bench)
