"""TRL's output folder: `trainer_state.json`, and the tables of completions that log_completions=True writes.

Keys and tables as of trl 1.16 (`GRPOTrainer.log`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dar.config.recorded import RecordedSpec
from dar.errors import DataError
from dar.files.intake import is_number, parse_json, read_text
from dar.report.foreign.cells import NOT_KNOWN, conversation, plain
from dar.report.kinds import CompletionFile, RecordedRun
from dar.shown import one_line

_CARD = {"TRL": r"^- TRL: (\S+)", "method": r"trained with ([\w-]+)", "base": r"^base_model: (?!None)(.+)$"}
_OTHERS = ("reward_std", "frac_reward_zero_std", "completions/mean_terminated_length")
"""Names of this library under which TRL logs something else."""
_OTHERS_OF_DATA = ("entropy", "kl", "num_tokens")
"""And where nothing is sampled."""
_REASONS = {
    "Held-out figures": "TRL evaluates with an eval_dataset and eval_strategy.",
    "Intervals": "TRL does not keep the completions of its evaluations apart, so no prompt can be told from another.",
    "Drift from π₀": "TRL logs no KL per completion. With beta > 0 it logs `kl`, which is per token.",
    "Proxy and gold": "It needs a reward that is not trained on, and TRL logs none.",
    "Size of each update": "TRL logs no KL between the policies before and after an update.",
    "Weights": "The trainer logs no weights of completions.",
    "Time": "TRL's online trainers log `step_time`; the rest is in no log.",
    "Completions": "TRL writes them with log_completions=True.",
    "Drift per token": "TRL writes no log-probabilities; set beta > 0 and `kl`, a mean over tokens, is logged.",
}


@dataclass(frozen=True)
class _Table(CompletionFile):
    """rewards: names of the columns that are rewards. is_sum: whether the log proves that they are just added up."""

    rewards: tuple[str, ...]
    is_sum: bool
    is_mixed: bool

    @property
    def label(self) -> str:
        return f"logged at step {self.step}{', the evaluation’s among them' if self.is_mixed else ''}"

    def read(self, columns: Any = None) -> pa.Table:
        raw = super().read().to_pydict()
        if lacking := [name for name in ("prompt", "completion") if name not in raw]:
            raise DataError(f"{self.path} has no column '{lacking[0]}', as TRL writes it; found {', '.join(raw)}")
        texts = {name: [conversation(value) for value in raw[name]] for name in ("prompt", "completion")}
        found: dict[str, list[Any]] = texts | {"position": [None] * len(texts["prompt"])}
        parts = [plain(raw[name]) for name in self.rewards if name in raw]
        if self.is_sum and parts:
            rows = [[value for value in row if is_number(value)] for row in zip(*parts, strict=True)]
            found["reward"] = [sum(row) if row else None for row in rows]
        if "advantage" in raw:
            found["advantage"] = [value if is_number(value) else None for value in raw["advantage"]]
        for name in [name for name in raw if name not in ("step", *found)]:
            found[f"{'reward' if name in self.rewards else 'extra'}/{name}"] = plain(raw[name])
        return pa.table({name: found[name] for name in found if columns is None or name in columns})


def read_trl(folder: Path) -> RecordedRun | None:
    """The run in an output folder of TRL, or None where it is none.

    Raises:
        DataError: `trainer_state.json` cannot be read.
    """
    numbered = {int(each.name[11:]): each for each in folder.glob("checkpoint-*") if each.name[11:].isdigit()}
    places = [folder, *(numbered[step] for step in sorted(numbered)[-1:])]
    states = {file: _state(file) for file in (place / "trainer_state.json" for place in places) if file.is_file()}
    tables = sorted((folder / "completions").glob("completions_*.parquet"))
    if not states and not tables:
        return None
    newest = max(states, key=lambda file: states[file]["global_step"], default=None)
    state = dict(states[newest]) if newest else {}
    history = state.pop("log_history", [])
    is_sampled = any("reward" in row or "eval_reward" in row for row in history)
    steps, evaluations, broken = [], [], set[str]()
    for row in history:
        broken |= {f"{key} of step {row['step']}" for key, value in row.items() if not is_number(value)}
        kept = {key: value for key, value in row.items() if is_number(value)}
        if any(key.startswith("eval_") for key in row):
            name = next((match[1] for key in row if (match := re.fullmatch(r"eval_(.+)_runtime", key))), "")
            own = {key.removeprefix("eval_"): value for key, value in kept.items()}
            own["eval_loss" if is_sampled else "loss"] = own.pop("loss", None)
            own["time"] = own.pop("runtime", None)
            kept = {f"{name}/{key}" if name and key != "step" else key: own[key] for key in own if own[key] is not None}
            evaluations.append(_renamed(kept, is_sampled))
        elif "train_runtime" not in row:  # the last line sums up the whole of train()
            steps.append(_renamed(kept, is_sampled))
    card = read_text(folder / "README.md") if (folder / "README.md").is_file() else ""
    told = {key: match[1] for key, form in _CARD.items() if (match := re.search(form, card, re.MULTILINE))}
    rewards = tuple(sorted({key[8:-5] for row in steps for key in row if re.fullmatch("rewards/.+/mean", key)}))
    gaps = [
        row["reward"] - sum(row.get(f"rewards/{name}/mean", 0.0) for name in rewards)
        for row in steps
        if row.get("reward")
    ]
    is_sum = bool(gaps) and max(map(abs, gaps)) < 1e-5
    mixed, completions = {row["step"] for row in evaluations}, []
    for file in tables:
        if match := re.fullmatch(r"completions_(\d+)", file.stem):
            step = int(match[1])
            completions.append(_Table(step, False, file, rewards, is_sum, step in mixed))
    notes = ["No trainer_state.json is here: TRL writes it with a checkpoint (save_steps), so no metric is known."]
    if newest:
        notes = [f"Read from {newest}, which has what was logged up to step {state['global_step']}."]
    if (every := state.get("logging_steps", 1)) != 1:
        notes.append(f"TRL was asked to log every {every} steps; each figure is the mean since the one before.")
    if mixed and completions:
        notes.append(
            "TRL keeps the newest completions of training and evaluation in one list, and does not say whose a row is: "
            "at steps with an evaluation, and until the next sampling, they may be of held-out prompts."
        )
    if completions and not is_sum:
        notes.append("Completions have their single rewards and no total, as their weights are not in the log.")
    if broken:
        notes.append(f"Not finite, and left out: {one_line(', '.join(sorted(broken)))}.")
    spec = RecordedSpec(
        trainer=f"TRL {told.get('TRL', '')}".strip(), method=told.get("method", NOT_KNOWN), output_dir=str(folder),
        model=told.get("base", NOT_KNOWN), steps=state.get("max_steps") or None, settings=state,
    )  # fmt: skip
    return RecordedRun(
        name=one_line(folder.resolve().name, 100), path=folder, environment={}, steps=steps, evaluations=evaluations,
        alerts=[], completions=completions, evaluation={}, spec=spec, reasons=_REASONS, notes=notes,
    )  # fmt: skip


def _renamed(row: dict[str, Any], is_sampled: bool) -> dict[str, Any]:
    others = _OTHERS if is_sampled else (*_OTHERS, *_OTHERS_OF_DATA)
    return {f"trl/{key}" if key in others else key: value for key, value in row.items()}


def _state(file: Path) -> dict[str, Any]:
    found = parse_json(read_text(file), str(file))
    history = found.get("log_history") if isinstance(found, dict) else None
    is_history = isinstance(history, list) and all(
        isinstance(row, dict) and type(row.get("step")) is int for row in history
    )
    if not is_history or type(found.get("global_step")) is not int:
        raise DataError(f"{file} is no trainer state as transformers writes it: it needs global_step and log_history")
    return found
