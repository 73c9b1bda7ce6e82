"""transformers' callbacks are told what they know of a run, and what they ask for is done; others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from dar import ConfigError, DARConfig, DARTrainer
from dar.trainer import TrainResult

ROWS = [{"prompt": prompt} for prompt in "abcd"]


def shortness(completions: list[str]) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def make_trainer(folder: Path, callbacks: Any, *, is_evaluated: bool = True, **settings: Any) -> DARTrainer:
    settings = {"max_steps": 4, "prompts_per_step": 2, "max_completion_length": 4, "precision": "fp32"} | settings
    args = DARConfig(output_dir=str(folder), **settings)
    held_out = ROWS[:1] if is_evaluated else None
    return DARTrainer("toy:letters", shortness, args, ROWS, eval_dataset=held_out, callbacks=callbacks)


def train(folder: Path, *callbacks: TrainerCallback, resume: bool = False, **settings: Any) -> TrainResult:
    return make_trainer(folder, callbacks, **settings).train(resume_from_checkpoint=resume)


class Listener(TrainerCallback):
    """Keeps what it is told, and asks for a checkpoint and an evaluation after step 2 and for the end after step 3."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.heard.append(("train_begin", args.max_steps, args.save_steps, type(model).__name__, sorted(others)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append(("step_begin", state.global_step))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> Any:
        self.heard.append(("step_end", state.global_step, state.epoch))
        control.should_save = control.should_evaluate = state.global_step == 2
        control.should_training_stop = state.global_step == 3
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        assert state.log_history[-1] == {**logs, "step": state.global_step}
        self.heard.append(("log", "reward" in logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.heard.append(("evaluate", state.global_step, "eval_rewards/shortness/mean" in metrics))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert (Path(args.output_dir) / "checkpoints" / f"step-{state.global_step}").is_dir()
        self.heard.append(("save", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append(("train_end", state.global_step))


def test_events_come_in_transformers_order_and_what_is_asked_for_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    listener = Listener()
    assert train(tmp_path / "run", listener, logging_steps=2).steps == 3
    evaluated = [("log", False), ("evaluate", 2, True)]
    assert listener.heard == [
        ("train_begin", 4, 50, "LlamaForCausalLM", ["optimizer", "processing_class"]),
        *[("log", False), ("evaluate", 0, True)],
        *[("step_begin", 0), ("step_end", 1, 0.5)],
        *[("step_begin", 1), ("step_end", 2, 1.0), ("log", True), *evaluated, ("save", 2)],
        *[("step_begin", 2), ("step_end", 3, 1.5), ("save", 3)],
        ("train_end", 3),
    ]
    assert "stopped after step 3: Listener asked for it" in capsys.readouterr().out


def test_early_stopping_waits_for_the_best_evaluation_a_resumed_run_remembers_it(tmp_path: Path):
    # Nothing is learned, so no evaluation is better than the first.
    settings = {"eval_steps": 1, "learning_rate": 1e-12, "max_steps": 6}
    assert train(tmp_path / "run", EarlyStoppingCallback(2), **settings).steps == 2
    resumed = make_trainer(tmp_path / "run", [EarlyStoppingCallback(1)], **settings)
    assert resumed.train(resume_from_checkpoint=True).steps == 3
    assert resumed.loop is not None
    assert resumed.loop.trainer_callbacks is not None
    state = resumed.loop.trainer_callbacks.state
    assert state.best_global_step == 0
    assert [row["step"] for row in state.log_history] == [0, 1, 1, 2, 2, 3, 3]


def test_transformers_own_callbacks_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path / "run", PrinterCallback(), ProgressCallback())
    said = capsys.readouterr()
    assert said.out.count("{'epoch': ") >= 4
    assert "4/4" in said.err


class WaitsForSubsteps(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None: ...


class EndsEpochs(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = True


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (PrinterCallback(), "callbacks is a PrinterCallback, expected a list of callbacks"),
        ([PrinterCallback], r"callbacks has the class PrinterCallback: pass an instance of it, PrinterCallback\(…\)"),
        ([print], "has an object of type builtin_function_or_method, which is no transformers.TrainerCallback and has"),
        ([WaitsForSubsteps()], "WaitsForSubsteps.on_substep_end is never called; a run has on_train_begin, on_step_be"),
        ([TensorBoardCallback()], "TensorBoardCallback, which reads transformers' own Trainer: use report_to instead"),
        ([EarlyStoppingCallback()], "EarlyStoppingCallback waits for evaluations: pass eval_dataset"),
    ],
)
def test_callback_that_cannot_be_served_is_refused_at_once(tmp_path: Path, callbacks: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "run", callbacks, is_evaluated=False)


def test_end_of_an_epoch_cannot_be_asked_for(tmp_path: Path):
    with pytest.raises(ConfigError, match="EndsEpochs ends an epoch, but a run is counted in steps"):
        train(tmp_path / "run", EndsEpochs())


def test_argument_that_a_run_does_not_have_is_refused_with_those_it_has(tmp_path: Path):
    class Asks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert args.num_train_epochs

    with pytest.raises(AttributeError, match="args has no 'num_train_epochs': a callback of dar is given output_dir, "):
        train(tmp_path / "run", Asks())
