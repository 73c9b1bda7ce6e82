"""How `dar eval` shows its figures: tables for people, JSON for machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from dar.console import Console, new_table
from dar.evaluate.agreement import Accuracy, Agreement
from dar.evaluate.benchmarks import Share
from dar.evaluate.length_controlled import LengthControlled
from dar.evaluate.mt_bench.scores import MeanRating, MTBench
from dar.evaluate.preference_files import LabeledPairs
from dar.evaluate.win_rate import WinRate
from dar.record.intervals import Interval


def win_rate_json(result: WinRate, controlled: LengthControlled | None) -> dict[str, Any]:
    """AlpacaEval's names where the meaning is AlpacaEval's."""
    overall = result.overall
    found: dict[str, Any] = {
        "win_rate": overall.win_rate,
        "win_rate_interval": result.bootstrap,
        "standard_error": result.standard_error,
        "discrete_win_rate": overall.discrete_win_rate,
        "discrete_win_rate_interval": overall.wilson,
        "n_wins": overall.wins,
        "n_wins_base": overall.losses,
        "n_draws": overall.ties,
        "n_total": overall.num_pairs,
        "n_failed": result.num_failed,
    }
    if controlled is not None:
        found |= {
            "length_controlled_winrate": controlled.win_rate,
            "length_controlled_interval": controlled.bootstrap,
            "length_controlled_standard_error": controlled.standard_error,
            "lc_standard_error": controlled.lc_standard_error,
            "length_controlled_fit": {
                name: getattr(controlled, name) for name in ("theta", "phi", "psi", "strength", "has_gamed_rows")
            },
        }
    whole = dataclasses.asdict(result)
    return found | {name: whole[name] for name in ("categories", "position", "length")}


def agreement_json(result: Agreement, labeled: LabeledPairs) -> dict[str, Any]:
    found: dict[str, Any] = dataclasses.asdict(result) | {"num_skipped": len(labeled.skipped)}
    subsets = {name: {"chosen": chosen, "longer": longer} for name, (chosen, longer) in found["subsets"].items()}
    return found | {"subsets": subsets}


def print_win_rate(console: Console, title: str, result: WinRate, controlled: LengthControlled | None) -> None:
    table = new_table(title, "", "%", "95 % interval")
    overall = result.overall
    table.add_row("win rate", f"{overall.win_rate:.2f}", f"{_interval(result.bootstrap)} bootstrap")
    table.add_row("discrete win rate", f"{overall.discrete_win_rate:.2f}", f"{_interval(overall.wilson)} Wilson")
    if controlled is not None:
        table.add_row("length-controlled", f"{controlled.win_rate:.2f}", f"{_interval(controlled.bootstrap)} bootstrap")
    if result.standard_error is not None:
        table.add_row("standard error", f"{result.standard_error:.2f}", "")
    console.print(table)
    failed = f"; {result.num_failed} pairs were not judged and are left out" if result.num_failed else ""
    console.print(f"{overall.wins} wins, {overall.ties} ties, {overall.losses} losses{failed}")
    if controlled is not None:
        console.print(_fit_in_words(controlled))
    if result.categories:
        table = new_table("by category", "", "win rate %", "95 % Wilson", "wins", "ties", "losses")
        for name, row in result.categories.items():
            counts = (str(number) for number in (row.wins, row.ties, row.losses))
            table.add_row(name, f"{row.win_rate:.2f}", _interval(row.wilson), *counts)
        console.print(table)
    _print_position(console, result)
    _print_length(console, result)


def print_agreement(console: Console, title: str, result: Agreement, labeled: LabeledPairs) -> None:
    table = new_table(title, "", "accuracy %", "95 % Wilson", "agreement %", "Cohen κ", "pairs")
    rows = [("longer wins (characters)", result.longer), ("shorter wins (characters)", result.shorter)]
    for name, row in ([("choices", result.chosen)] if result.chosen is not None else []) + rows:
        table.add_row(name, *_accuracy_cells(row), str(row.num_pairs))
    if result.orders is not None:
        table.add_row("first shown first", *_accuracy_cells(result.orders.first_first), str(result.orders.num_pairs))
        table.add_row("second shown first", *_accuracy_cells(result.orders.second_first), str(result.orders.num_pairs))
    console.print(table)
    if result.annotators is not None:
        people = result.annotators
        console.print(
            f"{people.num_annotators} annotators agree with each other on {people.agreement:.1f} % of pairs, Cohen κ "
            f"{_number(people.kappa, '.3f')} (means over pairs of annotators)",
        )
    if result.orders is not None:
        console.print(f"the two orders give different outcomes for {result.orders.disagreement:.1f} % of pairs")
    for number, what in (
        (len(labeled.skipped), "rows were skipped: their two prompts differ"),
        (result.num_unlabeled, "pairs have no majority of annotators and are left out"),
        (result.num_unchosen, "pairs have no choice and are left out"),
    ):
        if number:
            console.print(f"{number} {what}")
    if result.subsets:
        table = new_table("by subset", "", "accuracy %", "95 % Wilson", "longer (characters) wins %", "pairs")
        for name, (chosen, longer) in result.subsets.items():
            cells = ("", "") if chosen is None else _accuracy_cells(chosen)[:2]
            table.add_row(name, *cells, _number(longer.accuracy, ".1f"), str(longer.num_pairs))
        console.print(table)


def print_mt_bench(console: Console, title: str, result: MTBench) -> None:
    caption = "ratings from 1 to 10 ± standard error over questions"
    table = new_table(title, "", "both turns", "first turn", "second turn", "rated", "not rated", caption=caption)
    for name, row in {"overall": result.overall, **result.categories}.items():
        scores = (_score(score) for score in (row.both, row.first, row.second))
        table.add_row(name, *scores, str(row.both.num_ratings), str(row.both.num_failed))
    console.print(table)
    for number, what in (
        (result.num_unreadable, "answers of the judge hold no rating"),
        (result.num_unanswered, "requests got no answer from the judge: the same command asks again"),
    ):
        if number:
            console.print(f"{number} {what}; what is not rated is left out of the means")


def _score(score: MeanRating) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.2f}"
    return "–" if score.mean is None else f"{score.mean:.2f}{error}"


def _fit_in_words(controlled: LengthControlled) -> str:
    terms = [f"θ = {controlled.theta:+.3f}"]
    terms.append(
        "no length term (all differences are equal)" if controlled.phi is None else f"φ = {controlled.phi:+.3f}"
    )
    terms.append(
        "no difficulty term (no --instruction-difficulty)" if controlled.psi is None else f"ψ = {controlled.psi:+.3f}"
    )
    gamed = ", regularized by gamed baselines" if controlled.has_gamed_rows else ""
    return f"length-controlled: {', '.join(terms)}; L1 penalty with C = {controlled.strength:.3g}{gamed}"


def _print_position(console: Console, result: WinRate) -> None:
    if result.position is None:
        console.print("position bias: not known, the judgements do not say which completion was shown first")
        return
    text = f"position bias: the completion shown first wins {result.position.first_shown_win_rate:.1f} %"
    if result.position.disagreement is not None:
        text += f"; the two orders give different outcomes for {result.position.disagreement:.1f} % of pairs"
    console.print(text)


def _print_length(console: Console, result: WinRate) -> None:
    length = result.length
    text = f"length: {length.model_length:.0f} characters on average, the baseline {length.baseline_length:.0f}"
    if length.longer_wins is not None and length.longer_wins_wilson is not None:
        wilson = f"95 % interval {_interval(length.longer_wins_wilson)}"
        text += f"; the longer one wins {length.longer_wins:.1f} % of {length.num_decided} decided pairs ({wilson})"
    console.print(text)
    table = new_table("by length difference (model less baseline, characters)", "", "win rate %", "pairs")
    for one in length.bins:
        table.add_row(f"{one.low:+d} … {one.high:+d}", f"{one.win_rate:.2f}", str(one.num_pairs))
    console.print(table)


def _accuracy_cells(row: Accuracy) -> tuple[str, str, str, str]:
    interval = "" if row.wilson is None else _interval(row.wilson)
    return _number(row.accuracy, ".1f"), interval, f"{row.agreement:.1f}", _number(row.kappa, ".3f")


def _interval(interval: Interval) -> str:
    return f"{interval.low:.1f} … {interval.high:.1f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def print_shares(console: Console, title: str, shares: dict[str, Share]) -> None:
    table = new_table(title, "", "%", "95 % Wilson", "of")
    for name, share in shares.items():
        table.add_row(name, f"{share.percent:.1f}", _interval(share.interval), str(share.n))
    console.print(table)


def print_lm_eval(console: Console, title: str, result: dict[str, Any]) -> None:
    table = new_table(title, "", "metric", "filter", "shots", "value", "± standard error", "of")
    for name, figures in result["results"].items():
        for key, value in figures.items():
            metric, is_metric, kind = key.partition(",")
            if not is_metric or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            cells = [f"{each:.4f}" if isinstance(each, float) else "–" for each in (value, error)]
            size = result["n-samples"].get(name, {}).get("effective", "–")
            table.add_row(name, metric, kind, str(result["n-shot"].get(name, "–")), *cells, str(size))
    console.print(table)
