"""`dar judge`: scores a file with a judge, to know it before a run is spent on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dar.cli.common import print_json, spec_of
from dar.console import Console, new_table
from dar.errors import DataError

if TYPE_CHECKING:
    from dar.config.rewards import JudgeRewardSpec
    from dar.judge import Preference, Score
    from dar.rewards import Failed


class JudgeMode(StrEnum):
    """How completions are judged."""

    pointwise = "pointwise"
    pairwise = "pairwise"


def judge(
    file: Annotated[
        Path,
        typer.Argument(
            help="Rows (.jsonl, .json, .parquet, .csv) with prompt and completion, or completion_a and completion_b.",
            show_default=False,
        ),
    ],
    base_url: Annotated[str, typer.Option(help="Such as http://127.0.0.1:8000/v1.", show_default=False)],
    model: Annotated[str, typer.Option(help="As the server calls it.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="What else the reward's recipe says: endpoint.max_tokens=64, 'scale=[1, 9]'.",
            metavar="[KEY.PATH=VALUE]...",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[JudgeMode, typer.Option(help="A score for each completion, or a winner of each two.")] = (
        JudgeMode.pointwise
    ),
    template: Annotated[str, typer.Option(help="helpful, harmless, tldr, free, or a file of your own.")] = "helpful",
    rubric_column: Annotated[str | None, typer.Option(help="Column that says what a row is judged by.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per row instead of a summary.")] = False,
) -> None:
    """Score completions with a judge, or compare two: exactly as the reward of type judge does."""
    from dar.config.rewards import JudgeRewardSpec
    from dar.files.tables import read_table, rows_of

    spec = spec_of(
        JudgeRewardSpec,
        {
            "mode": mode.value,
            "template": template,
            "rubric_column": rubric_column,
            "endpoint": {"base_url": base_url, "model": model, "api_key_env": api_key_env},
        },
        settings or [],
        command="dar judge",
    )

    rows = rows_of(read_table(file), where=str(file))
    needed = ["completion"] if mode is JudgeMode.pointwise else ["completion_a", "completion_b"]
    _require(rows, ["prompt", *needed], rubric_column, file)
    results = _judged(spec, rows, needed)
    if as_json:
        for result in results:
            print_json(result, indent=None)
    else:
        Console().print(_summary(results, file))
    if any("failed" in result for result in results):
        raise typer.Exit(1)


def _require(rows: Sequence[Mapping[str, Any]], texts: Sequence[str], rubric: str | None, file: Path) -> None:
    """Raises DataError where a row lacks a column, or has something else for a text."""
    from dar.data.messages import text_of

    columns = [*texts, *([rubric] if rubric else [])]
    for number, row in enumerate(rows):
        if missing := [name for name in columns if name not in row]:
            raise DataError(f"{file}: row {number} has no {' and no '.join(missing)}; it has {', '.join(row)}")
        for name in texts:
            text_of(row[name], f"{file}: row {number}: {name}")


def _judged(spec: JudgeRewardSpec, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """One result per row: what a machine may want to know of it."""
    from dar.judge import Judge, PairItem, ScoreItem
    from dar.rewards.builtin import completion_text

    judge, is_pointwise = Judge(spec), spec.mode == "pointwise"
    items: list[Any] = [
        (ScoreItem if is_pointwise else PairItem)(
            row["prompt"],
            *(completion_text(row[name]) for name in columns),
            rubric=None if spec.rubric_column is None else row[spec.rubric_column],
            row={name: value for name, value in row.items() if name not in ("prompt", *columns)},
        )
        for row in rows
    ]
    return [_shown(found) for found in (judge.score(items) if is_pointwise else judge.compare(items))]


def _shown(found: Score | Preference | Failed) -> dict[str, Any]:
    from dar.judge import Score
    from dar.rewards import Failed

    if isinstance(found, Failed):
        return {"failed": found.reason}
    if isinstance(found, Score):
        return {"score": found.value, "mass": found.mass, "answer": found.text}
    answers = [found.forward.text, found.backward.text]
    return {"winner": found.winner, "share_a": found.share, "agrees": found.agrees, "answers": answers}


def _summary(results: Sequence[Mapping[str, Any]], file: Path) -> Table:
    found = [result for result in results if "failed" not in result]
    table = new_table(f"{file}: {len(results)} rows", "", "", is_text=True)
    table.add_row("failed", str(len(results) - len(found)))
    for reason in {result["failed"]: None for result in results if "failed" in result}:
        table.add_row("", reason)
    if not found:
        return table
    if "score" in found[0]:
        scores = sorted(result["score"] for result in found)
        masses = [result["mass"] for result in found if result["mass"] is not None]
        table.add_row("mean score", f"{sum(scores) / len(scores):.3f}")
        table.add_row("lowest, median, highest", f"{scores[0]:.3f}, {scores[len(scores) // 2]:.3f}, {scores[-1]:.3f}")
        table.add_row("from log-probabilities", f"{len(masses)} of {len(found)}")
        if masses:
            table.add_row("probability of scores seen", f"{sum(masses) / len(masses):.3f}")
        return table
    for winner in ("a", "b", "tie"):
        count = sum(result["winner"] == winner for result in found)
        table.add_row(winner if winner == "tie" else f"{winner} wins", f"{count} ({count / len(found):.0%})")
    contradicted = sum(not result["agrees"] for result in found)
    table.add_row("orders that contradict each other", f"{contradicted} ({contradicted / len(found):.0%})")
    return table
