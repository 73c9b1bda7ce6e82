"""What is said of ranks before there are any, and of one that is lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.handmade import make_spec

from dar.assembly import device
from dar.config.run import ComputeSpec
from dar.errors import ConfigError, RankError
from dar.learn.ranks import join_ranks, lost_ranks_named
from dar.policies.precision import Precision


@pytest.mark.parametrize(
    ("variable", "value", "is_warned"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", True),
        ("SLURM_STEP_NUM_TASKS", "4", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
    ],
)
def test_a_launcher_that_started_one_process_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str, value: str, is_warned: bool
):
    monkeypatch.setenv(variable, value)
    join_ranks(ComputeSpec(device="cpu"), Precision(torch.device("cpu"), torch.float32))
    assert ("this process trains alone" in caplog.text) == is_warned


def test_the_precision_of_an_earlier_trainer_in_the_process_is_not_ours():
    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="bf16")
    found = join_ranks(ComputeSpec(device="cpu"), Precision(torch.device("cpu"), torch.float32))
    assert (found.mixed_precision, found.native_amp) == ("no", False)


def test_an_error_of_the_maths_is_no_lost_rank():
    with pytest.raises(RuntimeError, match="shapes differ") as raised, lost_ranks_named(ComputeSpec()):
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, RankError)


def test_every_rank_needs_a_prompt(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "join_ranks", lambda *_, **settings: SimpleNamespace(num_processes=3))
    precision = Precision(torch.device("cpu"), torch.float32)
    device.build_accelerator(make_spec(prompts_per_step=3), precision)
    with pytest.raises(ConfigError, match="prompts_per_step is 2, but there are 3 ranks"):
        device.build_accelerator(make_spec(prompts_per_step=2), precision)
