"""The Python face: `Trainer` and `DARTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet

from dar.algorithms.base import Algorithm
from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.config.algorithm import AlgorithmSpec
from dar.config.algorithms import ALGORITHM_SPECS, OwnAlgorithmSpec
from dar.config.base import Spec
from dar.config.recipe import build_spec
from dar.errors import ConfigError
from dar.rewards import RewardFunction
from dar.rewards.foreign import ForeignCode
from dar.run.alerts import Alert
from dar.run.card import model_card
from dar.run.loop import Loop
from dar.run.measures import evaluations
from dar.run.recorder import Callback
from dar.training_config import DARConfig, TrainingConfig


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    steps: completed; fewer than asked for after Ctrl-C, or where an alert stopped the run.
    metrics: the lines of metrics.jsonl.
    output_dir: the run folder.
    stopped_by: the alert that asked for the end of the run, if one did.
    """

    steps: int
    metrics: list[dict[str, Any]]
    output_dir: str
    stopped_by: Alert | None = None


class Trainer:
    """Aligns a language model with any algorithm of the library.

        Trainer(model, my_reward, TrainingConfig(output_dir="runs/a", max_steps=100), prompts, algorithm="grpo").train()
        Trainer(model, None, TrainingConfig(output_dir="runs/b", max_steps=100), pairs, algorithm="dpo").train()

    Args:
        model: a Hub id, folder or `.gguf` file, or a transformers causal language model.
        reward_funcs: one or several: functions with TRL's signature, built-in names (`"sentiment"`), or import paths
            (`"pkg.mod:fn"`). Offline methods measure held-out samples with them and do without otherwise.
        args: shared settings.
        train_dataset: prompts to train on (for an offline method with their completions): a `datasets.Dataset`, an
            iterable of rows, or a path.
        algorithm: a name (`"dar"`, `"grpo"`, `"dpo"`, …) for its defaults, its spec, or a method of your own: a
            `dar.Algorithm`, or the import path of one (`"pkg.mod:Class"`).
        eval_dataset: held-out prompts, of the same kinds.
        ref_model: π₀; by default the policy before training.
        processing_class: the tokenizer; by default the model's.
        peft_config: any configuration of peft under which sampler, trainer and saved folder are one policy.
        callbacks: told about every line of metrics; may stop the run, save or evaluate.

    Raises:
        ConfigError: settings that do not fit together; the rest is checked when `train` begins.
    """

    def __init__(
        self,
        model: str | Any,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        args: TrainingConfig | None = None,
        train_dataset: str | Iterable[Any] | None = None,
        *,
        algorithm: str | AlgorithmSpec | Algorithm = "dar",
        eval_dataset: str | Iterable[Any] | None = None,
        ref_model: str | Any | None = None,
        processing_class: Any | None = None,
        peft_config: Any | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        if not isinstance(args, TrainingConfig):
            raise ConfigError(f"args must be a TrainingConfig or DARConfig, got {type(args).__name__}")
        if train_dataset is None:
            raise ConfigError("train_dataset is missing: pass a datasets.Dataset, an iterable of rows, or a path")
        method = _algorithm_spec(algorithm, args)
        rewards, functions = _rewards(reward_funcs, args.reward_weights)
        if not rewards and not method.logged:
            offline = ", ".join(name for name, spec in ALGORITHM_SPECS.items() if spec.logged)
            raise ConfigError(
                f"{method.model_dump()['type']} learns from the rewards of its own samples: pass reward_funcs. (Only "
                f"{offline} learn from the completions of the data.)"
            )
        self.spec = args.run_spec(
            model=_described(model),
            reference=None if ref_model is None else _described(ref_model),
            train=_described(train_dataset),
            heldout=None if eval_dataset is None else _described(eval_dataset),
            algorithm=method,
            rewards=rewards,
        )
        if ref_model is not None and ref_model is model and not isinstance(model, str):
            raise ConfigError(
                "ref_model is the very object that is trained, so it would move along with it: leave ref_model out (a "
                "frozen copy is then the reference), or pass a copy"
            )
        if not isinstance(model, str) and processing_class is None:
            raise ConfigError("a model given as an object needs its tokenizer: pass processing_class")
        self._objects = Objects(
            model=_object(model),
            tokenizer=processing_class,
            reference=_object(ref_model),
            train_rows=_object(train_dataset),
            heldout_rows=_object(eval_dataset),
            reward_functions=functions,
            lora=peft_config,
            callbacks=tuple(callbacks or ()),
            algorithm=algorithm if isinstance(algorithm, Algorithm) else None,
        )
        self.loop: Loop | None = None

    def train(
        self,
        resume_from_checkpoint: bool | None = None,
        *,
        allow_changed_recipe: bool = False,
        overwrite: bool = False,
    ) -> TrainResult:
        """Runs to the last step and saves `model/`.

        Args:
            resume_from_checkpoint: True continues the run in `output_dir` from its newest valid checkpoint.
            allow_changed_recipe: continue although settings have changed.
            overwrite: start again in an `output_dir` that holds a run, of which nothing is kept.

        Raises:
            DarError: whatever went wrong; nothing already saved is lost.
        """
        if isinstance(resume_from_checkpoint, str):
            raise ConfigError(
                f"resume_from_checkpoint is '{resume_from_checkpoint}', but must be True or False: a run continues "
                "from the newest valid checkpoint of its output_dir"
            )
        resume = bool(resume_from_checkpoint)
        self.loop = build_loop(
            self.spec, self._objects, resume=resume, allow_changed_recipe=allow_changed_recipe, overwrite=overwrite
        )
        return run_loop(self.loop, resume=resume, command=f"{type(self).__name__}(…).train()")


class DARTrainer(Trainer):
    """`Trainer` with DAR.

        trainer = DARTrainer(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            reward_funcs=my_reward,
            args=DARConfig(output_dir="runs/first", max_steps=100),
            train_dataset=dataset,
        )
        trainer.train()

    Arguments as for `Trainer`.
    """

    def __init__(
        self,
        model: str | Any,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str],
        args: DARConfig,
        train_dataset: str | Iterable[Any],
        **others: Any,
    ) -> None:
        if not isinstance(args, DARConfig):
            raise ConfigError(f"DARTrainer takes a DARConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, train_dataset, **others)


def run_loop(loop: Loop, *, resume: bool, command: str) -> TrainResult:
    """Runs a loop, saves the model when it is finished, and shows the before/after table.

    Args:
        loop: from `dar.assembly.loop.build_loop`.
        resume: continue from the newest checkpoint.
        command: for the model card.
    """
    try:
        done = loop.run(resume=resume)
    finally:
        loop.end()
    metrics = loop.folder.metrics()
    if done == loop.spec.steps and loop.accelerator.is_main_process:
        card = model_card(loop.spec, metrics, loop.folder.alerts(), command=command)
        loop.learner.policy.save(loop.folder.model, card=card)
        show_before_after(loop, metrics)
    return TrainResult(done, metrics, str(loop.folder.path), loop.stopped_by)


def show_before_after(loop: Loop, metrics: list[dict[str, Any]]) -> None:
    """The held-out table and three completions side by side, read from the run folder."""
    found = evaluations(metrics)
    if loop.display.quiet or len(found) < 2:
        return
    before, after = found[0], found[-1]
    loop.display.before_after(before, after, title=str(loop.folder.path))
    tables = [
        pyarrow.parquet.read_table(loop.folder.path / "completions" / f"heldout-step-{row['step']}.parquet").to_pylist()
        for row in (before, after)
    ]
    stride = max(1, len(tables[0]) // 3)
    loop.display.side_by_side(
        [(row["prompt"], row["completion"], tables[1][index]["completion"])
         for index, row in list(enumerate(tables[0]))[::stride][:3]]
    )  # fmt: skip


def _rewards(
    given: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None, weights: Sequence[float] | None
) -> tuple[list[dict[str, Any]], dict[str, RewardFunction]]:
    """The rewards as plain data, and those given as objects by name."""
    items = [given] if callable(given) or isinstance(given, str) else list(given or ())
    if weights is not None and len(weights) != len(items):
        raise ConfigError(f"reward_weights has {len(weights)} values for {len(items)} reward functions")
    specs: list[dict[str, Any]] = []
    functions: dict[str, RewardFunction] = {}
    for index, item in enumerate(items):
        weight = {"weight": float(weights[index])} if weights is not None else {}
        if isinstance(item, str):
            specs.append(({"type": "function", "function": item} if ":" in item else {"type": item}) | weight)
            continue
        with ForeignCode(
            lambda kind, said: ConfigError(f"a reward function raised {kind} when asked its name: {said}")
        ):
            given_name = str(getattr(item, "__name__", type(item).__name__))
            path = f"{getattr(item, '__module__', '?')}:{getattr(item, '__qualname__', given_name)}"
        name, number = given_name, 1
        while name in functions:
            number += 1
            name = f"{given_name}_{number}"
        specs.append({"type": "function", "function": path, "name": name} | weight)
        functions[name] = item
    return specs, functions


def _algorithm_spec(algorithm: str | AlgorithmSpec | Algorithm, args: TrainingConfig) -> AlgorithmSpec:
    """The spec that is meant; a `DARConfig` says DAR's itself."""
    if isinstance(args, DARConfig):
        if algorithm == "dar":
            return args.algorithm
        if unread := sorted(args.model_fields_set - TrainingConfig.model_fields.keys()):
            raise ConfigError(
                f"args sets {', '.join(unread)}, which algorithm=… replaces: use a TrainingConfig with it, or leave "
                "algorithm out"
            )
    if isinstance(algorithm, Algorithm):
        own = type(algorithm)
        settings = getattr(algorithm, "spec", None)
        recorded = settings.model_dump() if isinstance(settings, Spec) else {}
        return _own({**recorded, "type": f"{own.__module__}:{own.__name__}"})
    if isinstance(algorithm, (OwnAlgorithmSpec, *ALGORITHM_SPECS.values())):
        return algorithm
    if isinstance(algorithm, str) and ":" in algorithm:
        return _own({"type": algorithm})
    if not isinstance(algorithm, str) or algorithm not in ALGORITHM_SPECS:
        raise ConfigError(
            f"algorithm {algorithm!r} is not known; pass a method, its spec, its import path, or one of the "
            f"names {', '.join(ALGORITHM_SPECS)}"
        )
    return ALGORITHM_SPECS[algorithm]()


def _own(recorded: dict[str, Any]) -> OwnAlgorithmSpec:
    return build_spec(recorded, where="algorithm", kind=OwnAlgorithmSpec)


def _described(value: Any) -> str:
    """The path of something given by path, or what kind of object it is."""
    if isinstance(value, str):
        return value
    name = getattr(getattr(value, "config", None), "name_or_path", "")
    return name or f"<{type(value).__name__}>"


def _object(value: Any) -> Any | None:
    return None if value is None or isinstance(value, str) else value
