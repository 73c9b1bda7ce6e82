"""Trains on a cluster of several logical nodes while processes and nodes are killed, again and again.

    python benchmarks/cluster_soak.py OUT [--minutes 30] [--steps 60] [--seed 0]

The toy recipe runs once in this process, undisturbed. Then it runs on Ray (a head and two further nodes on this
machine; one learner, two samplers, two reward workers), over and over until the minutes are gone, and at random
moments a sampler, a reward worker, the learner or a whole node is killed. Every run must end with the weights of the
undisturbed one, bit for bit, and with its metrics (times and memory apart). Between two deaths there is
at least one step, however slowly a machine starts processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from random import Random
from typing import Any

# Before Ray is imported: all of it on the loopback interface.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import ray
from ray.cluster_utils import Cluster

from dar.assembly.loop import build_loop
from dar.assembly.training import run_loop
from dar.cluster.start import train_on_cluster
from dar.config.recipe import load_recipe
from dar.config.run import RunSpec

KINDS = ("Sampler", "RewardWorker", "Learner", "node")
NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 200 * 2**20}


class Killer:
    """Kills something every so often. In the main thread: only there can nodes be added.

    kills: how many of each kind.
    """

    def __init__(self, cluster: Cluster, nodes: list[Any], seed: int) -> None:
        self.cluster, self.nodes, self.random = cluster, nodes, Random(seed)
        self.kills: Counter[str] = Counter()

    def kill_until(self, run: Future[Any], lines: Path) -> None:
        """Until the run ends, which writes its metrics to `lines`."""
        size = 0
        while not wait([run], timeout=self.random.uniform(5, 55)).done:
            if not lines.is_file() or lines.stat().st_size == size:
                continue
            size = lines.stat().st_size
            kind = self.random.choice(KINDS)
            if kind == "node":
                node = self.nodes.pop(self.random.randrange(len(self.nodes)))
                self.cluster.remove_node(node, allow_graceful=False)
                self.nodes.append(self.cluster.add_node(**NODE))
            elif found := processes_of(kind):
                self.random.choice(found).send_signal(signal.SIGKILL)
            else:
                continue
            self.kills[kind] += 1
            print(f"killed a {kind}", flush=True)


def processes_of(kind: str) -> list[psutil.Process]:
    """The actors of a class among this process's descendants, in the order they were started."""
    found = [each for each in psutil.Process().children(recursive=True) if f"ray::{kind}" in title(each)]
    return sorted(found, key=lambda each: each.pid)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended


def recipe(out: Path, steps: int) -> RunSpec:
    changes = [f"output_dir={out}", f"steps={steps}", "checkpoint.every=5", "sampling.prompts_per_request=8"]
    cluster = ["cluster.samplers=2", "cluster.reward_workers=2", "cluster.restarts=1000", "cluster.patience=3000"]
    return load_recipe("toy", [*changes, *cluster])


def outcome(out: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The trained weights, and every line of metrics but times, memory and what is said of the cluster."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not re.search("time|^memory/|^cluster/", key)}
            for line in lines]  # fmt: skip
    return (out / "model" / "model.safetensors").read_bytes(), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    alone = given.out / "undisturbed"
    run_loop(build_loop(recipe(alone, given.steps), quiet=True, overwrite=True), resume=False, command="")
    expected = outcome(alone)

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    killer, started, num_runs, num_again = Killer(cluster, nodes, given.seed), time.monotonic(), 0, 0
    with ThreadPoolExecutor(1) as thread:
        while (seconds := time.monotonic() - started) < given.minutes * 60:
            out = given.out / f"run-{num_runs}"
            settings = {"resume": False, "overwrite": True, "quiet": True, "command": ""}
            run = thread.submit(train_on_cluster, recipe(out, given.steps), **settings)
            killer.kill_until(run, out / "metrics.jsonl")
            num_runs += 1
            num_again += int(sum(line.get("cluster/asked_again", 0) for line in run.result().metrics))
            assert outcome(out) == expected, f"{out} is not {alone}"
            print(f"{time.monotonic() - started:.0f} s: {num_runs} runs, killed {dict(killer.kills)}", flush=True)
    found = {"minutes": round(seconds / 60, 1), "runs": num_runs, "steps": num_runs * given.steps}
    print(json.dumps({**found, "killed": dict(killer.kills), "asked_again": num_again, "equal": True}))
    ray.shutdown()
    cluster.shutdown()


main()
