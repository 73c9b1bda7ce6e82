"""What the methods on flows say of their ratios."""

from __future__ import annotations

import math

import pytest
import torch
from support.builders import make_scored

from dar.algorithms.flow import FlowGRPO
from dar.batch import TokenOutputs
from dar.config.flow import GRPOGuardSpec


def test_ratios_are_binned_by_denoising_step_before_and_after_their_normalisation() -> None:
    low, high = math.log(0.9), math.log(1.2)
    # In clip ranges, of which the lower is another than the upper.
    ratios = torch.tensor([[17 * low, 0.0], [-2 * high, 0.5 * high], [0.5 * low, 2 * high], [16.1 * high, 5 * high]])
    algorithm = FlowGRPO(GRPOGuardSpec(clip_low=0.1, clip_high=0.2))
    batch, _ = algorithm.weigh(make_scored(rewards=[[1, 2], [1, 3]], old=[[-1.0, -2.0]] * 4))
    steps = {"shift": 0 * ratios, "deviation": torch.ones(4, 2), "reweight": torch.ones(4, 2)}
    means = algorithm.terms(TokenOutputs(batch.old_logprobs + ratios, steps=steps), batch).means
    assert means["ratio/step_0/plain/mean"].value == pytest.approx(float(ratios[:, 0].mean()), rel=1e-5)
    assert means["ratio/step_1/plain/mean_square"].value == pytest.approx(float((ratios[:, 1] ** 2).mean()), rel=1e-5)
    shares = {
        (step, name.rpartition("_")[2]): mean.value
        for name, mean in means.items()
        for step in (0, 1)
        if name.startswith(f"ratio/step_{step}/plain/from") and mean.value
    }
    assert shares == {
        (0, "-inf"): 0.25, (0, "-4"): 0.25, (0, "-1"): 0.25, (0, "16"): 0.25,
        (1, "0"): 0.5, (1, "1"): 0.25, (1, "4"): 0.25,
    }  # fmt: skip
    assert means["ratio/step_1/normalized/from_0"].value == 1.0
    # Above the range with an advantage above 0, below it with one below 0: rows 0 and 3, and 3 alone.
    assert [means[f"ratio/step_{step}/plain/clipped"].value for step in (0, 1)] == [0.5, 0.25]
    assert means["clip_ratio/region_mean"].value == 0.0
