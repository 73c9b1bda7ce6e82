"""Runs of one recipe: what is missing is trained, each run in its own process, one or several at a time."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import torch

from dar.compare.arms import Arm
from dar.config.recipe import load_recipe
from dar.config.run import RunSpec
from dar.console import about
from dar.errors import CheckpointError, ConfigError
from dar.record.alerts import Alert
from dar.record.folder import RunFolder
from dar.report.run import load_run
from dar.run.stopping import signals_handled

# Its children are copies of one process that has imported torch once, which takes as long as many a short run.
_PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Outcome:
    """A run that was made, or tried.

    error: the last lines it wrote, where it failed.
    stopped_by: the alert of its recipe that ended it early; what it had become by then is its result.
    """

    arm: Arm
    seed: int
    folder: Path
    learning_rate: float
    error: str | None = None
    stopped_by: Alert | None = None

    @property
    def is_finished(self) -> bool:
        return self.error is None


@dataclass(frozen=True, eq=False)
class _Job:
    """A run that is asked for, as it is when it is finished. overrides: that make the recipe the `spec`."""

    run: Outcome
    overrides: tuple[str, ...]
    spec: RunSpec
    label: str

    @property
    def log(self) -> Path:
        return self.run.folder.with_name(f"{self.run.folder.name}.log")


def run_all(
    recipe: Path,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path,
    note: Callable[[str], None],
    watch: Callable[[str], None] = lambda text: None,
    *,
    num_parallel: int = 1,
) -> list[Outcome]:
    """Trains what is not finished yet, each run in its own process.

    The folders are `OUT/<arm>-seed<n>`. A run that was interrupted is resumed, one that an alert of its recipe
    stopped is done (until the recipe's alerts change), and one that fails is reported and does not stop the others.

    Args:
        recipe: a YAML file.
        overrides: for every run.
        arms, seeds: every combination is run.
        out: folder of the runs.
        note: told what happens.
        watch: told every few seconds how far it has come, and about how long it will still take.
        num_parallel: runs at a time; of several each has an equal share of the processor's cores.

    Raises:
        ConfigError: the recipe cannot be run with one of the methods, or a folder holds a run of another recipe;
            nothing has been started then.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the runs that were going on have been stopped.
    """
    jobs = _jobs(recipe, overrides, arms, seeds, out)
    outcomes: dict[_Job, Outcome] = {}
    for job in jobs:
        if _is_finished(job):
            note(f"{job.label}: finished before")
            outcomes[job] = job.run
        elif alert := _stopped_by(job):
            note(f"{job.label}: stopped before, {_reason(alert)}")
            outcomes[job] = replace(job.run, stopped_by=alert)
    waiting = [job for job in jobs if job not in outcomes]
    still, running, asked, begun = len(waiting), dict[_Job, _Training](), list[str](), time.monotonic()

    def pace() -> str:
        """The time so far and what is left if all take equally long."""
        done = still - len(waiting) - len(running) + sum(each.step / job.spec.steps for job, each in running.items())
        elapsed = time.monotonic() - begun
        left = f", about {about(elapsed / done * (still - done))} left" if done else ""
        return f"{about(elapsed)} so far{left}"

    def stop(name: str) -> None:
        asked.append(name)
        # A terminal's Ctrl-C reaches the runs as well, and a second signal would keep them from saving.
        if name == "SIGTERM":
            for training in running.values():
                training.process.terminate()

    try:
        with signals_handled(stop):
            while running or (waiting and not asked):
                while waiting and len(running) < num_parallel and not asked:
                    job = waiting.pop(0)
                    note(f"{job.label}: {job.run.folder}")
                    running[job] = _Training(recipe, job, num_parallel)
                wait([each.process.sentinel for each in running.values()], timeout=2)
                for job in [job for job, training in running.items() if training.has_ended]:
                    training = running.pop(job)
                    if training.was_interrupted and not asked:  # it alone; none is started after that
                        stop("SIGTERM")
                    outcomes[job] = _result(job, training, note)
                    if (waiting or running) and not asked:
                        note(f"{len(waiting) + len(running)} more to train: {pace()}")
                shown = [f"{job.label}: step {each.step}/{job.spec.steps}" for job, each in running.items()]
                watch("; ".join([*shown, pace()]))
    except KeyboardInterrupt:
        for training in running.values():
            training.process.kill()
        raise
    if asked:
        raise KeyboardInterrupt
    return [outcomes[job] for job in jobs]


def _jobs(recipe: Path, overrides: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[_Job]:
    """Every combination. Raises ConfigError where one of them cannot be run."""
    own_method = load_recipe(recipe, overrides).algorithm.type
    jobs, total = list[_Job](), len(arms) * len(seeds)
    for arm in arms:
        method = [] if arm.method == own_method else [f"algorithm={arm.method}"]
        for seed in seeds:
            folder = out / f"{arm.label}-seed{seed}"
            changes = (*overrides, *method, *arm.changes, f"seed={seed}", f"output_dir={folder}")
            spec = load_recipe(recipe, changes)
            if spec.data.heldout is None or not spec.rewards:
                raise ConfigError(f"{recipe} needs data.heldout and rewards: there is nothing to compare runs by")
            if spec.hub is not None:
                raise ConfigError(f"each run would upload to {spec.hub.repository}: add hub=null, and push one later")
            _require_same_recipe(folder, spec)
            label = f"[{len(jobs) + 1}/{total}] {arm.label}, seed {seed}"
            jobs.append(_Job(Outcome(arm, seed, folder, spec.optim.learning_rate), changes, spec, label))
    return jobs


class _Training:
    """A run that is started or resumed in a process of its own, which writes to its log."""

    def __init__(self, recipe: Path, job: _Job, num_parallel: int) -> None:
        self.folder, self.started = RunFolder(job.run.folder), time.monotonic()
        job.run.folder.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if job.run.folder.exists() else []
        share = max(1, torch.get_num_threads() // num_parallel)
        line = ["train", str(recipe), *job.overrides, *resume]
        _PROCESSES.set_forkserver_preload(["dar.assembly.loop", "dar.report.record"])
        self.process = _PROCESSES.Process(target=_train, args=(line, job.log, dict(os.environ), share))
        self.process.start()

    @property
    def step(self) -> int:
        """The last one it has finished."""
        return max((row["step"] for row in self.folder.metrics()), default=0)

    @property
    def has_ended(self) -> bool:
        return self.process.exitcode is not None

    @property
    def was_interrupted(self) -> bool:
        return self.process.exitcode in (130, -signal.SIGINT, -signal.SIGTERM)


def _train(line: Sequence[str], log: Path, environment: Mapping[str, str], num_threads: int) -> None:
    """`python -m dar LINE` in this process, its output added to the log. Raises SystemExit with its exit code."""
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(stream, standard)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(num_threads)
    sys.argv[1:] = line
    runpy.run_module("dar", run_name="__main__", alter_sys=True)


def _result(job: _Job, training: _Training, note: Callable[[str], None]) -> Outcome:
    """What became of a run that has ended."""
    if training.was_interrupted:
        note(f"{job.label}: interrupted")
        return replace(job.run, error="interrupted")
    if training.process.exitcode not in (0, 3):
        error = "\n".join(job.log.read_text(encoding="utf-8").splitlines()[-5:])
        note(f"{job.label} failed ({job.log}):\n{error}")
        return replace(job.run, error=error)
    alert, took = _stopped_by(job), about(time.monotonic() - training.started)
    note(f"{job.label}: " + (f"stopped {_reason(alert)}" if alert else f"finished after {took}"))
    return replace(job.run, stopped_by=alert)


def _require_same_recipe(folder: Path, spec: RunSpec) -> None:
    """Raises ConfigError where a run that would be kept or resumed is of another recipe than is asked for now."""
    run = RunFolder(folder)
    if not run.has_steps:
        return
    try:
        run.require_same_recipe(spec, allow_changes=False)
    except CheckpointError as error:
        raise ConfigError(f"{error}\nTo compare with the new settings, choose another --out.") from error


def _is_finished(job: _Job) -> bool:
    """The run has taken its last step and saved its model."""
    run = RunFolder(job.run.folder)
    return run.model.is_dir() and run.is_evaluated(job.spec.steps)


def _stopped_by(job: _Job) -> Alert | None:
    """The alert that ended the run, if one did; none where other alerts are asked for now, under which it goes on."""
    if not RunFolder(job.run.folder).is_run:
        return None
    run = load_run(job.run.folder)
    return run.stopped_by if run.spec.alerts == job.spec.alerts else None


def _reason(alert: Alert) -> str:
    return f"after step {alert.step} by the alert {alert.rule}: {alert.message}"
