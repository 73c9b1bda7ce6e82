"""The alerts' rules: pure functions of what metrics.jsonl has said so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dar.config.alerts import (
    AnyAlert,
    EntropyAlertSpec,
    KLAlertSpec,
    LengthDriftAlertSpec,
    MissingEosAlertSpec,
    OveroptimizationAlertSpec,
    RepetitionAlertSpec,
)

History = Sequence[Mapping[str, float]]
"""Lines of metrics.jsonl, oldest first, each with `step` and all that a rule reads (`metrics_read`)."""

_Sampled = MissingEosAlertSpec | KLAlertSpec | LengthDriftAlertSpec | EntropyAlertSpec | RepetitionAlertSpec


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
    match rule:
        case OveroptimizationAlertSpec():
            return "eval/gold", "eval/reward"
        case MissingEosAlertSpec():
            key = "completions/clipped_ratio"
        case KLAlertSpec():
            key = "kl/ref"
        case LengthDriftAlertSpec():
            key = "completions/mean_length"
        case EntropyAlertSpec():
            key = "entropy"
        case RepetitionAlertSpec():
            key = "completions/repetition"
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
    match rule:
        case OveroptimizationAlertSpec():
            found = _overoptimized(rule, history[-rule.window :])
        case MissingEosAlertSpec() | KLAlertSpec() | RepetitionAlertSpec():
            found = _above(rule, _recent(rule, history))
        case LengthDriftAlertSpec():
            found = _drifted(rule, _initial(rule, history), _recent(rule, history))
        case EntropyAlertSpec():
            found = _collapsed(rule, _initial(rule, history), _recent(rule, history))
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


def _above(rule: MissingEosAlertSpec | KLAlertSpec | RepetitionAlertSpec, value: float) -> _Found:
    if value <= rule.max:
        return None
    where = _where(rule)
    match rule:
        case MissingEosAlertSpec():
            text = f"{value:.0%} of completions ran out of room before they ended ({where}; limit {rule.max:.0%})"
        case KLAlertSpec():
            text = f"the policy is {value:.3g} nats per completion away from π₀ ({where}; limit {rule.max:g})"
        case RepetitionAlertSpec():
            text = f"{value:.0%} of a completion is its longest repeated part ({where}; limit {rule.max:.0%})"
    return value, rule.max, text


def _drifted(rule: LengthDriftAlertSpec, start: float, now: float) -> _Found:
    ratio = now / start
    if 1 / rule.max_ratio <= ratio <= rule.max_ratio:
        return None
    limit = rule.max_ratio if ratio > 1 else 1 / rule.max_ratio
    sizes = f"completions have {now:.1f} tokens, {ratio:.2g} times the {start:.1f} of the start"
    return ratio, limit, f"{sizes} ({_where(rule)}; limit {limit:.3g})"


def _collapsed(rule: EntropyAlertSpec, start: float, now: float) -> _Found:
    # Written without a division: a policy that was certain from the start has nothing to lose.
    if now >= rule.min_ratio * start:
        return None
    sizes = f"the entropy is {now:.3g} nats per token, {now / start:.2g} times the {start:.3g} of the start"
    return now / start, rule.min_ratio, f"{sizes} ({_where(rule)}; limit {rule.min_ratio:g})"


def _overoptimized(rule: OveroptimizationAlertSpec, window: History) -> _Found:
    rise, fall = _fitted_change(window, "eval/reward"), -_fitted_change(window, "eval/gold")
    if rise <= rule.min_rise or fall <= rule.min_fall:
        return None
    sizes = f"the reward rose by {rise:.3g} while the held-out reward fell by {fall:.3g}"
    where = f"steps {window[0]['step']} to {window[-1]['step']}, lines fitted to {len(window)} evaluations"
    return -fall, -rule.min_fall, f"{sizes} ({where}; limits {rule.min_rise:g} and {rule.min_fall:g})"


def _fitted_change(window: History, key: str) -> float:
    """What the least-squares line through (step, metric) gains from the window's first step to its last."""
    steps, values = [line["step"] for line in window], [line[key] for line in window]
    middle = fmean(steps)
    spread = sum((step - middle) ** 2 for step in steps)
    slope = sum((step - middle) * value for step, value in zip(steps, values, strict=True)) / spread
    return slope * (steps[-1] - steps[0])


def _initial(rule: _Sampled, history: History) -> float:
    return _mean(rule, history[: rule.window])


def _recent(rule: _Sampled, history: History) -> float:
    return _mean(rule, history[-rule.window :])


def _mean(rule: _Sampled, lines: History) -> float:
    (key,) = metrics_read(rule)
    return fmean(line[key] for line in lines)


def _where(rule: _Sampled) -> str:
    """`training, mean of 4 steps`"""
    kind, unit = ("training", "steps") if rule.samples == "train" else ("held-out", "evaluations")
    return f"{kind}, mean of {rule.window} {unit}" if rule.window > 1 else kind
