"""Flat configurations of the Python face, under TRL's names where they mean the same.

A configuration does one thing: it becomes the recipe's spec, the only one the rest of the library knows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dar.config.algorithm import AlgorithmSpec
from dar.config.base import Count, Fraction, NotNegative, Positive, Spec
from dar.config.recipe import apply_override, build_spec, explain
from dar.config.regression import DARSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError

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
    "top_p": "nothing: truncating samplers change the distribution the weights assume; held-out prompts have "
    "overrides=['evaluation.top_p=…']",
    "top_k": "nothing: truncating samplers change the distribution the weights assume; held-out prompts have "
    "overrides=['evaluation.top_k=…']",
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
    torch_compile: bool = False
    """Compile the decoder layers for the update; needs a C++ compiler."""
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
                "compile_layers": self.torch_compile,
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
        return cls(alpha=letters.alpha, beta=alpha_25 + beta_25, **settings)

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
