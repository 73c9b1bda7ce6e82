"""Flat configurations of the Python face, under TRL's names where they mean the same.

A configuration does one thing: it becomes the recipe's spec, the only one the rest of the library knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dar.config.algorithm import AlgorithmSpec
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.base import Count, Fraction, NotNegative, Positive, Spec, keys_below
from dar.config.other_names import instead
from dar.config.policy_gradient import GRPOSpec
from dar.config.recipe import apply_override, build_spec
from dar.config.regression import DARSpec
from dar.config.run import RunSpec

_ARGUMENTS = {
    "model": "the trainer's model",
    "model.lora": "the trainer's peft_config",
    "reference": "the trainer's ref_model",
    "data.train": "the trainer's train_dataset",
    "data.heldout": "the trainer's eval_dataset",
    "rewards": "the trainer's reward_funcs",
    "algorithm": "the trainer's algorithm",
}
"""Keys of a recipe that are arguments of the trainers."""


class FlatConfig(Spec):
    """Settings that every training has, under TRL's names where they mean the same.

    Raises (when constructed):
        ConfigError: all that is unknown or impossible, and for a name of TRL's what to use instead.
    """

    recipe: ClassVar[type[Spec]]
    """What it becomes."""
    keys: ClassVar[dict[str, str]] = {
        **{name: name for name in ("output_dir", "seed")},
        **{name: f"optim.{name}" for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")},
        **{name: f"runtime.{name}" for name in ("device", "precision", "max_tokens_per_microbatch")},
        "optim": "optim.type",
        "lr_scheduler_type": "optim.schedule",
        "gradient_checkpointing": "model.gradient_checkpointing",
        "save_steps": "checkpoint.every",
        "save_total_limit": "checkpoint.keep",
    }
    """Settings that are a key of the recipe, and which."""

    output_dir: Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)]
    """The run folder."""
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """The schedule after warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    optim: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
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
    save_steps: int = 50
    """Save a checkpoint every so many steps; 0 = only at the end."""
    save_total_limit: Count = 2
    """How many checkpoints stay."""
    overrides: list[str] = Field(default_factory=list)
    """Any other key of the recipe, as `key.path=value`, for example `evaluation.num_generations=8`."""

    @classmethod
    def other_way(cls, key: str, type: object) -> str | None:
        # An adapter is the trainer's peft_config.
        keys = [name for name in keys_below(cls.recipe) if not name.startswith("model.lora.")]
        return instead(key, keys, cls.written)

    @classmethod
    def written(cls, key: str) -> str:
        """How a recipe's key is written in Python."""
        flat = {same: name for name, same in cls.keys.items()}
        if key.startswith("algorithm.") and key not in flat:
            option, _, part = (below := key.removeprefix("algorithm.")).partition(".")
            owners = [spec for spec in ALGORITHM_SPECS.values() if below in keys_below(spec)]
            owner = GRPOSpec if GRPOSpec in owners else owners[0]
            value = f"{{'{part}': …}}" if part else "…"
            return f"algorithm={owner.__name__}({option}={value})"
        return flat.get(key) or _ARGUMENTS.get(key, f"overrides=['{key}=…']")

    def filled(self, raw: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
        """A recipe as plain data, with some settings at their keys and the overrides applied.

        Raises:
            ConfigError: an override is none.
        """
        for name, key in keys.items():
            if getattr(self, name) is None:
                continue  # as it is in a recipe that says nothing
            *sections, last = key.split(".")
            target = raw
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = getattr(self, name)
        for override in self.overrides:
            apply_override(raw, override)
        return raw


class TrainingConfig(FlatConfig):
    """Settings every algorithm shares. Raises as `FlatConfig`."""

    recipe = RunSpec
    keys: ClassVar[dict[str, str]] = {
        **FlatConfig.keys,
        **{name: name for name in ("prompts_per_step", "num_generations")},
        **{name: f"sampling.{name}" for name in ("max_completion_length", "temperature")},
        "max_steps": "steps",
        "torch_compile": "runtime.compile_layers",
        "eval_steps": "evaluation.every",
        "logging_steps": "logging.every",
        "report_to": "logging.trackers",
        "hub_model_id": "hub.repository",
        "hub_private_repo": "hub.private",
    }

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
    torch_compile: bool = False
    """Compile the decoder layers for the update; needs a C++ compiler."""
    logging_steps: Count = 1
    """Show a line and tell the trackers every so many steps."""
    eval_steps: int = 0
    """Evaluate on the held-out prompts every so many steps; 0 = only before and after."""
    report_to: str | list[str] | None = None
    """Trackers by name."""
    hub_model_id: str | None = None
    """Upload the trained model, its card and the report to `ME/NAME` on the Hub when the run is finished."""
    hub_private_repo: bool | None = None
    """Whether only you see a new repository: by default only you do."""
    reward_weights: list[float] | None = None
    """Factors of the reward functions, in their order."""

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
            "model": {"path": model},
            "reference": reference,
            "data": {"train": train, "heldout": heldout},
            "algorithm": algorithm.model_dump(),
            "rewards": rewards,
            "logging": {"trackers": [name for name in trackers if name != "none"]},
        }
        keys = {name: key for name, key in TrainingConfig.keys.items() if name != "report_to"}
        return build_spec(self.filled(raw, keys), where=type(self).__name__)


class DARConfig(TrainingConfig):
    """`TrainingConfig` plus DAR's own settings (He et al. 2026, arXiv:2602.11523)."""

    keys: ClassVar[dict[str, str]] = {
        **TrainingConfig.keys,
        **{name: f"algorithm.{name}" for name in ("alpha", "beta", "w_clip", "weight_scale", "updates")},
    }

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
        return DARSpec(**{name: getattr(self, name) for name in DARConfig.keys.keys() - TrainingConfig.keys.keys()})
