"""Runs of one recipe: what is missing is trained, one run after another, each in its own process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dar.compare.arms import Arm
from dar.config.recipe import load_recipe
from dar.config.run import RunSpec
from dar.console import about
from dar.errors import CheckpointError, ConfigError
from dar.record.alerts import Alert
from dar.record.folder import RunFolder
from dar.report.run import load_run
from dar.run.stopping import signals_handled


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


@dataclass(frozen=True)
class _Job:
    """A run that is asked for, as it is when it is finished. overrides: that make the recipe the `spec`."""

    run: Outcome
    overrides: tuple[str, ...]
    spec: RunSpec

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
) -> list[Outcome]:
    """Trains what is not finished yet, one run after another, each in its own process.

    The folders are `OUT/<arm>-seed<n>`. A run that was interrupted is resumed, one that an alert of its recipe
    stopped is done (until the recipe's alerts change), and one that fails is reported and does not stop the others.

    Args:
        recipe: a YAML file.
        overrides: for every run.
        arms, seeds: every combination is run.
        out: folder of the runs.
        note: told what happens.
        watch: told every few seconds how far it has come, and about how long it will still take.

    Raises:
        ConfigError: the recipe cannot be run with one of the methods, or a folder holds a run of another recipe;
            nothing has been started then.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run that was going on has been stopped.
    """
    jobs = _jobs(recipe, overrides, arms, seeds, out)
    still = sum(not _is_finished(job) and _stopped_by(job) is None for job in jobs)
    outcomes, trained, begun = [], 0, time.monotonic()

    def pace(part: float = 0.0) -> str:
        """The time so far and what is left if all take equally long, `part` of a further run being done."""
        done, elapsed = trained + part, time.monotonic() - begun
        left = f", about {about(elapsed / done * (still - done))} left" if done else ""
        return f"{about(elapsed)} so far{left}"

    for number, job in enumerate(jobs, start=1):
        label = f"[{number}/{len(jobs)}] {job.run.arm.label}, seed {job.run.seed}"
        if _is_finished(job):
            note(f"{label}: finished before")
            outcomes.append(job.run)
        elif alert := _stopped_by(job):
            note(f"{label}: stopped before, {_reason(alert)}")
            outcomes.append(replace(job.run, stopped_by=alert))
        else:
            note(f"{label}: {job.run.folder}")
            outcomes.append(_run(recipe, job, label, note, lambda said, part: watch(f"{said}; {pace(part)}")))
            trained += 1
            if trained < still:
                note(f"{still - trained} more to train: {pace()}")
    return outcomes


def _jobs(recipe: Path, overrides: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[_Job]:
    """Every combination. Raises ConfigError where one of them cannot be run."""
    own_method = load_recipe(recipe, overrides).algorithm.type
    jobs = []
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
            jobs.append(_Job(Outcome(arm, seed, folder, spec.optim.learning_rate), changes, spec))
    return jobs


def _run(
    recipe: Path, job: _Job, label: str, note: Callable[[str], None], watch: Callable[[str, float], None]
) -> Outcome:
    steps, started = job.spec.steps, time.monotonic()
    error = _train(recipe, job, lambda step: watch(f"{label}: step {step}/{steps}", step / steps))
    if error is not None:
        note(f"{label} failed ({job.log}):\n{error}")
        return replace(job.run, error=error)
    alert, took = _stopped_by(job), about(time.monotonic() - started)
    note(f"{label}: " + (f"stopped {_reason(alert)}" if alert else f"finished after {took}"))
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


def _train(recipe: Path, job: _Job, watch: Callable[[int], None]) -> str | None:
    """Starts or resumes a run in a process of its own; the last lines of its log where it failed.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C or SIGTERM, or this process was.
    """
    job.run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dar", "train", str(recipe), *job.overrides]
    if job.run.folder.exists():
        command.append("--resume")
    asked: list[str] = []
    with (
        job.log.open("a", encoding="utf-8") as stream,
        subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT) as process,
    ):

        def stop(name: str) -> None:
            asked.append(name)
            # A terminal's Ctrl-C reaches the run as well, and a second signal would keep it from saving.
            if name == "SIGTERM":
                process.terminate()

        try:
            with signals_handled(stop):
                while (code := process.poll()) is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=2)
                    watch(max((row["step"] for row in RunFolder(job.run.folder).metrics()), default=0))
        except KeyboardInterrupt:
            process.kill()
            raise
    if asked or code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    return None if code in (0, 3) else "\n".join(job.log.read_text(encoding="utf-8").splitlines()[-5:])
