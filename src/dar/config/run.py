"""The specs a recipe is made of: frozen, strict, and unable to say an impossible thing.

No torch in here: a recipe is checked in milliseconds, before anything is loaded. Every field's description is the
recipe reference (docs/recipes.md is generated from it).
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Base of every spec: frozen, strict about types, and helpful about misspelt keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    shorthand: ClassVar[str | None] = None
    """The field a bare string stands for: `model: some/path` is `model: {path: some/path}`."""

    @model_validator(mode="before")
    @classmethod
    def _expand_and_check_keys(cls, value: Any) -> Any:
        if isinstance(value, str) and cls.shorthand:
            return {cls.shorthand: value}
        if isinstance(value, dict):
            unknown = [key for key in value if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(unknown_key_message(key, list(cls.model_fields)) for key in unknown))
        return value


def unknown_key_message(key: object, allowed: list[str]) -> str:
    """`unknown key 'alhpa' (did you mean 'alpha'?); allowed: …`"""
    nearest = difflib.get_close_matches(str(key), allowed, n=1)
    hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
    return f"unknown key '{key}'{hint}; allowed: {', '.join(allowed)}"


# --- model -----------------------------------------------------------------------------------------------------------


class LoraSpec(Spec):
    """Train low-rank adapters only; the base model with the adapter off is then the reference."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scaling numerator: the adapter's output is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Which modules get an adapter: peft's `all-linear`, or a list of module-name suffixes."""


class ModelSourceSpec(Spec):
    """Where a model comes from."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """A Hub id, a folder, a `.gguf` file, or `package:NAME/inner/path` for a file shipped by an installed package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    sha256: str | None = None
    """Expected SHA-256 of a `.gguf` file; the run stops when the file is another one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class ModelSpec(ModelSourceSpec):
    """Where the policy comes from, and how it is trained."""

    lora: LoraSpec | None = None
    """Train LoRA adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


# --- data ------------------------------------------------------------------------------------------------------------


class SourceSpec(Spec):
    """One table of rows."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """A `.jsonl`, `.json`, `.parquet` or `.csv` file, `package:NAME/inner/path`, or a Hub data set id."""
    name: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set (a file has just one)."""
    max_rows: Count | None = None
    """Use only the first rows."""


class DataSpec(Spec):
    """Prompts to train on and prompts held out."""

    shorthand: ClassVar[str | None] = "train"

    train: SourceSpec
    """Prompts to sample from during training."""
    heldout: SourceSpec | None = None
    """Prompts never trained on, sampled before, during and after training."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string (used as it is) or a list of messages (the chat template is applied)."""
    wrap_as_user: bool = False
    """Turn a string prompt into one user message, so that the chat template is applied to it."""
    system_prompt: str | None = None
    """A system message put before every conversation that has none."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens; by default the model's context less `sampling.max_completion_length`."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do, before training starts, with prompts longer than that: stop, or leave them out and say how many."""


class SamplingSpec(Spec):
    """How completions are drawn. Truncating samplers (top-k, top-p) would change π_t and are not offered."""

    max_completion_length: Count = 256
    """Most tokens a completion may have."""
    temperature: Positive = 1.0
    """Divides the logits of policy, behaviour policy and reference alike, so the closed form stays exact."""


# --- algorithms ------------------------------------------------------------------------------------------------------


class AlgorithmSpec(Spec):
    """Base of the algorithms' specs: `type` says which."""

    shorthand: ClassVar[str | None] = "type"
    needs_group: ClassVar[bool] = False
    """Whether the method compares the completions of one prompt, and so needs at least two."""


