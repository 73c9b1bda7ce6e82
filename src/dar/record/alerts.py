"""The alerts' rules: pure functions of what metrics.jsonl has said so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

from dar.config.alerts import (
    AnyAlert,
    EntropyAlertSpec,
    KLAlertSpec,
    LengthDriftAlertSpec,
    MissingEosAlertSpec,
    NoSignalAlertSpec,
    OveroptimizationAlertSpec,
    RepetitionAlertSpec,
    RetentionAlertSpec,
    SampledAlertSpec,
)

History = Sequence[Mapping[str, float]]
"""Lines of metrics.jsonl, oldest first, each with `step` and all that a rule reads (`metrics_read`)."""

_KEYS = {
    "missing_eos": "completions/clipped_ratio",
    "kl": "kl/ref",
    "length_drift": "completions/mean_length",
    "entropy": "entropy",
    "repetition": "completions/repetition",
    "no_signal": "frac_reward_zero_std",
}


@dataclass(frozen=True)
class Alert:
    """A rule that has been broken.

    step: the completed steps when it was.
    rule: its type.
    action: what its recipe asks for, `log`, `mark` or `stop`.
    metric: what it reads.
    value, threshold: of that metric, or of its ratio to the start.
    message: the same in a sentence.
    """

    step: int
    rule: str
    action: str
    metric: str
    value: float
    threshold: float
    message: str


def metrics_read(rule: AnyAlert) -> tuple[str, ...]:
    """The keys of metrics.jsonl that a rule reads; lines without them are none of its business."""
    if isinstance(rule, OveroptimizationAlertSpec):
        return "eval/gold", "eval/reward"
    if isinstance(rule, RetentionAlertSpec):
        return (f"eval/retention/{rule.task}",)
    key = _KEYS[rule.type]
    return (key if rule.samples == "train" else f"eval/{key}",)


def newly_fired(rule: AnyAlert, history: History) -> Alert | None:
    """The alert of a rule that the last line breaks and the line before did not.

    So a rule that stays broken is told of once, and again when it has held in between. Nothing is remembered but the
    history: a resumed run goes on as if it had not stopped.
    """
    return None if check(rule, history[:-1]) else check(rule, history)


def check(rule: AnyAlert, history: History) -> Alert | None:
    """The alert of a rule that is broken by the end of a history; None where it holds, or the history is too short."""
    if len(history) < rule.window:
        return None
    if isinstance(rule, OveroptimizationAlertSpec):
        found = _overoptimized(rule, history[-rule.window :])
    elif isinstance(rule, RetentionAlertSpec):
        found = _unlearned(rule, history)
    else:
        (key,) = metrics_read(rule)
        start, now = (fmean(line[key] for line in part) for part in (history[: rule.window], history[-rule.window :]))
        found = _broken(rule, start, now)
    if found is None:
        return None
    value, threshold, message = found
    return Alert(
        step=int(history[-1]["step"]),
        rule=rule.type,
        action=rule.action,
        metric=metrics_read(rule)[0],
        value=value,
        threshold=threshold,
        message=message,
    )


_Found = tuple[float, float, str] | None
"""Value, threshold and message."""


def _broken(rule: SampledAlertSpec, start: float, now: float) -> _Found:
    """By the means over the first and the last window."""
    where = _where(rule)
    match rule:
        case MissingEosAlertSpec() if now > rule.max:
            text = f"{now:.0%} of completions ran out of room before they ended ({where}; limit {rule.max:.0%})"
            return now, rule.max, text
        case KLAlertSpec() if now > rule.max:
            text = f"the policy is {now:.3g} nats per completion away from π₀ ({where}; limit {rule.max:g})"
            return now, rule.max, text
        case RepetitionAlertSpec() if now > rule.max:
            text = f"{now:.0%} of a completion is its longest repeated part ({where}; limit {rule.max:.0%})"
            return now, rule.max, text
        case NoSignalAlertSpec() if now > rule.max:
            text = f"{now:.0%} of groups have no difference in reward, so nothing is learned from them"
            return now, rule.max, f"{text} ({where}; limit {rule.max:.0%})"
        case LengthDriftAlertSpec() if not 1 / rule.max_ratio <= now / start <= rule.max_ratio:
            ratio = now / start
            limit = rule.max_ratio if ratio > 1 else 1 / rule.max_ratio
            sizes = f"completions have {now:.1f} tokens, {ratio:.2g} times the {start:.1f} of the start"
            return ratio, limit, f"{sizes} ({where}; limit {limit:.3g})"
        # Written without a division: a policy that was certain from the start has nothing to lose.
        case EntropyAlertSpec() if now < rule.min_ratio * start:
            sizes = f"the entropy is {now:.3g} nats per token, {now / start:.2g} times the {start:.3g} of the start"
            return now / start, rule.min_ratio, f"{sizes} ({where}; limit {rule.min_ratio:g})"
        case _:
            return None


def _overoptimized(rule: OveroptimizationAlertSpec, window: History) -> _Found:
    rise, fall = _fitted_change(window, "eval/reward"), -_fitted_change(window, "eval/gold")
    if rise <= rule.min_rise or fall <= rule.min_fall:
        return None
    sizes = f"the reward rose by {rise:.3g} while the held-out reward fell by {fall:.3g}"
    where = f"steps {window[0]['step']} to {window[-1]['step']}, lines fitted to {len(window)} evaluations"
    return -fall, -rule.min_fall, f"{sizes} ({where}; limits {rule.min_rise:g} and {rule.min_fall:g})"


def _unlearned(rule: RetentionAlertSpec, history: History) -> _Found:
    (key,) = metrics_read(rule)
    start, now = history[0][key], history[-1][key]
    if start - now <= rule.max_drop:
        return None
    since = f"step {history[0]['step']} to step {history[-1]['step']}; limit {rule.max_drop:g}"
    return now - start, -rule.max_drop, f"{rule.task} fell from {start:.3g} to {now:.3g} ({since})"


def _fitted_change(window: History, key: str) -> float:
    """What the least-squares line through (step, metric) gains from the window's first step to its last."""
    steps = [line["step"] for line in window]
    return linear_regression(steps, [line[key] for line in window]).slope * (steps[-1] - steps[0])


def _where(rule: SampledAlertSpec) -> str:
    """`training, mean of 4 steps`"""
    kind, unit = ("training", "steps") if rule.samples == "train" else ("held-out", "evaluations")
    return f"{kind}, mean of {rule.window} {unit}" if rule.window > 1 else kind
