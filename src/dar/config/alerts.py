"""Specs of the alerts, one per `type`: what a run is watched for, and what happens then."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dar.config.base import Count, Fraction, NotNegative, Positive, Spec
from dar.config.data import LMEvalSpec


class AlertSpec(Spec):
    """Base of the alerts' specs: `type` says which."""

    action: Literal["log", "mark", "stop"] = "mark"
    """`log`: show it and write it to `alerts.jsonl`. `mark`: also highlight it in the report. `stop`: also save a
    checkpoint and end the run."""


class SampledAlertSpec(AlertSpec):
    """What alerts on the policy's samples share."""

    samples: Literal["train", "heldout"] = "train"
    """Whether the training steps are watched, or the held-out evaluations."""
    window: Count = 4
    """The figure is the mean of so many steps (or evaluations), the last ones; at the start, the first ones."""


class MissingEosAlertSpec(SampledAlertSpec):
    """Too many completions run out of room before they end by themselves (`completions/clipped_ratio`)."""

    type: Literal["missing_eos"] = "missing_eos"
    max: Fraction = 0.5
    """Share of completions."""


class KLAlertSpec(SampledAlertSpec):
    """The policy is too far from π₀ (`kl/ref`)."""

    type: Literal["kl"] = "kl"
    max: Positive
    """Nats per completion."""


class LengthDriftAlertSpec(SampledAlertSpec):
    """Completions have become much longer or shorter than at the start (`completions/mean_length`)."""

    type: Literal["length_drift"] = "length_drift"
    max_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """Mean length / mean length at the start, or its inverse."""


class EntropyAlertSpec(SampledAlertSpec):
    """The policy's entropy has collapsed (`entropy`)."""

    type: Literal["entropy"] = "entropy"
    min_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Entropy / entropy at the start."""


class RepetitionAlertSpec(SampledAlertSpec):
    """Completions repeat themselves (`completions/repetition`)."""

    type: Literal["repetition"] = "repetition"
    max: Fraction = 0.5
    """Mean share of a completion's tokens that lie inside its longest repeated n-gram."""


class NoSignalAlertSpec(SampledAlertSpec):
    """Most groups have no difference in reward, so that nothing is learned from them (`frac_reward_zero_std`)."""

    type: Literal["no_signal"] = "no_signal"
    max: Fraction = 0.9
    """Share of groups."""


class OveroptimizationAlertSpec(AlertSpec):
    """The reward that is trained on (`eval/reward`) rises while the held-out reward (`eval/gold`) falls.

    A straight line is fitted to each over the window, and what it rises or falls from the window's first evaluation to
    its last is compared.
    """

    type: Literal["overoptimization"] = "overoptimization"
    window: Annotated[int, Field(ge=2)] = 3
    """How many evaluations, the last ones."""
    min_rise: NotNegative = 0.0
    """The reward rises by more than this, reward units."""
    min_fall: NotNegative
    """The held-out reward falls by more than this, in its units: more than the noise of an evaluation."""


class RetentionAlertSpec(LMEvalSpec, AlertSpec):
    """The policy unlearns something else: its score in a task of lm-eval falls (`eval/retention/<task>`).

    The task is asked before the first step and at every held-out evaluation, which needs no held-out prompts for this.
    Reports of a fall within the noise are spared by a `max_drop` well above `eval/retention/<task>_stderr`.
    """

    type: Literal["retention"] = "retention"
    task: str
    """Name of a task or group of lm-eval, or of one in `include_path`."""
    metric: str | None = None
    """Which of its figures, such as `acc_norm` or `exact_match,strict-match`; by default its first."""
    max_drop: NotNegative
    """The score has fallen by more than this since the first evaluation, in its units (an accuracy's: shares)."""
    limit: Count | None = 200
    """Only the first so many rows of the task."""
    window: ClassVar[int] = 2
    """Evaluations without which nothing can be compared."""


AnyAlert = Annotated[
    MissingEosAlertSpec
    | KLAlertSpec
    | LengthDriftAlertSpec
    | EntropyAlertSpec
    | RepetitionAlertSpec
    | NoSignalAlertSpec
    | OveroptimizationAlertSpec
    | RetentionAlertSpec,
    Field(discriminator="type"),
]


def expand_alerts(value: Any) -> Any:
    """The list of alerts with each one given by name (`missing_eos`) as a mapping.

    Raises:
        ValueError: it is not a list.
    """
    if not isinstance(value, list):
        raise ValueError("expected a list of alerts, for example [missing_eos, {type: kl, max: 20}]")
    return [{"type": item} if isinstance(item, str) else item for item in value]


AnyAlerts = Annotated[list[AnyAlert], BeforeValidator(expand_alerts)]


def why_blind(
    alert: AnyAlert, *, is_offline: bool, is_plain: bool, has_gold: bool, num_evaluations: int, has_rewards: bool = True
) -> str | None:
    """Why an alert could never fire in a run of any length, or None: a watch that sees nothing is worse than none.

    Args:
        alert: the rule.
        is_offline: training steps sample nothing.
        is_plain: held-out prompts are sampled from the policy itself, not greedily or truncated.
        has_gold: there are `evaluation.rewards`.
        num_evaluations: of the run.
        has_rewards: what is sampled is scored.
    """
    if isinstance(alert, RetentionAlertSpec):
        return None
    on_heldout = _reads_heldout(alert)
    if on_heldout and num_evaluations == 0:
        return "it reads held-out evaluations, but no held-out prompts are sampled: name data.heldout and rewards"
    if isinstance(alert, OveroptimizationAlertSpec) and not has_gold:
        return "it compares the reward with a held-out one, but evaluation.rewards is empty"
    if on_heldout and not is_plain and isinstance(alert, KLAlertSpec | EntropyAlertSpec):
        return "held-out prompts are decoded greedily or truncated, where this is not measured: use samples: train"
    if not on_heldout and is_offline:
        return "the method samples nothing in training: use samples: heldout"
    if not has_rewards and isinstance(alert, NoSignalAlertSpec | OveroptimizationAlertSpec):
        return "it reads the reward, but rewards is empty"
    return None


def why_silent(alert: AnyAlert, *, num_steps: int, num_evaluations: int) -> str | None:
    """Why an alert cannot fire in a run that is too short for it, such as one that is only tried, or None."""
    if isinstance(alert, RetentionAlertSpec):  # before the first step and after the last, at least
        return None
    count, what = (num_evaluations, "evaluations") if _reads_heldout(alert) else (num_steps, "steps")
    if alert.window > count:
        return f"its window is {alert.window}, but the run has {count} {what}"
    return None


def _reads_heldout(alert: SampledAlertSpec | OveroptimizationAlertSpec) -> bool:
    return isinstance(alert, OveroptimizationAlertSpec) or alert.samples == "heldout"
