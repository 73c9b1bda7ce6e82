"""verl's dumps of generations (trainer.rollout_data_dir, trainer.validation_data_dir) and the file of its file logger.

As of verl 0.9 (`RayPPOTrainer._write_generations`, `FileLogger`): N.jsonl of step N, a row a completion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from dar.config.recorded import RecordedSpec
from dar.errors import CheckpointError, ConfigError, DataError
from dar.files.intake import is_number, parse_json
from dar.report.foreign.cells import NOT_KNOWN, conversation, plain
from dar.report.kinds import CompletionFile, RecordedRun
from dar.shown import one_line

_REASONS = {
    "Held-out figures": "verl dumps its validation with trainer.validation_data_dir; give the folder that holds both.",
    "Intervals": "They need the validation's dump.",
    "Drift from π₀": "A dump has no log-probabilities. What verl logs of the KL (`actor/kl_loss`, `critic/kl`, …) is "
    "another estimate, and stands under its own name in Any metric where the file logger's file is beside the dump.",
    "Size of each update": "verl's `actor/ppo_kl` is another estimate, under its own name in Any metric.",
    "Length": "A dump has no token counts; `response_length/mean` of the log is under Any metric.",
    "Entropy": "verl's `actor/entropy` is averaged in its own way (loss_agg_mode): under Any metric.",
    "Proxy and gold": "It needs the KL per completion and a reward not trained on.",
    "Weights": "A dump has no weights of completions.",
    "Time": "verl's `timing_s/…` are under Any metric.",
    "Drift per token": "A dump has no log-probabilities.",
}


class _Dump(CompletionFile):
    def read(self, columns: Any = None) -> pa.Table:
        rows = list(_rows(self.path))
        found: dict[str, list[Any]] = {
            "position": [None] * len(rows),
            "prompt": [conversation(row["input"]) for row in rows],
            "completion": [conversation(row["output"]) for row in rows],
            "reward": [row["score"] if is_number(row["score"]) else None for row in rows],
        }
        for name in dict.fromkeys(key for row in rows for key in row if key not in _KEYS):
            found[f"extra/{name}"] = plain([row.get(name) for row in rows])
        return pa.table({name: found[name] for name in found if columns is None or name in columns})


_KEYS = ("input", "output", "score", "step")


def read_verl(folder: Path) -> RecordedRun | None:
    """The run in a dump of verl or in the folder that holds its dumps, or None where there are none.

    Raises:
        ConfigError: which dump is whose cannot be told.
        DataError: a line is none that verl writes.
    """
    files = {place: _dumped(place) for place in (folder, *(each for each in sorted(folder.glob("*")) if each.is_dir()))}
    dumps = {folder: files[folder]} if files[folder] else {place: found for place, found in files.items() if found}
    if not dumps:
        return None
    kinds = {place: _is_validation(found) for place, found in dumps.items()}
    for kind, name in (False, "rollouts"), (True, "validations"):
        if len(places := [str(place) for place in dumps if kinds[place] is kind]) > 1:
            raise ConfigError(f"{' and '.join(places)} both hold verl's {name}: give the folder of a single run")
    rows: dict[bool, dict[int, dict[str, Any]]] = {False: {}, True: {}}
    completions, broken = [], []
    for place, found in dumps.items():
        for step, file in found.items():
            completions.append(_Dump(step, kinds[place], file))
            scores = [row["score"] for row in _rows(file)]
            if scores and all(map(is_number, scores)):
                rows[kinds[place]][step] = {"step": step, "reward": fmean(scores)}
            elif scores:
                broken.append(str(file))
    beside = {
        file
        for place in (folder, *dumps, *([folder.parent] if folder in dumps else []))
        for file in place.glob("*.jsonl")
    }
    logs = sorted(file for file in beside if _is_log(file))
    notes = [
        f"Read from {', '.join(map(str, [*dumps, *(logs if len(logs) == 1 else [])]))}. Reward is the mean `score`."
    ]
    if len(logs) == 1:
        for row in _lines(logs[0]):
            if type(row.get("step")) is int and isinstance(row.get("data"), dict):
                data = {key: value for key, value in row["data"].items() if is_number(value)}
                rows[False][row["step"]] = data | rows[False].get(row["step"], {"step": row["step"]})
    else:
        which = f"several are here ({', '.join(map(str, logs))})" if logs else "none is beside the dump"
        notes.append(f"No metrics of verl's file logger (trainer.logger: file) were read: {which}.")
    if broken:
        notes.append(f"A score is no finite number, so the step has no mean reward: {one_line(', '.join(broken))}.")
    spec = RecordedSpec(trainer="verl", method=NOT_KNOWN, model=NOT_KNOWN, output_dir=str(folder))
    return RecordedRun(
        name=one_line(folder.resolve().name, 100), path=folder, environment={}, alerts=[], evaluation={}, spec=spec,
        steps=[rows[False][step] for step in sorted(rows[False])], reasons=_REASONS, notes=notes,
        evaluations=[rows[True][step] for step in sorted(rows[True])],
        completions=sorted(completions, key=lambda file: (file.step, file.is_heldout)),
    )  # fmt: skip


def _dumped(place: Path) -> dict[int, Path]:
    return {int(file.stem): file for file in place.glob("*.jsonl") if re.fullmatch("[0-9]+", file.stem)}


def _is_validation(files: dict[int, Path]) -> bool:
    """Training begins with step 1, and only validation adds its score once more, as `reward`."""
    first = next((row for step in sorted(files) for row in _rows(files[step])), {})
    return 0 in files or ("reward" in first and first["reward"] == first["score"])


def _is_log(file: Path) -> bool:
    with file.open("rb") as stream:
        return re.match(rb'\{"step":\d+,"data":\{', stream.read(100)) is not None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_lines(file), start=1):
        if lacking := [key for key in _KEYS if key not in row]:
            raise DataError(f"{file}: line {number} has no '{lacking[0]}', which every line of a dump of verl has")
        yield row


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """One by one, as a dump may be larger than the memory. What follows the last newline was cut off by a kill."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.endswith(b"\n"):
                    row = parse_json(line.decode(errors="replace"), f"{file}: line {number}")
                    if not isinstance(row, dict):
                        raise DataError(f"{file}: line {number} is a {type(row).__name__}, expected an object")
                    yield row
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
