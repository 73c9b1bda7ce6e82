"""One step of online RLHF: dar (DAR and GRPO) against TRL's GRPOTrainer, alternating on this machine.

    python benchmarks/vs_trl.py --workload chat --json OUT
    python benchmarks/vs_trl.py --workload tldr --prompts FILE.jsonl --json OUT

The same model, prompts, completions per prompt, lengths and precision; KL to the reference on. TRL runs in an
environment of its own, made on first use. Every worker is a fresh process; its first step is left out (caches warm
up), and medians over the rest of all rounds are reported as ratios of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from common import DEMO_MODEL, chat_prompts, machine_facts, machine_limits, model_folder, tldr_prompts
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dar.files.paths import cache_root

HERE = Path(__file__).parent
TRL_PACKAGES = ("trl==1.16.0", "torch==2.13.0")
PHASES = ("rollout", "reference", "update")


def main() -> None:
    args = parse_args()
    folder = model_folder(args.model)
    prompts = (
        chat_prompts(args.model, args.num_prompts * args.steps)
        if args.workload == "chat"
        else tldr_prompts(args.model, args.prompts, args.num_prompts * args.steps)
    )
    job: dict[str, Any] = {
        "model": folder,
        "prompts": prompts,
        "num_prompts": args.num_prompts,
        "num_generations": args.num_generations,
        "max_new_tokens": args.max_new_tokens,
        "precision": args.precision,
        "steps": args.steps,
        "max_tokens_per_microbatch": args.max_tokens_per_microbatch,
        "compile_layers": args.compile_layers,
    }
    trl_python = trl_environment(args.venv)
    before = machine_limits()
    runs: dict[str, list[dict[str, Any]]] = {"dar": [], "grpo": [], "trl": []}
    console = Console(stderr=True)
    for number in range(args.rounds):
        for name in ("dar", "grpo"):
            console.print(f"round {number + 1}: dar, {name}")
            runs[name].append(work([sys.executable, str(HERE / "dar_worker.py")], job | {"algorithm": name}))
        console.print(f"round {number + 1}: TRL, grpo")
        runs["trl"].append(work([str(trl_python), str(HERE / "trl_worker.py")], job))
    result = {
        "workload": args.workload,
        "job": {key: value for key, value in job.items() if key not in ("prompts", "model")},
        "rounds": args.rounds,
        "machine": machine_facts(),
        "limits_before": before,
        "limits_after": machine_limits(),
        "summary": summarize(runs),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)
    show(result)


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over all rounds, the first step of every process left out."""
    trl_steps = [seconds for run in runs["trl"] for seconds in run["seconds"][1:]]
    trl = {
        "step_seconds": statistics.median(trl_steps),
        "all_steps": trl_steps,
        "peak_gb": max(run["peak_gb"] for run in runs["trl"]),
        "mean_length": statistics.mean(length for run in runs["trl"] for length in run["mean_length"]),
    }
    summary: dict[str, Any] = {"trl": trl}
    for name in ("dar", "grpo"):
        steps = [row for run in runs[name] for row in run["steps"][1:]]
        phases = {phase: statistics.median(row[f"time/{phase}"] for row in steps) for phase in PHASES}
        median = statistics.median(row["step_time"] for row in steps)
        peak = max(row["memory/peak_gb"] for run in runs[name] for row in run["steps"])
        summary[name] = {
            "step_seconds": median,
            "all_steps": [row["step_time"] for row in steps],
            "phases": phases,
            "rollout_tokens_per_second": statistics.median(
                row["tokens/completion"] / row["time/rollout"] for row in steps
            ),
            "skipped_fraction": statistics.median(row["rows/skipped_fraction"] for row in steps),
            "peak_gb": peak,
            "mean_length": statistics.mean(row["completions/mean_length"] for row in steps),
            "times_faster_than_trl": trl["step_seconds"] / median,
            "share_of_trl_memory": peak / trl["peak_gb"],
        }
    return summary


def show(result: dict[str, Any]) -> None:
    summary, limits = result["summary"], result["limits_after"]
    table = Table(title=f"{result['workload']}, {result['job']['precision']}", title_justify="left")
    for heading in (
        "",
        "s/step",
        "rollout",
        "reference",
        "update",
        "tok/s",
        "skipped",
        "peak GB",
        "× faster",
        "memory",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    trl = summary["trl"]
    table.add_row("TRL GRPO", f"{trl['step_seconds']:.1f}", "", "", "", "", "", f"{trl['peak_gb']:.1f}", "1", "1")
    for name, label in (("grpo", "dar GRPO"), ("dar", "dar DAR")):
        row = summary[name]
        table.add_row(
            label,
            f"{row['step_seconds']:.1f}",
            *(f"{row['phases'][phase]:.1f}" for phase in PHASES),
            f"{row['rollout_tokens_per_second']:.0f}",
            f"{row['skipped_fraction']:.0%}",
            f"{row['peak_gb']:.1f}",
            f"{row['times_faster_than_trl']:.1f}",
            f"{row['share_of_trl_memory']:.2f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(", ".join(f"{name} {value:.0f}" for name, value in limits.items()))


def plot(result: dict[str, Any], target: Path) -> None:
    """Seconds per step as bars, dar's split into phases."""
    summary = result["summary"]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.barh("TRL GRPO", summary["trl"]["step_seconds"], color="tab:gray", label="TRL, whole step")
    for name, label in (("grpo", "dar GRPO"), ("dar", "dar DAR")):
        row, left = summary[name], 0.0
        rest = row["step_seconds"] - sum(row["phases"].values())
        parts = {**row["phases"], "rest": max(rest, 0.0)}
        for (phase, seconds), colour in zip(parts.items(), ("tab:blue", "tab:orange", "tab:green", "tab:red")):
            axes.barh(label, seconds, left=left, color=colour, label=phase if name == "grpo" else None)
            left += seconds
        axes.text(left, label, f"  {row['times_faster_than_trl']:.1f} ×", va="center")
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds per step, median ({result['workload']}, {result['job']['precision']})")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(target, dpi=150)


def work(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Runs a worker and reads the last line it prints."""
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def trl_environment(folder: Path) -> Path:
    """The Python of an environment that has TRL; made if it is missing."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        constraints = HERE.parent / "constraints.txt"
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *TRL_PACKAGES],
            check=True,
        )
        (folder / ".ready").touch()
    return python


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("chat", "tldr"), required=True)
    parser.add_argument("--prompts", type=Path, help="tldr: a JSONL file (may be gzipped) with a prompt column")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--max-tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--compile-layers", action="store_true", help="dar's runtime.compile_layers")
    parser.add_argument("--steps", type=int, default=3, help="per process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--venv", type=Path, default=cache_root() / "trl-venv")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to draw it (PNG)")
    args = parser.parse_args()
    if args.workload == "tldr" and args.prompts is None:
        parser.error("--workload tldr needs --prompts FILE")
    return args


if __name__ == "__main__":
    main()
