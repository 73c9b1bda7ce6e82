"""The spec of a whole run: a recipe."""

from __future__ import annotations

import math
from functools import reduce
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dar.config.alerts import AnyAlerts, RetentionAlertSpec, why_blind, why_silent
from dar.config.algorithms import AnyAlgorithm
from dar.config.base import Count, Positive, Rows, Seed, Spec, by_type
from dar.config.cluster import ClusterSpec
from dar.config.data import DataSpec, SamplingSpec, TruncationSpec
from dar.config.engine import AnyEngine, InProcessSpec, VLLMSpec
from dar.config.flow import ALERTS_OF_TEXT, TEXT_ONLY, AnyModel, FlowModelSpec
from dar.config.model import ModelSourceSpec, ReferenceSyncSpec
from dar.config.optim import AdafactorSpec, AdamW8BitSpec, AdamWSpec, AnyOptim
from dar.config.preference import PairedSpec
from dar.config.problems import unknown_name_message
from dar.config.realignment import TRACESpec
from dar.config.regression import DARSpec
from dar.config.rewards import AnyRewards, FunctionRewardSpec, reward_name
from dar.files.paths import expanded, hub_name


class EvaluationSpec(TruncationSpec):
    """Sampling on held-out prompts. Always done before the first and after the last step when `data.heldout` is set."""

    every: Annotated[int, Field(ge=0)] = 0
    """Also every so many steps; 0 = only before and after."""
    num_generations: Rows = 4
    """Completions per held-out prompt."""
    max_prompts: Count | None = None
    """Use only the first held-out prompts."""
    rewards: AnyRewards = Field(default_factory=list)
    """Held-out rewards, written as in `rewards`: measured on held-out completions (`eval/gold`), never trained on."""


class BestSpec(Spec):
    """Which held-out evaluation is the best one. Its policy stays in `best/`, an ordinary model folder."""

    shorthand = "metric"

    metric: str = "eval/reward"
    """`eval/reward`, `eval/gold`, or the mean of one of their parts: `eval/rewards/<name>/mean`,
    `eval/gold/<name>/mean`."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest value is the best, or the smallest. Of equal ones it is the first."""


class CheckpointSpec(Spec):
    """What is saved: to continue from, and the best policy."""

    every: Annotated[int, Field(ge=0)] = 50
    """Save every so many steps; 0 = only at the end (and at Ctrl-C)."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""
    best: BestSpec | None = None
    """Keep the policy of the best held-out evaluation; by default none is kept."""


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


class HubSpec(Spec):
    """Where the trained model goes when the run is finished, with its card and the run's report."""

    shorthand = "repository"

    repository: Annotated[str, AfterValidator(hub_name)]
    """`ME/NAME` on the Hub; made where there is none."""
    private: bool = True
    """Of a new repository: only you see it. One that is there stays as it is."""


class ComputeSpec(Spec):
    """Where and in what portions a model computes."""

    device: str = "auto"
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products: bf16 where the processor has it, or fp32. Weights and log-softmax are fp32."""
    max_tokens_per_microbatch: Count = 4096
    """Tokens of one forward and backward pass, each prompt counted once. A prompt's completions stay together."""
    rank_timeout: Annotated[float, Field(ge=1, le=1e6)] = 3600.0
    """Seconds for which several processes (torchrun) wait for one of them before all end with an error. An hour: some
    rank always waits for the slowest reward, and for whatever the main one writes."""


