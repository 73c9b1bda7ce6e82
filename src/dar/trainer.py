"""The Python face: `Trainer`, `DARTrainer` and their flat configurations.

A configuration does one thing: it becomes the recipe's spec, the only one the rest of the library knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow.parquet
from pydantic import Field, ValidationError, model_validator

from dar.build import Objects, build_loop
from dar.config import (
    ALGORITHM_SPECS,
    AlgorithmSpec,
    Count,
    DARSpec,
    Fraction,
    NotNegative,
    Positive,
    RunSpec,
    Spec,
)
from dar.errors import ConfigError
from dar.policy.saving import save_policy
from dar.recipe import apply_override, build_spec, explain
from dar.rewards import RewardFunction
from dar.train.card import model_card
from dar.train.loop import Loop
from dar.train.recorder import Callback

_REPLACED = {
    "per_device_train_batch_size": "prompts_per_step (prompts of one step, over all ranks) and "
    "max_tokens_per_microbatch (memory of one pass)",
    "gradient_accumulation_steps": "prompts_per_step; micro-batches follow from max_tokens_per_microbatch",
    "generation_batch_size": "prompts_per_step",
    "steps_per_generation": "updates",
    "num_iterations": "updates",
    "num_train_epochs": "max_steps; epochs = max_steps · prompts_per_step / number of prompts",
    "max_prompt_length": "overrides=['data.max_prompt_length=…']; prompts are never cut, only refused or dropped",
    "epsilon": "clip_low and clip_high of the algorithm's spec",
    "epsilon_high": "clip_high of the algorithm's spec",
    "bf16": "precision='bf16'",
    "fp16": "precision='bf16' or 'fp32' (fp16 is not offered)",
    "top_p": "nothing: truncating samplers change the distribution the weights assume",
    "top_k": "nothing: truncating samplers change the distribution the weights assume",
    "loss_type": "the algorithm: Trainer(algorithm=…)",
    "scale_rewards": "the algorithm's spec: Trainer(algorithm=DARSpec(normalize=…))",
    "ref_model": "the trainer's argument ref_model",
    "save_strategy": "save_steps (0 = only at the end)",
}


class TrainingConfig(Spec):
    """Settings every algorithm shares, under TRL's names where they mean the same.

    Raises (when constructed):
        ConfigError: an unknown or impossible setting, or a TRL name that means something else here.
    """

    output_dir: str
    """The run folder."""
    max_steps: Count
    """Batches of rollouts."""
    prompts_per_step: Count = 32
    """Prompts per step, over all ranks."""
    num_generations: Count = 4
    """Completions per prompt."""
    max_completion_length: Count = 256
    """Most tokens a completion may have."""
    temperature: Positive = 1.0
    """Divides the logits of policy, behaviour policy and reference alike."""
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """The schedule after warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    optim: Literal["adamw", "adafactor"] = "adamw"
    """The optimizer."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    max_tokens_per_microbatch: Count = 4096
    """Padded tokens of one forward and backward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of matrix products."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    seed: int = 0
    """Seed of prompt order and sampling."""
    logging_steps: Count = 1
    """Show a line and tell the trackers every so many steps."""
    save_steps: int = 50
    """Save a checkpoint every so many steps; 0 = only at the end."""
    save_total_limit: Count = 2
    """How many checkpoints stay."""
    eval_steps: int = 0
    """Evaluate on the held-out prompts every so many steps; 0 = only before and after."""
    report_to: str | list[str] | None = None
    """Trackers by name."""
    reward_weights: list[float] | None = None
    """Factors of the reward functions, in their order."""
    overrides: list[str] = Field(default_factory=list)
    """Any other key of the recipe, as `key.path=value`, for example `evaluation.num_generations=8`."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(explain(error, settings))) from error

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_meanings(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name in _REPLACED and name not in cls.model_fields:
                raise ValueError(f"'{name}' means something else here; use {_REPLACED[name]}")
        return value

    def run_spec(self, *, model: str, reference: str | None, train: str, heldout: str | None,
                 algorithm: AlgorithmSpec, rewards: list[dict[str, Any]]) -> RunSpec:  # fmt: skip
        """The recipe this configuration stands for.

        Args:
            model, reference: paths, or descriptions of objects given to the trainer.
            train, heldout: likewise.
            algorithm: the method's spec.
            rewards: the rewards' specs as plain data.

        Raises:
            ConfigError: an impossible setting.
        """
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        raw: dict[str, Any] = {
            "model": {"path": model, "gradient_checkpointing": self.gradient_checkpointing},
            "reference": reference,
            "data": {"train": train, "heldout": heldout},
            "algorithm": algorithm.model_dump(),
            "rewards": rewards,
            "sampling": {
                "max_completion_length": self.max_completion_length,
                "temperature": self.temperature,
            },
            "optim": {
                "type": self.optim,
                "learning_rate": self.learning_rate,
                "schedule": self.lr_scheduler_type,
                "warmup_steps": self.warmup_steps,
                "weight_decay": self.weight_decay,
                "max_grad_norm": self.max_grad_norm,
            },
            "prompts_per_step": self.prompts_per_step,
            "num_generations": self.num_generations,
            "steps": self.max_steps,
            "seed": self.seed,
            "output_dir": self.output_dir,
            "evaluation": {"every": self.eval_steps},
            "checkpoint": {"every": self.save_steps, "keep": self.save_total_limit},
            "logging": {"every": self.logging_steps, "trackers": [name for name in trackers if name != "none"]},
            "runtime": {
                "device": self.device,
                "precision": self.precision,
                "max_tokens_per_microbatch": self.max_tokens_per_microbatch,
            },
        }
        for override in self.overrides:
            apply_override(raw, override)
        return build_spec(raw, where=type(self).__name__)


class DARConfig(TrainingConfig):
    """`TrainingConfig` plus DAR's own settings (He et al. 2026, arXiv:2602.11523)."""

    alpha: Fraction = 0.1
    """Share of the regularisation that goes to π₀, in [0, 1]."""
    beta: Positive = 0.05
    """Total KL weight, reward units per nat."""
    w_clip: Annotated[float, Field(gt=0)] = 20.0
    """Upper bound of w_reg · w_adv; `inf` turns clipping off."""
    weight_scale: Literal["none", "clip", "mean"] = "none"
    """Divide weights by nothing (the paper), by w_clip, or by their mean."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""

    @classmethod
    def from_2025(cls, *, alpha_25: float, beta_25: float, **settings: Any) -> DARConfig:
        """From the letters of arXiv:2504.14177, where each KL has its own coefficient; see `DARSpec.from_2025`."""
        letters = DARSpec.from_2025(alpha_25=alpha_25, beta_25=beta_25)
        return cls(alpha=letters.alpha, beta=letters.beta, **settings)

    @property
    def algorithm(self) -> DARSpec:
        """DAR's spec."""
        return DARSpec(
            alpha=self.alpha,
            beta=self.beta,
            w_clip=self.w_clip,
            weight_scale=self.weight_scale,
            updates=self.updates,
        )


