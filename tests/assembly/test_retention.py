"""What of lm-eval's figures an alert `retention` takes."""

from __future__ import annotations

from typing import Any

import pytest

from dar.assembly.retention import _metrics
from dar.config.alerts import RetentionAlertSpec
from dar.errors import ConfigError

FOUND: dict[str, Any] = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25, "f1_stderr,strict": "N/A"}
    },
    "higher_is_better": {"piqa": {"acc": True, "f1": False}},
}


def test_metric_is_the_first_or_the_one_that_is_named():
    rule = RetentionAlertSpec(task="piqa", max_drop=0.1)
    assert _metrics(rule, FOUND) == {"retention/piqa": 0.5, "retention/piqa_stderr": 0.1}
    higher = {**FOUND, "higher_is_better": {}}
    for name in ("f1", "f1,strict"):
        assert _metrics(rule.model_copy(update={"metric": name}), higher) == {"retention/piqa": 0.25}
    with pytest.raises(ConfigError, match="lower is better in piqa's f1"):
        _metrics(rule.model_copy(update={"metric": "f1"}), FOUND)
    with pytest.raises(ConfigError, match=r"unknown metric 'accc'.*allowed: acc,none, f1,strict"):
        _metrics(rule.model_copy(update={"metric": "accc"}), FOUND)
