"""Engines that sample: in-process, vLLM as dar's server, vLLM offline, and transformers' generate, alternating.

    python benchmarks/engines.py --vllm-python PYTHON --json OUT

Every worker is a fresh process: it starts, samples P × K completions a few times, takes other weights, and ends. Tokens
per second are medians over the samplings of all rounds but each process's first; start-up is until the first sampling
may begin, and what that one takes longer stands beside it; memory is the most that the worker and the processes it
started held at once (pages they share are counted in each).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from common import DEMO_MODEL, chat_prompts, machine_facts, machine_limits, model_folder, tldr_prompts
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
DAR, VLLM = str(HERE / "engines_worker.py"), str(HERE / "vllm_worker.py")
ENGINES = ("in_process", "vllm_server", "vllm_offline", "transformers")


def main() -> None:
    args = parse_args()
    texts = tldr_prompts if args.prompts else chat_prompts
    prompts = texts(args.model, *([args.prompts] if args.prompts else []), args.num_prompts)  # type: ignore[operator]
    job: dict[str, Any] = {
        "model": model_folder(args.model),
        "vllm_python": str(args.vllm_python),
        "prompts": prompts,
        "num_generations": args.num_generations,
        "max_new_tokens": args.max_new_tokens,
        "precision": args.precision,
        "repeats": args.repeats,
        "threads": args.threads,
        "eager": not args.vllm_compiles,
    }
    console = Console(stderr=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.engines}
    before = machine_limits()
    for number in range(args.rounds):
        for name in args.engines:
            console.print(f"round {number + 1}: {name}")
            python, script = (args.vllm_python, VLLM) if name == "vllm_offline" else (sys.executable, DAR)
            runs[name].append(work([str(python), script], job | {"engine": name}))
    result = {
        "job": {key: value for key, value in job.items() if key not in ("prompts", "model", "vllm_python")},
        "num_prompts": len(prompts),
        "rounds": args.rounds,
        "machine": machine_facts(),
        "limits_before": before,
        "limits_after": machine_limits(),
        "summary": {name: summarize(found) for name, found in runs.items()},
        "runs": runs,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def summarize(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over all rounds; the first sampling of every process is left out of the speed."""
    later = [(t, s) for run in runs for t, s in zip(run["tokens"][1:], run["seconds"][1:], strict=True)]
    return {
        "tokens_per_second": statistics.median(tokens / seconds for tokens, seconds in later),
        "start_seconds": statistics.median(run["start"] for run in runs),
        "first_seconds_more": statistics.median(
            run["seconds"][0] - statistics.median(run["seconds"][1:]) for run in runs
        ),
        "update_seconds": statistics.median(run["update"] for run in runs),
        "peak_gb": max(run["peak_gb"] for run in runs),
    }


def work(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Runs a worker, reads the last line it prints, and watches the memory of its process tree."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, held(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate(json.dumps(job))
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[1]} failed:\n{err[-4000:]}")
    return json.loads(out.strip().splitlines()[-1]) | {"peak_gb": peak / 1e9}


def held(pid: int) -> int:
    """Resident bytes of a process and all below it."""
    total = 0
    try:
        root = psutil.Process(pid)
        for each in (root, *root.children(recursive=True)):
            try:
                total += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it ended meanwhile
    except psutil.NoSuchProcess:
        return total
    return total


def show(result: dict[str, Any]) -> None:
    job = result["job"]
    size = f"{result['num_prompts']} × {job['num_generations']} × {job['max_new_tokens']} tokens"
    table = Table(title=f"{size}, {job['precision']}", title_justify="left")
    for heading in ("", "tokens/s", "× in-process", "start s", "first sampling, more s", "weights s", "peak GB"):
        table.add_column(heading, justify="right" if heading else "left")
    summary = result["summary"]
    base = summary.get("in_process", {}).get("tokens_per_second")
    for name, row in summary.items():
        speed = row["tokens_per_second"]
        table.add_row(
            name,
            f"{speed:.0f}",
            f"{speed / base:.2f}" if base else "",
            f"{row['start_seconds']:.1f}",
            f"{row['first_seconds_more']:.1f}",
            f"{row['update_seconds']:.2f}",
            f"{row['peak_gb']:.2f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(time.strftime("%Y-%m-%d"), result["machine"]["processor"], result["limits_after"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, default=HERE.parent / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--prompts", type=Path, help="a JSONL file of posts; by default the quickstart's chat prompts")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=3, help="samplings per process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--vllm-compiles", action="store_true", help="let vLLM compile the model: minutes on a CPU, kept in its cache"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
