"""One step of a recipe, really taken, and what the whole run will come to at that pace."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet
from torch import Tensor

from dar.assembly.loop import build_loop
from dar.config.run import LoggingSpec, RunSpec
from dar.record.environment import peak_memory_gb


@dataclass(frozen=True)
class Trial:
    """What one step took, and what the whole run will: seconds, and GB of 10⁹ bytes.

    prompt: the step's first, as the model reads it; completions: its own, as in completions/step-1.parquet.
    step: the step's line of metrics.jsonl.
    evaluation_seconds: of one held-out evaluation, from one of as many prompts as a step has; 0 without any.
    """

    prompt: str
    completions: list[dict[str, Any]]
    step: dict[str, float]
    evaluation_seconds: float
    num_evaluations: int
    run_seconds: float
    memory_gb: float
    disk_gb: float


def try_step(spec: RunSpec, *, num_heldout_prompts: int) -> Trial:
    """Takes one step, its files in a folder that does not stay. Raises DarError, whatever would end it in a run."""
    num_heldout = min(num_heldout_prompts, spec.evaluation.max_prompts or num_heldout_prompts)
    num_tried = min(num_heldout, spec.prompts_per_step)
    with tempfile.TemporaryDirectory(prefix="dar-try-") as temporary:
        logging = LoggingSpec(completions_every=1, old_kl_prompts=spec.logging.old_kl_prompts)
        evaluation = spec.evaluation.model_copy(update={"max_prompts": num_tried or None})
        changes = {"output_dir": temporary, "alerts": [], "hub": None, "logging": logging, "evaluation": evaluation}
        loop = build_loop(spec.model_copy(update=changes), quiet=True)
        try:
            loop.begin()
            loop.evaluate(0)
            step = loop.step(1)
        finally:
            loop.end()
        table = pyarrow.parquet.read_table(f"{temporary}/completions/step-1.parquet").to_pylist()
        seconds = sum(row.get("eval/time", 0.0) for row in loop.folder.metrics()) * num_heldout / max(1, num_tried)
    # The stream's first, unless it was replaced.
    (prompt,) = loop.collector.stream.draw(table[0]["position"], 1)
    weights = _bytes(loop.trainable().values())
    moments = sum(_bytes(state.values()) for state in loop.optimizer.state.values())
    checkpoint = weights + moments + _bytes(loop.extras().values())
    num_evaluations = 1 + math.ceil(spec.steps / (spec.evaluation.every or spec.steps)) if num_tried else 0
    num_kept = min(spec.checkpoint.keep, math.ceil(spec.steps / (spec.checkpoint.every or spec.steps)))
    return Trial(
        prompt=str(loop.recorder.tokenizer.decode(list(prompt.token_ids))),
        completions=[row for row in table if row["position"] == prompt.position],
        step=step,
        evaluation_seconds=seconds,
        num_evaluations=num_evaluations,
        run_seconds=spec.steps * step["step_time"] + num_evaluations * seconds,
        memory_gb=peak_memory_gb(),
        # While the newest checkpoint is written, the one it replaces is still there.
        disk_gb=((num_kept + 1) * checkpoint + (2 if spec.checkpoint.best else 1) * weights) / 1e9,
    )


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