class DARSpec(AlgorithmSpec):
    """Dual-regularized Advantage Regression (He et al. 2026, arXiv:2602.11523)."""

    type: Literal["dar"] = "dar"
    """`dar`"""
    alpha: Fraction = 0.1
    """Share of the regularisation that goes to the initial model π₀; the rest goes to the current policy π_t."""
    beta: Positive = 0.05
    """Total KL weight, in reward units (batch standard deviations, when normalised) per nat."""
    w_clip: Annotated[float, Field(gt=0)] = 20.0
    """Upper bound of the product w_reg · w_adv; `.inf` turns clipping off."""
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """Monte-Carlo baseline. With one completion per prompt the group mean is left out and the batch mean serves."""
    normalize: Literal["batch", "none"] = "batch"
    """Divide advantages by their standard deviation over the global batch (and centre them), or leave them."""
    weight_scale: Literal["none", "clip", "mean"] = "none"
    """Divide weights by nothing (the paper), by `w_clip`, or by their mean over the global batch."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts; weights stay those of π_t."""

    @model_validator(mode="after")
    def _finite_scale(self) -> DARSpec:
        if self.weight_scale == "clip" and math.isinf(self.w_clip):
            raise ValueError("weight_scale is 'clip', but w_clip is infinite: there is nothing to divide by")
        return self

    @classmethod
    def from_2025(cls, *, alpha_25: float, beta_25: float, **others: Any) -> DARSpec:
        """The spec from the letters of the 2025 paper, where each KL has a coefficient of its own.

            J = E[A] − α₂₅ KL[π_θ‖π₀] − β₂₅ KL[π_θ‖π_t]   ⇔   β = α₂₅ + β₂₅,  α = α₂₅ / (α₂₅ + β₂₅)

        Args:
            alpha_25: coefficient of the KL to π₀, reward units per nat, ≥ 0.
            beta_25: coefficient of the KL to π_t, reward units per nat, ≥ 0.
            others: further fields of the spec.

        Raises:
            ValueError: a coefficient is negative, or both are 0.

        He et al. 2025, arXiv:2504.14177. Its default 0.005 and 0.045 is α = 0.1, β = 0.05 here.
        """
        if alpha_25 < 0 or beta_25 < 0 or alpha_25 + beta_25 <= 0:
            raise ValueError(f"coefficients must be ≥ 0 and not both 0, got {alpha_25} and {beta_25}")
        total = alpha_25 + beta_25
        return cls(alpha=alpha_25 / total, beta=total, **others)


class RLOOSpec(AlgorithmSpec):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740); KL to π₀ in the reward."""

    needs_group: ClassVar[bool] = True

    type: Literal["rloo"] = "rloo"
    """`rloo`"""
    beta: NotNegative = 0.05
    """Coefficient of the KL to π₀, subtracted from the reward; 0 leaves the reference out."""
    clip_low: Fraction = 0.2
    """Lower clip of the sequence ratio (active from the second update of a batch on)."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """Upper clip of the sequence ratio; `.inf` = none."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class GRPOSpec(AlgorithmSpec):
    """Group relative policy optimization as published (Shao et al. 2024, arXiv:2402.03300); KL to π₀ in the loss."""

    needs_group: ClassVar[bool] = True

    type: Literal["grpo"] = "grpo"
    """`grpo`"""
    beta: NotNegative = 0.04
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""
    clip_low: Fraction = 0.2
    """Lower clip of the token ratio."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """Upper clip of the token ratio; `.inf` = none."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


AnyAlgorithm = Annotated[DARSpec | RLOOSpec | GRPOSpec, Field(discriminator="type")]
ALGORITHM_SPECS: dict[str, type[AlgorithmSpec]] = {"dar": DARSpec, "rloo": RLOOSpec, "grpo": GRPOSpec}


# --- rewards ---------------------------------------------------------------------------------------------------------


class RewardSpec(Spec):
    """Base of the rewards' specs: `type` says which."""

    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of this reward in the sum."""
    name: str | None = None
    """Name in metrics (`rewards/<name>/mean`); by default the type, or the function's name."""