@dataclass(frozen=True)
class TrainResult:
    """steps: completed (fewer than asked for after Ctrl-C). metrics: the lines of metrics.jsonl. output_dir: the run
    folder."""

    steps: int
    metrics: list[dict[str, Any]]
    output_dir: str


class Trainer:
    """Aligns a language model online with any algorithm of the library.

    Args:
        model: a Hub id, folder or `.gguf` file, or a transformers causal language model.
        reward_funcs: one or several: functions with TRL's signature, built-in names (`"sentiment"`), or import paths
            (`"pkg.mod:fn"`).
        args: shared settings.
        train_dataset: prompts to train on: a `datasets.Dataset`, an iterable of rows, or a path.
        algorithm: a name (`"dar"`, `"rloo"`, `"grpo"`) for its defaults, or its spec.
        eval_dataset: held-out prompts, of the same kinds.
        ref_model: π₀; by default the policy before training.
        processing_class: the tokenizer; by default the model's.
        peft_config: a peft configuration, to train an adapter.
        callbacks: told about every line of metrics.

    Raises:
        ConfigError: settings that do not fit together; the rest is checked when `train` begins.
    """

    def __init__(
        self,
        model: str | Any,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str],
        args: TrainingConfig,
        train_dataset: str | Iterable[Any],
        *,
        algorithm: str | AlgorithmSpec = "dar",
        eval_dataset: str | Iterable[Any] | None = None,
        ref_model: str | Any | None = None,
        processing_class: Any | None = None,
        peft_config: Any | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        if isinstance(args, DARConfig) and algorithm == "dar":
            algorithm = args.algorithm
        rewards, functions = _rewards(reward_funcs, args.reward_weights)
        self.spec = args.run_spec(
            model=_described(model),
            reference=None if ref_model is None else _described(ref_model),
            train=_described(train_dataset),
            heldout=None if eval_dataset is None else _described(eval_dataset),
            algorithm=_algorithm_spec(algorithm),
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
        )
        self.loop: Loop | None = None

    def train(self, resume_from_checkpoint: bool | None = None, *, allow_changed_recipe: bool = False) -> TrainResult:
        """Runs to the last step and saves `model/`.

        Args:
            resume_from_checkpoint: True continues the run in `output_dir` from its newest valid checkpoint.
            allow_changed_recipe: continue although settings have changed.

        Raises:
            DarError: whatever went wrong; nothing already saved is lost.
        """
        if isinstance(resume_from_checkpoint, str):
            raise ConfigError(
                f"resume_from_checkpoint is '{resume_from_checkpoint}', but must be True or False: a run continues "
                "from the newest valid checkpoint of its output_dir"
            )
        resume = bool(resume_from_checkpoint)
        self.loop = build_loop(self.spec, self._objects, resume=resume, allow_changed_recipe=allow_changed_recipe)
        return run_loop(self.loop, resume=resume, command="DARTrainer(…).train()")


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
        loop: from `dar.build.build_loop`.
        resume: continue from the newest checkpoint.
        command: for the model card.
    """
    try:
        done = loop.run(resume=resume)
    finally:
        loop.accelerator.end_training()
    metrics = loop.folder.metrics()
    if done == loop.spec.steps and loop.accelerator.is_main_process:
        save_policy(loop.policy, loop.folder.model, card=model_card(loop.spec, metrics, command=command))
        show_before_after(loop, metrics)
    return TrainResult(done, metrics, str(loop.folder.path))


def show_before_after(loop: Loop, metrics: list[dict[str, Any]]) -> None:
    """The held-out table and three completions side by side, read from the run folder."""
    evaluations = [row for row in metrics if "eval/reward" in row]
    if loop.display.quiet or len(evaluations) < 2:
        return
    before, after = ({key.removeprefix("eval/"): value for key, value in row.items()} for row in
                     (evaluations[0], evaluations[-1]))  # fmt: skip
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
    given: Callable[..., Any] | str | Sequence[Callable[..., Any] | str], weights: Sequence[float] | None
) -> tuple[list[dict[str, Any]], dict[str, RewardFunction]]:
    """The rewards as plain data, and those given as objects by name."""
    items = [given] if callable(given) or isinstance(given, str) else list(given)
    if weights is not None and len(weights) != len(items):
        raise ConfigError(f"reward_weights has {len(weights)} values for {len(items)} reward functions")
    specs: list[dict[str, Any]] = []
    functions: dict[str, RewardFunction] = {}
    for index, item in enumerate(items):
        weight = {"weight": float(weights[index])} if weights is not None else {}
        if isinstance(item, str):
            specs.append(({"type": "function", "function": item} if ":" in item else {"type": item}) | weight)
            continue
        given_name = getattr(item, "__name__", type(item).__name__)
        name, number = given_name, 1
        while name in functions:
            number += 1
            name = f"{given_name}_{number}"
        path = f"{getattr(item, '__module__', '?')}:{getattr(item, '__qualname__', given_name)}"
        specs.append({"type": "function", "function": path, "name": name} | weight)
        functions[name] = item
    return specs, functions


def _algorithm_spec(algorithm: str | AlgorithmSpec) -> AlgorithmSpec:
    if isinstance(algorithm, AlgorithmSpec):
        return algorithm
    if algorithm not in ALGORITHM_SPECS:
        raise ConfigError(f"algorithm '{algorithm}' is not known; there are {', '.join(ALGORITHM_SPECS)}")
    return ALGORITHM_SPECS[algorithm]()


def _described(value: Any) -> str:
    """The path of something given by path, or what kind of object it is."""
    if isinstance(value, str):
        return value
    name = getattr(getattr(value, "config", None), "name_or_path", "")
    return name or f"<{type(value).__name__}>"


def _object(value: Any) -> Any | None:
    return None if value is None or isinstance(value, str) else value
