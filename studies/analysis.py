"""From runs to rows, and from rows to verdicts.

    python -m studies.analysis rows toy studies/results/toy.csv runs/study/confirm/comparison.json
    python -m studies.analysis rows tables studies/results/tables.csv tables.json
    python -m studies.analysis verdicts studies/results/toy.csv

A row is one run: what it reaches at each drift. Rows are committed, runs are not.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dar.report.run import load_run
from studies.frontier import BUDGETS, Array, Comparison, area, at_drift, best_within, compare, estimate, gao, holm

FURTHEST = {"tables": 4.0}
"""KL up to which areas are taken, where it is not 8 nats."""
RIVALS = ("grpo", "rloo", "online_dpo", "tpo", "pmd_mean", "best_of_n")
QUESTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a: α": ("area", "dar", ("alpha_0", "alpha_0.3", "alpha_1")),
    "a: gold by α": ("gold_4", "dar", ("alpha_0", "alpha_0.3", "alpha_1")),
    "c: regression, policy gradient": ("area", "dar", ("dao", "dual_ppo")),
    "d: half the completions": ("area", "half", RIVALS),
    "e: missing EOS": ("cut_off_4", "dar", RIVALS),
    "e: gold": ("gold_4", "dar", RIVALS),
    "f: settings": (
        "area",
        "dar",
        ("beta_0.05", "beta_2", "clip_1", "clip_inf", "dar_group", "dar_centered", "adaptive_kl"),
    ),
    "g: equal KL": ("area", "dar", RIVALS),
}
"""By question: the outcome, the arm that is compared, and those it is compared with."""
Row = dict[str, Any]


def outcomes(task: str, kls: Sequence[float], rewards: Sequence[float], **others: Sequence[float]) -> Row:
    """What the protocol reads from one run's checkpoints. others: by name, what may fall again with the KL."""
    found: Row = {"area": area(kls, rewards, FURTHEST.get(task, BUDGETS[-1])), "kl_end": kls[-1]}
    columns = {"reward": best_within(kls, rewards, BUDGETS)}
    columns |= {name: at_drift(kls, values, BUDGETS) for name, values in others.items()}
    for name, values in columns.items():
        found |= {f"{name}_{budget:g}": value for budget, value in zip(BUDGETS, values, strict=True)}
    golds = np.array(others["gold"])
    a, b, peak = gao(np.array(kls[1:]), golds[1:] - golds[0])
    return found | {"gao_a": a, "gao_b": b, "gao_peak": peak}


def table_rows(path: Path) -> Iterator[Row]:
    """Of `studies.tabular confirm`; a run that broke has the outcomes of the policy it began with."""
    for run in json.loads(path.read_text()):
        kls, proxy, gold = ([0.0, 0.0],) * 3 if run["failed"] else (run["kl"], run["proxy"], run["gold"])
        named = {"method": run["method"], "seed": run["seed"], "failed": int(bool(run["failed"]))}
        yield named | outcomes("tables", kls, proxy, gold=gold)


def run_rows(task: str, path: Path) -> Iterator[Row]:
    """Of a `dar compare`, likewise."""
    summary = json.loads(path.read_text())
    for run in [*summary["runs"], *summary["failed"]]:
        has_failed = "error" in run
        kept = load_run(run.get("folder", path.parent / f"{run['method']}-seed{run['seed']}")).evaluations
        lines = [kept[0], kept[0]] if has_failed else kept
        names = ("kl/ref", "reward", "gold", "completions/clipped_ratio")
        kls, rewards, golds, cut_off = ([float(line[name]) for line in lines] for name in names)
        named = {"method": run["method"], "seed": run["seed"], "failed": int(has_failed)}
        yield named | outcomes(task, kls, rewards, gold=golds, cut_off=cut_off)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def read_rows(path: Path) -> dict[str, dict[str, Array]]:
    """Of each method each outcome's values in the order of seeds. Raises ValueError where methods differ in seeds."""
    with path.open(encoding="utf-8") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["seed"]))
    methods = {row["method"]: [each for each in rows if each["method"] == row["method"]] for row in rows}
    seeds = {name: [row["seed"] for row in own] for name, own in methods.items()}
    if len({*map(tuple, seeds.values())}) != 1:
        raise ValueError(
            f"{path}: not every method has every seed: { {name: len(own) for name, own in seeds.items()} }"
        )
    return {
        name: {key: np.array([float(row[key]) for row in own]) for key in own[0] if key not in ("method", "seed")}
        for name, own in methods.items()
    }


def answers(methods: Mapping[str, Mapping[str, Array]], rng: np.random.Generator) -> dict[str, dict[str, Comparison]]:
    """Each question's comparisons of the methods that were run, p adjusted by Holm within the question."""
    found: dict[str, dict[str, Comparison]] = {}
    for question, (outcome, first, others) in QUESTIONS.items():
        is_measured = first in methods and outcome in methods[first]
        present = [other for other in others if is_measured and other in methods]
        against = {other: compare(methods[first][outcome], methods[other][outcome], rng) for other in present}
        adjusted = holm({other: each.p for other, each in against.items()})
        found[question] = {other: replace(each, adjusted=adjusted[other]) for other, each in against.items()}
    return found


def verdict(found: Comparison) -> str:
    """ahead, behind, or what could not be told apart, by the protocol's rule."""
    if found.adjusted < 0.05 and found.difference.low > 0:
        return "more"
    if found.adjusted < 0.05 and found.difference.high < 0:
        return "less"
    return "undecided"


def print_tables(methods: Mapping[str, Mapping[str, Array]]) -> None:
    """Markdown: every method's outcomes, then every question's comparisons."""
    rng = np.random.default_rng(0)
    measured = next(iter(methods.values()))
    wanted = ["area", *(f"reward_{budget:g}" for budget in BUDGETS), "gold_4", "cut_off_4", "kl_end"]
    shown = [key for key in wanted if key in measured]
    print("| method | " + " | ".join(shown) + " | area's deviation | failed |\n|---|" + "---:|" * (len(shown) + 2))
    for name, own in sorted(methods.items(), key=lambda item: -float(item[1]["area"].mean())):
        cells = [str(estimate(own["area"], rng)), *(f"{estimate(own[key], rng).value:.3g}" for key in shown[1:])]
        spread = f"{own['area'].std(ddof=1) / abs(own['area'].mean()):.1%}"
        print(f"| `{name}` | " + " | ".join(cells) + f" | {spread} | {own['failed'].mean():.0%} |")
    for question, against in answers(methods, rng).items():
        outcome, first, _ = QUESTIONS[question]
        if against:
            print(f"\n**{question}** ({outcome} of `{first}` less the other's)\n")
            print("| other | difference | P(improvement) | p, Holm | |\n|---|---:|---:|---:|---|")
        for other, each in against.items():
            print(f"| `{other}` | {each.difference} | {each.improvement} | {each.adjusted:.2g} | {verdict(each)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("task", choices=["tables", "toy", "sentiment"])
    rows.add_argument("out", type=Path)
    rows.add_argument("runs", type=Path)
    commands.add_parser("verdicts").add_argument("rows", type=Path)
    asked = parser.parse_args()
    if asked.command == "rows":
        found = table_rows(asked.runs) if asked.task == "tables" else run_rows(asked.task, asked.runs)
        write_rows([*found], asked.out)
    else:
        print_tables(read_rows(asked.rows))


if __name__ == "__main__":
    sys.exit(main())
