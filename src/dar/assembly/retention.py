"""What the alerts `retention` ask of the policy at every evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dar.algorithms.base import Metrics
from dar.collective import from_main
from dar.config.alerts import RetentionAlertSpec
from dar.config.problems import unknown_name_message
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.integrations import require_tested
from dar.policies.base import ModelPolicy


def build_retention(spec: RunSpec, tokenizer: Any) -> Callable[[ModelPolicy[Any]], Metrics] | None:
    """What measures a policy's `retention/<task>`, and `retention/<task>_stderr` where lm-eval has one; None where no
    alert asks. Its tasks and their data are loaded here.

    The main rank asks and the others wait, as every rank holds the whole policy.

    Raises:
        ConfigError: lm-eval is missing, or a task cannot be had; when measured, that it has no such figure.
    """
    rules = [alert for alert in spec.alerts if isinstance(alert, RetentionAlertSpec)]
    if not rules:
        return None
    require_tested("lm_eval", "the alert retention")
    from dar.integrations.lm_eval import Harness  # noqa: PLC0415 - an extra

    asked = [(rule, Harness([rule.task], rule, tokenizer)) for rule in rules]

    def measured(policy: ModelPolicy[Any], model: Any) -> Metrics:
        found = ((rule, harness.measure(model, policy.precision, seed=spec.seed)) for rule, harness in asked)
        return {key: value for rule, figures in found for key, value in _metrics(rule, figures).items()}

    def measure(policy: ModelPolicy[Any]) -> Metrics:
        with policy.sampler() as module:
            return from_main(lambda: measured(policy, module.model))

    return measure


def _metrics(rule: RetentionAlertSpec, found: dict[str, Any]) -> Metrics:
    """A task's score and its standard error."""
    figures = found["results"].get(rule.task, {})
    scores = {key: value for key, value in figures.items() if "," in key and "_stderr," not in key}
    named = (key for key in scores if rule.metric in (None, key, key.partition(",")[0]))
    key = next(named, None)
    if key is None:
        where = f"the alert retention: of the task {rule.task}"
        raise ConfigError(f"{where}, {unknown_name_message('metric', rule.metric or 'none', scores)}")
    name, _, kind = key.partition(",")
    if not found["higher_is_better"].get(rule.task, {}).get(name, True):
        raise ConfigError(f"the alert retention watches for a fall, but lower is better in {rule.task}'s {name}")
    error = figures.get(f"{name}_stderr,{kind}")
    score = {f"retention/{rule.task}": float(scores[key])}
    return score | ({f"retention/{rule.task}_stderr": error} if isinstance(error, float) else {})
