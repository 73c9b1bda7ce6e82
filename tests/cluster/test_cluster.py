"""Runs on Ray: the numbers of a single process, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pyarrow.parquet
import pytest

from dar.assembly.loop import build_loop
from dar.assembly.training import run_loop
from dar.cluster.start import train_on_cluster
from dar.config.recipe import load_recipe

# Before Ray is imported: all of it on the loopback interface, and no less important than other tests.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
ray = pytest.importorskip("ray", reason="runs on a cluster need the extra ray")

NODE: dict[str, Any] = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
REWARD = '''
import sys

class Vowels:
    """Counts its calls, which a worker's death must not make it tell of twice."""

    calls = 0

    def __call__(self, completions, finish_reasons):
        self.calls += 1
        return [float(sum(map(text.count, "aeiou"))) for text in texts(completions)]

    def metrics(self):
        found, self.calls = self.calls, 0
        return {"calls": float(found)}

def texts(completions):
    return [each[0]["content"] for each in completions]

vowels = Vowels()

class Logging(Vowels):
    def __call__(self, completions, finish_reasons, log_extra, log_metric, trainer_state):
        log_metric("before", trainer_state.global_step / trainer_state.max_steps)
        log_extra("words", [len(text.split()) for text in texts(completions)])
        return super().__call__(completions, finish_reasons)

logging = Logging()

class Failing(Vowels):
    seen = 0

    def __call__(self, completions):
        self.seen += 1
        if self.seen > 4:
            raise KeyError("no such letter")
        return super().__call__(completions, None)

failing = Failing()
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, list[Any]]]:
    """A head node and another, on this machine, and the latter."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes = [found.add_node(**NODE)]
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found, nodes
    ray.shutdown()
    found.shutdown()


def actors(kind: str) -> list[psutil.Process]:
    """Of a class, among this process's descendants."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            found += [each] if f"ray::{kind}" in " ".join(each.cmdline()) else []
        except psutil.Error:
            continue  # it has just ended
    return sorted(found, key=lambda each: each.pid)


def numbers(folder: Path) -> list[dict[str, float]]:
    """Every line of metrics but times, memory and what is said of the cluster."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if not re.search("time|^memory/|^cluster/", key)} for row in rows]


def test_run_is_that_of_one_process_whoever_is_killed(
    write_recipe: Callable[..., Path], tmp_path: Path, cluster: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "letters.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(
        rewards=[{"type": "length", "target": 4}, "letters.py:logging"],
        data={"train": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")},
        prompts_per_step=4,
        steps=9,
        sampling={"max_completion_length": 8, "prompts_per_request": 1},
        checkpoint={"every": 2},
        cluster={"samplers": 2, "reward_workers": 2, "patience": 3000.0},
    )
    alone, together = tmp_path / "alone", tmp_path / "together"
    spec = load_recipe(recipe, [f"output_dir={alone}", "cluster=null"])
    run_loop(build_loop(spec, quiet=True), resume=False, command="")

    found, nodes = cluster
    spec = load_recipe(recipe, [f"output_dir={together}"])
    # Nodes can be added in the main thread alone.
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(train_on_cluster, spec, resume=False, quiet=True, command="")
        for index, kind in enumerate(["Sampler", "RewardWorker", "Learner", "node"]):
            while not (together / "metrics.jsonl").is_file() or len(numbers(together)) < 2 * index + 2:
                assert not run.done(), run.result()
                time.sleep(0.02)
            if kind == "node":
                found.remove_node(nodes.pop(), allow_graceful=False)
                nodes.append(found.add_node(**NODE))
            else:
                Random(index).choice(actors(kind)).send_signal(signal.SIGKILL)
        result = run.result()
    assert result.steps == 9
    assert numbers(together) == numbers(alone)
    assert numbers(alone)[-1]["eval/rewards/logging/before"] == 1.0
    tables = [pyarrow.parquet.read_table(folder / "completions/heldout-step-9.parquet") for folder in (alone, together)]
    words, texts = tables[0]["extra/logging/words"].to_pylist(), tables[0]["completion"].to_pylist()
    assert words == tables[1]["extra/logging/words"].to_pylist() == [len(text.split()) for text in texts]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (alone, together)]
    assert weights[0] == weights[1]
    assert {key: len(each) for key, each in environment(together).items() if key != "run"} == {
        "learners": 1,
        "samplers": 2,
        "reward_workers": 2,
    }


def environment(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "environment.json").read_text())["cluster"]


def test_two_learners_on_a_cluster_of_their_own_and_an_error_of_a_reward(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    """Two steps are one process's up to rounding; in the third the reward raises."""
    (tmp_path / "more_letters.py").write_text(REWARD)
    recipe = write_recipe(rewards=["more_letters.py:failing"], prompts_per_step=3, steps=4)
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = [sys.executable, "-m", "dar", "train", str(recipe)]
    changes = [f"output_dir={together}", "cluster.learners=2", "cluster.patience=3000"]
    ended = subprocess.run(
        [*command, *changes, "--cluster", "local"], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(
        r"dar \(RewardError\): reward 'failing' raised KeyError: 'no such letter' "
        r"\(more_letters.py, line \d+, in __call__\)\n",
        ended.stderr,
    ), ended.stderr
    assert "saved after step 2; continue with --resume" in ended.stdout
    spec = load_recipe(recipe, [f"output_dir={alone}", "steps=2", f"rewards.0={tmp_path}/more_letters.py:vowels"])
    run_loop(build_loop(spec, quiet=True), resume=False, command="")
    for one, other in zip(numbers(alone), numbers(together), strict=True):
        renamed = {key.replace("failing", "vowels"): value for key, value in other.items()}
        assert renamed == pytest.approx(one, rel=1e-3, abs=1e-5)