class FunctionRewardSpec(RewardSpec):
    """A Python function, by import path."""

    type: Literal["function"] = "function"
    """`function`"""
    function: str
    """`package.module:function`"""

    @field_validator("function")
    @classmethod
    def _has_both_parts(cls, value: str) -> str:
        module, _, attribute = value.partition(":")
        if not module or not attribute:
            raise ValueError(f"expected 'package.module:function', got '{value}'")
        return value


class SentimentRewardSpec(RewardSpec):
    """VADER compound score of the completion, in [−1, 1] (Hutto & Gilbert 2014)."""

    type: Literal["sentiment"] = "sentiment"
    """`sentiment`"""


class LengthRewardSpec(RewardSpec):
    """−|tokens − target| / target: 0 at the target, −1 for an empty or a twice too long completion."""

    type: Literal["length"] = "length"
    """`length`"""
    target: Count
    """Wanted completion length in tokens, EOS included."""


class RegexRewardSpec(RewardSpec):
    """1 where the pattern is found in the completion, 0 elsewhere."""

    type: Literal["regex"] = "regex"
    """`regex`"""
    pattern: str
    """Python regular expression, searched anywhere in the completion (dot matches newlines)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class MissingEosPenaltySpec(RewardSpec):
    """−penalty for a completion that was cut off before it ended by itself, 0 for the others."""

    type: Literal["missing_eos_penalty"] = "missing_eos_penalty"
    """`missing_eos_penalty`"""
    penalty: Positive = 1.0
    """What is subtracted, in reward units."""


AnyReward = Annotated[
    FunctionRewardSpec | SentimentRewardSpec | LengthRewardSpec | RegexRewardSpec | MissingEosPenaltySpec,
    Field(discriminator="type"),
]


# --- optimisation ----------------------------------------------------------------------------------------------------


class OptimSpec(Spec):
    """Base of the optimizers' specs: `type` says which."""

    shorthand: ClassVar[str | None] = "type"

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at the last step linearly or along a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm; `.inf` turns clipping off."""


class AdamWSpec(OptimSpec):
    """AdamW (Loshchilov & Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    """`adamw`"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the squared gradient's running mean."""
    eps: Positive = 1e-8
    """Added to the denominator."""


class AdafactorSpec(OptimSpec):
    """Adafactor (Shazeer & Stern 2018): the second moment of a matrix kept as a row and a column."""

    type: Literal["adafactor"] = "adafactor"
    """`adafactor`"""


AnyOptim = Annotated[AdamWSpec | AdafactorSpec, Field(discriminator="type")]


# --- the run ---------------------------------------------------------------------------------------------------------


class EvaluationSpec(Spec):
    """Sampling on held-out prompts. Always done before the first and after the last step when `data.heldout` is set."""

    every: Annotated[int, Field(ge=0)] = 0
    """Also every so many steps; 0 = only before and after."""
    num_generations: Count = 4
    """Completions per held-out prompt."""
    max_prompts: Count | None = None
    """Use only the first held-out prompts."""


class CheckpointSpec(Spec):
    """What is saved to continue from."""

    every: Annotated[int, Field(ge=0)] = 50
    """Save every so many steps; 0 = only at the end (and at Ctrl-C)."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""


class LoggingSpec(Spec):
    """What is written down, and where to. `metrics.jsonl` always has every step."""

    every: Count = 1
    """Show a line and tell the trackers every so many steps."""
    trackers: list[str] = Field(default_factory=list)
    """accelerate's trackers by name: tensorboard, wandb, trackio, …"""
    completions_every: Annotated[int, Field(ge=0)] = 10
    """Write `completions/step-N.parquet` and show a sample every so many steps; 0 = never."""
    old_kl_prompts: Annotated[int, Field(ge=0)] = 1
    """Prompts whose completions are scored before and after the update, to measure KL(π_t‖π_t+1); 0 = none."""


class RuntimeSpec(Spec):
    """Where and how it runs: speed and memory, not the method."""

    device: str = "auto"
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products: bf16 where the processor has it, or fp32. Weights and log-softmax are fp32."""
    max_tokens_per_microbatch: Count = 4096
    """Tokens of one forward and backward pass, each prompt counted once. A prompt's completions stay together."""
    negligible_share: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Rows that together carry at most this share of Σ weight · length are left out of the update; 0 = only rows of
    weight 0, whose gradient is exactly 0."""
    max_cache_tokens: Count = 16384
    """Prompt and completion tokens whose keys and values the sampler holds at once; further prompts wait their turn."""
    max_logprob_gap: Positive = 0.15
    """Mean absolute gap, nats per token, between the sampler's and the trainer's log-probabilities that stops a run."""


class RunSpec(Spec):
    """A whole recipe."""

    model: ModelSpec
    """The policy to train: a path, or a mapping."""
    reference: ModelSourceSpec | None = None
    """π₀; by default the policy before training."""
    data: DataSpec
    """Prompts: a path, or a mapping."""
    algorithm: AnyAlgorithm = Field(default_factory=DARSpec)
    """The method: a name, or a mapping with `type`."""
    rewards: Annotated[list[AnyReward], Field(min_length=1)]
    """What to maximise: a list of names, import paths (`pkg.mod:fn`) or mappings; the weighted sum counts."""
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)
    """How completions are drawn."""
    optim: AnyOptim = Field(default_factory=AdamWSpec)
    """The optimizer: a name, or a mapping with `type`."""
    prompts_per_step: Count = 32
    """Prompts per step, over all ranks."""
    num_generations: Count = 4
    """Completions per prompt (K)."""
    steps: Count
    """Batches of rollouts."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the prompt order and of every sampled token."""
    output_dir: str
    """The run folder."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """Sampling on held-out prompts."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """What is saved to continue from."""
    logging: LoggingSpec = Field(default_factory=LoggingSpec)
    """What is written down, and where to."""
    runtime: RuntimeSpec = Field(default_factory=RuntimeSpec)
    """Where and how it runs."""

    @field_validator("algorithm", "optim", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _dar_unless_said(cls, value: Any) -> Any:
        return {"type": "dar", **value} if isinstance(value, dict) else value

    @field_validator("optim", mode="before")
    @classmethod
    def _adamw_unless_said(cls, value: Any) -> Any:
        return {"type": "adamw", **value} if isinstance(value, dict) else value

    @field_validator("rewards", mode="before")
    @classmethod
    def _expand_rewards(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError(
                "expected a list of rewards, for example [sentiment] or [my_package.my_module:my_function]"
            )
        return [expand_reward(item) for item in value]

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if self.algorithm.needs_group and self.num_generations < 2:
            raise ValueError(
                f"num_generations is 1, but {self.algorithm.type} compares the completions of one prompt: set it to 2 "
                "or more (dar works with 1: the batch mean is then the baseline)"
            )
        leaves_out = isinstance(self.algorithm, DARSpec) and self.algorithm.baseline == "leave_one_out"
        if leaves_out and self.num_generations < 2:
            raise ValueError("num_generations is 1: algorithm.baseline leave_one_out needs 2 or more")
        names = [reward_name(reward) for reward in self.rewards]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"rewards share a name ({', '.join(repeated)}): give each its own with the key 'name'")
        return self


def reward_name(spec: RewardSpec) -> str:
    """The reward's name in metrics: as given, or the function's name, or the type."""
    if spec.name:
        return spec.name
    if isinstance(spec, FunctionRewardSpec):
        return spec.function.rpartition(":")[2]
    return spec.type  # pyright: ignore[reportAttributeAccessIssue] - every concrete spec has it


def expand_reward(item: Any) -> Any:
    """A reward given by name (`sentiment`) or import path (`pkg.mod:fn`) as a mapping; others as they are."""
    if isinstance(item, str):
        return {"type": "function", "function": item} if ":" in item else {"type": item}
    if isinstance(item, dict) and "type" not in item and "function" in item:
        return {"type": "function", **item}
    return item
