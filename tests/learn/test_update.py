"""What several ranks report of one update."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.handmade import make_spec
from torch import nn

from dar.learn import update
from dar.learn.update import Updater
from dar.ops import Mean


def test_a_rank_without_pairs_hides_no_mean_of_the_others(monkeypatch: pytest.MonkeyPatch):
    # This rank had no pair and so nothing to report; the other had two, of margin 1 and 3.
    parts: list[tuple[float, dict[str, Mean]]] = [(0.0, {}), (2.0, {"rewards/margins": Mean(4.0, 2.0)})]
    monkeypatch.setattr(update, "gather_object", lambda _: parts)
    accelerator: Any = SimpleNamespace(num_processes=2, prepare=lambda module: module)
    module = nn.Linear(1, 1)
    policy: Any = SimpleNamespace(trained=module, trainable=lambda: dict(module.named_parameters()))
    updater = Updater(policy, accelerator, make_spec())
    total, means = updater._over_ranks(0.0, {})
    assert total == 2.0
    assert means["rewards/margins"].value == 2.0
