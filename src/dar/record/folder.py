"""The run folder: everything a run writes, and the only code that knows its layout.

config.yaml  data.json  environment.json  metrics.jsonl  alerts.jsonl  completions/step-*.parquet  checkpoints/step-N/
best/  model/  of a method that triages its data triage.parquet, of a reward model evaluation.json and its pictures
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dar.config.control import ControlSpec
from dar.config.recipe import dump_recipe, flatten, load_recipe
from dar.config.recorded import RecordedSpec
from dar.config.reward_model import RewardModelSpec
from dar.config.run import BestSpec, RunSpec
from dar.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from dar.files.atomic import remove, remove_rests, write_text, written
from dar.files.intake import parse_json, read_text
from dar.files.paths import expanded, missing
from dar.shown import redacted

AnyRecipe = RunSpec | RewardModelSpec | ControlSpec | RecordedSpec
_WRITTEN = (
    *("checkpoints/step-*", "completions/*step-*.parquet", "best", "model", "dar/events.out.tfevents.*"),
    *("metrics.jsonl", "alerts.jsonl", "evaluation.json", "triage.parquet", "reliability-*.png", "report.html"),
    *("data.json", "environment.json", "config.yaml"),
)
"""All that is ever written here, what makes it a run's folder last."""
_FREE_TO_CHANGE = (
    *("output_dir", "alerts", "checkpoint.", "logging.", "cluster", "hub"),
    *("runtime.max_logprob_gap", "runtime.rank_timeout"),
)
"""Keys that change nothing a resumed run computes."""