class RuntimeSpec(ComputeSpec):
    """Where and how it runs: speed and memory, not the method."""

    sharding: Literal["none", "full"] = "none"
    """What several processes (torchrun) hold of the weights: `none`, each all of them (DDP), or `full`, each a part of
    every weight, gradient and moment, the reference's and the critic's, too (FSDP2). One process holds all."""
    negligible_share: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Rows that together move at most this share of √Σ load², over all tokens, are left out of the update
    (docs/performance.md); 0 = only rows of weight 0, whose gradient is exactly 0."""
    compile_layers: bool = False
    """Compile the decoder layers for the update (torch.compile): less memory a step, for most of a minute at the first.
    Needs a C++ compiler."""
    max_logprob_gap: Positive = 0.15
    """Mean absolute gap, nats per token, between the sampler's and the trainer's log-probabilities that stops a run."""


class RunSpec(Spec):
    """A whole recipe."""

    model: AnyModel
    """The policy to train: a path, or a mapping; with `type: flow` a flow-matching model."""
    reference: ModelSourceSpec | None = None
    """π₀; by default the policy before training."""
    reference_sync: ReferenceSyncSpec | None = None
    """Let π₀ follow the policy every so many steps; by default it stays as it is."""
    data: DataSpec
    """Prompts: a path, or a mapping."""
    algorithm: AnyAlgorithm = Field(default_factory=DARSpec)
    """The method: a name, or a mapping with `type`."""
    rewards: AnyRewards = Field(default_factory=list)
    """What to maximise: a list of names, import paths (`pkg.mod:fn`) or mappings; the weighted sum counts. Required,
    except that offline methods use them for held-out prompts only."""
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)
    """How completions are drawn."""
    engine: Annotated[AnyEngine, by_type()] = Field(default_factory=InProcessSpec)
    """What draws them: a name, or a mapping with `type`."""
    optim: AnyOptim = Field(default_factory=AdamWSpec)
    """The optimizer: a name, or a mapping with `type`."""
    prompts_per_step: Rows = 32
    """Prompts per step, over all ranks."""
    num_generations: Rows = 4
    """Completions per prompt (K)."""
    steps: Count
    """Batches of rollouts."""
    seed: Seed = 0
    """Seed of the prompt order and of every sampled token."""
    output_dir: Annotated[str, AfterValidator(expanded)]
    """The run folder."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """Sampling on held-out prompts."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """What is saved: to continue from, and the best policy."""
    alerts: AnyAlerts = Field(default_factory=list)
    """What the run is watched for: a list of names or mappings with `type`."""
    logging: LoggingSpec = Field(default_factory=LoggingSpec)
    """What is written down, and where to."""
    hub: HubSpec | None = None
    """Upload the trained model: a name, or a mapping; by default it stays here."""
    runtime: RuntimeSpec = Field(default_factory=RuntimeSpec)
    """Where and how it runs."""
    cluster: ClusterSpec | None = None
    """Who takes part on a Ray cluster; by default all happens in this process (and its ranks)."""

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if self.algorithm.needs_group and self.num_generations < 2:
            raise ValueError(
                f"num_generations is 1, but {self.algorithm.type} compares the completions of one prompt: set it to 2 "
                "or more (dar works with 1: the batch mean is then the baseline)"
            )
        if self.sampling.resample_tied is not None and self.num_generations < 2:
            raise ValueError("num_generations is 1: sampling.resample_tied needs 2 or more, to see which are tied")
        if self.algorithm.logged:
            self._check_offline()
        elif not self.rewards:
            raise ValueError(f"rewards is empty, but {self.algorithm.type} learns from the rewards of its own samples")
        if isinstance(self.algorithm, PairedSpec) and self.sampling.mask_truncated:
            raise ValueError(
                f"sampling.mask_truncated would tear the pairs of {self.algorithm.type} apart: a missing_eos_penalty "
                "among the rewards makes a truncated completion the rejected one instead"
            )
        if self.reference_sync is not None and self.model.lora is not None:
            raise ValueError("reference_sync needs a reference of its own, but with model.lora the base model is π₀")
        if isinstance(self.model, FlowModelSpec):
            self._check_flow()
        elif self.sampling.max_staleness and isinstance(self.engine, InProcessSpec) and self.cluster is None:
            raise ValueError(
                "sampling.max_staleness has completions sampled while the policy learns, but engine.type in_process "
                "samples with the trainer's own weights: take engine.type vllm, an engine of yours that has `submit`, "
                "or a cluster, or leave max_staleness at 0"
            )
        elif self.runtime.compile_layers and self.model.rank_schedule is not None:
            raise ValueError("runtime.compile_layers needs layers of one rank: give model.lora.rank a number")
        if self.runtime.sharding == "full":
            self._check_sharded()
        if isinstance(self.algorithm, DARSpec):
            compares = {"baseline": "leave_one_out", "normalize_weights": "group"}.items() & {*self.algorithm}
            if compares and self.num_generations < 2:
                raise ValueError(f"num_generations is 1: algorithm.{' '.join(min(compares))} needs 2 or more")
            if self.algorithm.center_weights and self.sampling.mask_truncated:
                why = "would have the mean that algorithm.center_weights subtracts push down endings as such"
                raise ValueError(f"sampling.mask_truncated {why}: take a missing_eos_penalty among the rewards")
        if self.prompts_per_step * self.num_generations > 10**7:
            raise ValueError("prompts_per_step × num_generations is more than ten million completions a step")
        if self.evaluation.rewards and self.data.heldout is None:
            raise ValueError("evaluation.rewards measure held-out completions, but data.heldout names no prompts")
        return self

    @model_validator(mode="after")
    def _alerts_see_something(self) -> RunSpec:
        evaluation = self.evaluation
        tasks = [alert.task for alert in self.alerts if isinstance(alert, RetentionAlertSpec)]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"alerts: two of type retention watch one of {', '.join(tasks)}, which has one place")
        for index, alert in enumerate(self.alerts):
            reason = why_blind(
                alert,
                is_offline=self.algorithm.logged is not None,
                is_plain=evaluation.is_plain,
                has_gold=bool(evaluation.rewards),
                num_evaluations=self._num_evaluations,
            )
            if reason is not None:
                raise ValueError(f"alerts.{index} ({alert.type}) could never fire: {reason}")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> RunSpec:
        best = self.checkpoint.best
        if best is None:
            return self
        if self.data.heldout is None:
            raise ValueError("checkpoint.best compares held-out evaluations, but data.heldout names no prompts")
        allowed = ["eval/loss"] if self.algorithm.logged else []
        if self.algorithm.logged in ("preferences", "verdicts"):
            allowed += ["eval/rewards/accuracies", "eval/rewards/margins"]
        if self.rewards:
            allowed += ["eval/reward", *(f"eval/rewards/{reward_name(reward)}/mean" for reward in self.rewards)]
        if self.evaluation.rewards:
            allowed += ["eval/gold", *(f"eval/gold/{reward_name(reward)}/mean" for reward in self.evaluation.rewards)]
        if best.metric not in allowed:
            raise ValueError(f"checkpoint.best.metric: {unknown_name_message('metric', best.metric, allowed)}")
        return self

    @property
    def silent_alerts(self) -> list[str]:
        """Which alerts cannot fire because the run is too short for them, and why."""
        lengths = {"num_steps": self.steps, "num_evaluations": self._num_evaluations}
        found = [(alert.type, why_silent(alert, **lengths)) for alert in self.alerts]
        return [f"the alert {name} cannot fire: {reason}" for name, reason in found if reason is not None]

    @property
    def _num_evaluations(self) -> int:
        """Of samples: before the first step, every so many, and after the last."""
        if self.data.heldout is None or not self.rewards:
            return 0
        every = self.evaluation.every or self.steps
        return 1 + math.ceil(self.steps / every)

    def _check_sharded(self) -> None:
        reasons = {
            "optim.type adafactor takes means over rows and columns of": isinstance(self.optim, AdafactorSpec),
            "optim.type adamw_8bit rounds blocks of": isinstance(self.optim, AdamW8BitSpec),
            "optim.null_space projects": self.optim.null_space is not None,
            "runtime.compile_layers compiles for": self.runtime.compile_layers,
            "model.lora.rank as a mapping takes singular values of": self.model.rank_schedule is not None,
            "algorithm.kl_coef of trace asks π₀'s head for": isinstance(self.algorithm, TRACESpec)
            and self.algorithm.kl_coef > 0,
        }
        for reason, is_so in reasons.items():
            if is_so:
                raise ValueError(f"runtime.sharding full keeps parts of weights, but {reason} whole ones: use none")

    def _check_flow(self) -> None:
        for key in TEXT_ONLY:
            *path, name = key.split(".")
            part = reduce(getattr, path, self)
            field = type(part).model_fields.get(name) if isinstance(part, Spec) else None
            if field is not None and getattr(part, name) != field.get_default(call_default_factory=True):
                raise ValueError(f"{key} is for language models: it does nothing for a flow-matching one, remove it")
        rewards = (*self.rewards, *self.evaluation.rewards)
        readers = [f"the reward {reward_name(each)}" for each in rewards if not isinstance(each, FunctionRewardSpec)]
        readers += [f"the alert {alert.type}" for alert in self.alerts if alert.type in ALERTS_OF_TEXT]
        readers += [self.algorithm.type] if self.algorithm.logged else []
        readers += ["engine.type vllm"] if isinstance(self.engine, VLLMSpec) else []
        if readers:
            raise ValueError(f"{readers[0]} reads texts, but model.type is flow")

    def _check_offline(self) -> None:
        method = self.algorithm.type
        if self.evaluation.rewards and not self.rewards:
            raise ValueError("evaluation.rewards stand beside rewards, but rewards is empty: name those, too")
        given = self.sampling
        if given.mask_truncated or given.correction != "none" or given.max_staleness or given.resample_tied:
            raise ValueError(
                f"{method} learns from the data's completions: sampling.mask_truncated, correction, max_staleness and "
                "resample_tied do nothing"
            )
