"""What several ranks report of one update."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.handmade import make_spec
from torch import nn

from dar.learn import update
from dar.learn.update import Updater
from dar.ops import Mean
from dar.policies.precision import Precision

FP32 = Precision(torch.device("cpu"), torch.float32)


def test_a_rank_without_pairs_hides_no_mean_of_the_others(monkeypatch: pytest.MonkeyPatch):
    # This rank had no pair and so nothing to report; the other had two, of margin 1 and 3.
    parts: list[tuple[float, dict[str, Mean], None]] = [
        (0.0, {}, None),
        (2.0, {"rewards/margins": Mean(4.0, 2.0)}, None),
    ]
    monkeypatch.setattr(update, "gathered", lambda _: parts)
    accelerator: Any = SimpleNamespace(num_processes=2)
    module = nn.Linear(1, 1)
    policy: Any = SimpleNamespace(
        share=lambda _: None, precision=FP32, trainable=lambda: dict(module.named_parameters())
    )
    updater = Updater(policy, accelerator, make_spec())
    total, means, _ = updater._over_ranks(0.0, {}, None)
    assert total == 2.0
    assert means["rewards/margins"].value == 2.0
