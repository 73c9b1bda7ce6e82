"""transformers' callbacks, told about a run in their own words; what they ask of a Trainer is asked of the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from dar.config.run import BestSpec, RunSpec
from dar.errors import ConfigError
from dar.run.recorder import Callback
from dar.run.stopping import Control
from dar.training_config import TrainingConfig

_EVENTS = ("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


class TrainerCallbacks:
    """Callbacks of transformers as one of ours: they share a state and a control, as in transformers' own Trainer.

    Args:
        callbacks: of which there are no `callback_problems`.
        spec: the recipe; `args` are those of its keys that transformers has a name for.
        things: what else every event is told by keyword: `model`, `processing_class`, `optimizer`.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], spec: RunSpec, things: Mapping[str, Any]) -> None:
        self.callbacks, self.things, self.args = callbacks, things, _Arguments(spec)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=spec.steps,
            logging_steps=spec.logging.every,
            eval_steps=spec.evaluation.every,
            save_steps=spec.checkpoint.every,
        )

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        """The step's end and what is logged of it, or an evaluation, whose keys are TRL's: `eval_reward`."""
        logs = self._noted({**metrics, "step": step})
        is_evaluation = all(key.startswith("eval_") for key in logs)
        if not is_evaluation:
            self.tell("on_step_end", control)
        if is_evaluation or self.control.should_log or step % self.state.logging_steps == 0:
            self.control.should_log = False
            self.state.log_history.append({**logs, "step": step})
            self.tell("on_log", control, logs=logs)
        if is_evaluation:
            self.tell("on_evaluate", control, metrics=logs)
            self._look_for_best(step, logs)

    def tell(self, event: str, control: Control, **more: Any) -> None:
        """Tells every callback of an event, and asks of the run what they ask for."""
        for callback in self.callbacks:
            changed = getattr(callback, event)(self.args, self.state, self.control, **self.things, **more)
            asked = self.control = changed or self.control
            if asked.should_epoch_stop:
                raise ConfigError(f"{type(callback).__name__} ends an epoch, but a run is counted in steps")
            if asked.should_training_stop:
                control.stop(f"{type(callback).__name__} asked for it")
            control.is_saving |= asked.should_save
            control.is_evaluating |= asked.should_evaluate
            asked.should_save = asked.should_evaluate = False

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remembers what an earlier run logged, and the best evaluation of it."""
        for row in rows:
            logs = self._noted(row)
            self.state.log_history.append({**logs, "step": row["step"]})
            self._look_for_best(row["step"], logs)

    def _noted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self.state.global_step, self.state.epoch = row["step"], row.get("epoch", self.state.epoch)
        return {key.replace("eval/", "eval_", 1): value for key, value in row.items() if key != "step"}

    def _look_for_best(self, step: int, logs: Mapping[str, float]) -> None:
        found, best = logs.get(f"eval_{self.args.metric_for_best_model}"), self.state.best_metric
        if found is not None and (best is None or (found > best if self.args.greater_is_better else found < best)):
            self.state.best_metric, self.state.best_global_step = found, step


class _Arguments:
    """What a callback reads of a Trainer's arguments."""

    def __init__(self, spec: RunSpec) -> None:
        for name, key in TrainingConfig.keys.items():
            setattr(self, name, reduce(lambda part, key: getattr(part, key, None), key.split("."), spec))
        best = spec.checkpoint.best or BestSpec()
        self.load_best_model_at_end = spec.checkpoint.best is not None
        self.metric_for_best_model = best.metric.removeprefix("eval/")
        self.greater_is_better = best.mode == "max"
        self.eval_strategy = IntervalStrategy.NO if spec.data.heldout is None else IntervalStrategy.STEPS
        self.logging_strategy = self.save_strategy = IntervalStrategy.STEPS

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"args has no '{name}': a callback of dar is given {', '.join(vars(self))}")


def callback_problems(given: Any, *, is_evaluated: bool) -> Iterator[str]:
    """Why callbacks cannot be told what they want to know: of no kind, or waiting for what never happens in the run."""
    if not isinstance(given, list | tuple | type(None)):
        yield f"callbacks is a {type(given).__name__}, expected a list of callbacks"
        return
    for callback in given or ():
        name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
        if isinstance(callback, type):
            yield f"callbacks has the class {name}: pass an instance of it, {name}(…)"
        elif not isinstance(callback, TrainerCallback):
            if not callable(getattr(callback, "on_metrics", None)):
                yield (
                    f"callbacks has an object of type {name}, which is no transformers.TrainerCallback and has no "
                    "method on_metrics(step, metrics, control)"
                )
        elif type(callback).__module__.startswith("transformers.integrations"):
            yield f"callbacks has {name}, which reads transformers' own Trainer: use report_to instead"
        elif isinstance(callback, EarlyStoppingCallback) and not is_evaluated:
            yield f"callbacks: {name} waits for evaluations: pass eval_dataset (and eval_steps)"
        else:
            for event in (each for each in dir(callback) if each.startswith("on_") and each not in _EVENTS):
                # transformers' own do without what never happens.
                if not getattr(callback, event).__module__.startswith("transformers."):
                    yield f"callbacks: {name}.{event} is never called; a run has {', '.join(_EVENTS)}"


def adapted(callbacks: Sequence[Any], spec: RunSpec, **things: Any) -> list[Callback]:
    """All as ours, those of transformers as one."""
    theirs = [callback for callback in callbacks if isinstance(callback, TrainerCallback)]
    ours = [callback for callback in callbacks if not isinstance(callback, TrainerCallback)]
    return [*ours, TrainerCallbacks(theirs, spec, things)] if theirs else ours