class RunFolder:
    """One run's folder; `data` has fingerprints of its data by what they are of, None where the recipe alone counts.

    Raises (all methods):
        CheckpointError: a file cannot be written or read.
    """

    def __init__(self, path: str | Path, data: Mapping[str, str] | None = None) -> None:
        self.path = Path(expanded(path))
        self.data = data

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def is_run(self) -> bool:
        return os.path.isfile(self.path / "config.yaml")

    @property
    def has_steps(self) -> bool:
        """Whether a run got as far as a training step: there is something to continue, and to lose."""
        return self.is_run and (
            self.model.exists()
            or any(self.checkpoints.glob("step-*"))
            or any(row["step"] > 0 for row in self.metrics())
        )

    def prepare(self, spec: AnyRecipe, *, resume: bool, overwrite: bool, allow_changes: bool = False) -> bool:
        """Looks, before anything is loaded, whether the run can be written here; whether it goes on from what is there.

        Raises:
            ConfigError: it is to be resumed and overwritten.
            CheckpointError: it cannot be written, holds a run that is not to be overwritten or resumed, or as
                `require_same_recipe`.
        """
        if resume and overwrite:
            raise ConfigError("--resume continues the run in output_dir and --overwrite removes it: give one of them")
        if resume and not self.path.exists():
            raise CheckpointError(f"there is no run to resume: {missing(self.path)}. Start without --resume.")
        if self.is_run and not (self.path / "environment.json").is_file():
            raise CheckpointError(f"{self.path} holds a config.yaml that no run has written: choose another output_dir")
        if resume and self.has_steps:
            self.require_same_recipe(spec, allow_changes=allow_changes)
            return True
        if not overwrite and self.has_steps:
            raise CheckpointError(
                f"{self.path} already holds a run: continue it with --resume (resume_from_checkpoint=True in Python), "
                "start again in its place with --overwrite (overwrite=True), or choose another output_dir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process of the run may have been quicker
        except OSError as error:
            raise CheckpointError(f"the run folder {self.path} cannot be written: {error}") from error
        return False

    def start(self, spec: AnyRecipe, environment: Mapping[str, Any]) -> None:
        """Makes it the folder of this run, which has passed its checks: what an earlier one has written here goes."""
        if self.is_run:
            remove_rests(self.path)
            for path in [path for pattern in _WRITTEN for path in self.path.glob(pattern)]:
                remove(path)
        self._write("environment.json", json.dumps(environment, indent=2) + "\n")
        self.record_recipe(spec)

    def require_same_recipe(self, spec: AnyRecipe, *, allow_changes: bool) -> None:
        """Compares the recipe and its data with those the run was started with.

        Raises:
            CheckpointError: one of them differs in something a run's numbers depend on and `allow_changes` is False;
                the message lists the differences.
        """
        before, now = flatten(load_recipe(self.path / "config.yaml", kind=type(spec))), flatten(spec)
        if self.data is not None:
            before, now = before | self._json("data.json"), now | dict(self.data)
        changed = [
            f"  {key}: {before.get(key, '(absent)')!r} → {now.get(key, '(absent)')!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(_FREE_TO_CHANGE)
        ]
        if changed and not allow_changes:
            raise CheckpointError(
                f"the recipe or its data differs from what {self.path} was started with:\n"
                + "\n".join(changed)
                + "\nUndo the change, start a new run in another output_dir, or allow it with --allow-changed-recipe "
                "(the result is then that of neither recipe)."
            )

    def record_recipe(self, spec: AnyRecipe) -> None:
        """Writes the recipe a resumed run goes on with; to be called once the run really goes on."""
        if self.data is not None:
            self._write("data.json", json.dumps(self.data, indent=2) + "\n")
        self._write("config.yaml", dump_recipe(spec))

    def write_evaluation(self, found: Mapping[str, Any]) -> None:
        """Writes evaluation.json."""
        self._write("evaluation.json", json.dumps(found, indent=2, allow_nan=False) + "\n")

    def environment(self) -> dict[str, Any]:
        """What environment.json holds; empty where there is none."""
        return self._json("environment.json")

    def evaluation(self) -> dict[str, Any]:
        """What evaluation.json holds; empty where there is none."""
        return self._json("evaluation.json")

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Adds one line to metrics.jsonl.

        Raises:
            NonFiniteError: a value is NaN or infinite, which JSON cannot say and a mean must not hide.
        """
        broken = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(f"metrics of step {row.get('step')} are not finite: {', '.join(broken)}")
        self._append("metrics.jsonl", row)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl (a half-written last line, left by a kill, is not one)."""
        return self._lines("metrics.jsonl")

    def append_alert(self, row: Mapping[str, Any]) -> None:
        """Adds one line to alerts.jsonl."""
        self._append("alerts.jsonl", row)

    def alerts(self) -> list[dict[str, Any]]:
        """The lines of alerts.jsonl, as `metrics` reads its own."""
        return self._lines("alerts.jsonl")

    def best_record(self) -> dict[str, Any] | None:
        """What `best/` holds: its `step`, `metric`, `mode` and `value`; None where there is none."""
        return self._json("best/best.json") or None

    def is_better(self, value: float, best: BestSpec) -> bool:
        """Whether a value of the metric is better than that of what `best/` holds."""
        before = self.best_record()
        # A record of another metric, from before the recipe was changed, is not one to beat.
        if before is None or (before["metric"], before["mode"]) != (best.metric, best.mode):
            return True
        return value > before["value"] if best.mode == "max" else value < before["value"]

    def is_evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the held-out evaluation after `step`."""
        return any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in self.metrics())

    def forget_after(self, step: int) -> None:
        """Removes all that is of steps after `step`, checkpoints among it, and what a kill left behind.

        A resumed run writes them anew. One that is resumed with other settings comes to another policy, so that the
        best one must not be left over from what did not happen.
        """
        remove_rests(self.path)
        remove_rests(self.checkpoints)
        remove_rests(self.path / "completions")
        for name in ("metrics.jsonl", "alerts.jsonl"):
            if (self.path / name).exists():
                kept = [row for row in self._lines(name) if row["step"] <= step]
                self._write(name, "".join(json.dumps(row) + "\n" for row in kept))
        for path in (*(self.path / "completions").glob("*step-*.parquet"), *self.checkpoints.glob("step-*")):
            if (number := path.stem.rpartition("-")[2]).isdigit() and int(number) > step:
                remove(path)
        best = self.best_record()
        if best is not None and best["step"] > step:
            remove(self.best)

    def write_completions(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes completions/<name>.parquet."""
        self._write_table(f"completions/{name}.parquet", columns)

    def write_triage(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes triage.parquet: what a method made of the data's pairs before the first step."""
        self._write_table("triage.parquet", columns)

    def triage(self) -> dict[str, list[Any]] | None:
        """The columns of triage.parquet, or None where there is none."""
        file = self.path / "triage.parquet"
        return _table(file).to_pydict() if file.is_file() else None

    def side_by_side(self) -> tuple[float | None, list[tuple[str, str, str]]]:
        """Completions to be read of the first and of the last held-out evaluation, none where there are not two.

        The temperature at which they were drawn (None: as the evaluation's), and (prompt, before, after) of each.
        """
        files = list((self.path / "completions").glob("to-read-step-*.parquet"))
        if len(files) < 2:
            return None, []
        files.sort(key=lambda file: int(file.stem.rpartition("-")[2]))
        before, last = _table(files[0]).to_pylist(), _table(files[-1]).to_pylist()
        after = {row["prompt"]: row["completion"] for row in last}
        rows = [(row["prompt"], row["completion"], after[row["prompt"]]) for row in before if row["prompt"] in after]
        return before[0]["temperature"], rows

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            return dict(parse_json(read_text(file), "it")) if file.is_file() else {}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {error}; repair or remove it") from error

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as stream:
                stream.write(redacted(json.dumps(row, allow_nan=False)) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path / name}: {error}") from error

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        if not file.exists():
            return []
        try:
            # What follows the last newline was being written when the run was killed.
            lines = read_text(file).split("\n")[:-1]
            return [parse_json(line, f"{file}: line {number}") for number, line in enumerate(lines, start=1)]
        except DataError as error:
            raise CheckpointError(str(error)) from error

    def _write(self, name: str, text: str) -> None:
        write_text(self.path / name, redacted(text))

    def _write_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        table = pa.table({name: _shown(values) for name, values in columns.items()})
        with written(self.path / name) as scratch:
            pyarrow.parquet.write_table(table, scratch)


def _table(file: Path) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Start a new run in another output_dir.") from error


def _shown(values: Sequence[Any]) -> Sequence[Any]:
    return (
        [redacted(value) if isinstance(value, str) else value for value in values]
        if isinstance(values, list)
        else values
    )
