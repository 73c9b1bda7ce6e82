"""Checkpoints give back every bit, survive a failure half-way, and are never read when damaged."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem

from dar.config.optim import AdafactorSpec, AdamW8BitSpec, AdamWSpec
from dar.errors import CheckpointError
from dar.learn import checkpoint as checkpoints
from dar.learn.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    read_state,
    save_checkpoint,
)
from dar.learn.optim import build_optimizer

SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = ["manifest.json", "optimizer.json", "rng-0.pt", SHARD, "state.json"]


WIDE = 1100
"""Of a layer with as many weights as make it worth keeping their moments in 8 bits."""
OPTIMIZERS = [AdamWSpec(learning_rate=0.1), AdamW8BitSpec(learning_rate=0.1), AdafactorSpec(learning_rate=0.1)]
"""Of which the second asks for a package that tests do without: `pip install bitsandbytes` to run its cases."""


def every_optimizer(test: Callable[..., None]) -> Any:
    no_bits = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
    specs = [pytest.param(spec, marks=[no_bits] * (spec.type == "adamw_8bit"), id=spec.type) for spec in OPTIMIZERS]
    return pytest.mark.parametrize("spec", specs)(test)


class Run:
    """A little model on its way, with what a checkpoint is to keep."""

    def __init__(self, *, seed: int = 0, width: int = 3, spec: AdamWSpec | AdafactorSpec | None = None) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        self.optimizer = build_optimizer(spec or AdamWSpec(learning_rate=0.1), self.model.parameters())

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.model(torch.randn(8, 4)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, *, keep: int = 99) -> Path:
        state = TrainState(step, 10 * step, "ref", algorithm={"penalty": step / 3})
        extras = {"replay.0.mask": torch.tensor([True, False, True]), "reference.weight": torch.full((2,), step / 7)}
        return save_checkpoint(folder, state, self.parameters, self.optimizer, extras, keep=keep)

    def load(self, checkpoint: Path) -> TrainState:
        load_checkpoint(checkpoint, self.parameters, self.optimizer, {})
        return read_state(checkpoint)

    def snapshot(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, through mappings and sequences."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def draw() -> list[float]:
    """Numbers from every generator a run may use."""
    return [torch.rand(()).item(), np.random.standard_normal(), np.random.rand(), random.random(), random.gauss(0, 1)]


# --- there and back --------------------------------------------------------------------------------------------------


@every_optimizer
def test_checkpoint_restores_weights_and_optimizer_to_the_last_bit(tmp_path: Path, spec: AdamWSpec | AdafactorSpec):
    run = Run(width=WIDE, spec=spec)
    run.train(3)
    saved = run.snapshot()
    path = run.save(tmp_path, 3)
    other = Run(seed=1, width=WIDE, spec=spec)
    other.train(1)
    assert other.load(path) == TrainState(step=3, num_tokens=30, reference="ref", algorithm={"penalty": 1.0})
    assert_same(other.snapshot(), saved)


@every_optimizer
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path, spec: AdamWSpec | AdafactorSpec):
    whole = Run(width=WIDE, spec=spec)
    whole.train(5)
    first = Run(width=WIDE, spec=spec)
    first.train(2)
    path = first.save(tmp_path, 2)
    torch.manual_seed(12345)  # what a new process starts with
    second = Run(seed=7, width=WIDE, spec=spec)
    second.load(path)
    second.train(3)
    assert_same(second.snapshot(), whole.snapshot())


def test_checkpoint_restores_every_random_number_generator(tmp_path: Path):
    run = Run()
    draw()  # leaves half a pair of Gaussian numbers waiting in numpy and in random
    path = run.save(tmp_path, 1)
    expected = [draw(), draw()]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    run.load(path)
    assert [draw(), draw()] == expected


def test_checkpoint_holds_what_it_says_and_nothing_pickled(tmp_path: Path):
    path = Run().save(tmp_path, 4)
    assert path == tmp_path / "step-4"
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert read_state(path) == TrainState(4, 40, "ref", algorithm={"penalty": 4 / 3})
    torch.load(path / "rng-0.pt", weights_only=True)


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    run = Run()
    run.save(tmp_path, 1)
    run.train(1)
    saved = run.snapshot()
    path = run.save(tmp_path, 1)
    other = Run(seed=1)
    other.load(path)
    assert_same(other.snapshot()["model"], saved["model"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


# --- which ones stay -------------------------------------------------------------------------------------------------


def test_only_the_newest_stay(tmp_path: Path):
    run = Run()
    for step in (8, 9, 10, 11):
        run.save(tmp_path, step, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_checkpoints_are_ordered_by_number_and_leftovers_are_none(tmp_path: Path):
    run = Run()
    for step in (9, 10, 100):
        run.save(tmp_path, step)
    for name in ("step-old", "step-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-10", "step-9"]
    assert newest_valid(tmp_path) == tmp_path / "step-100"


# --- when saving fails -----------------------------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_as_torch_says_it(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("target", "name", "failure"),
    [
        (FileSystem, "create_stream", full_disk),
        (FileSystem, "create_stream", full_disk_as_torch_says_it),
        (checkpoints.torch, "save", full_disk),
        (os, "replace", full_disk),
    ],
    ids=["weights", "weights (torch)", "random numbers", "rename"],
)
def test_failure_while_saving_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, failure: Callable[..., None]
):
    run = Run()
    run.save(tmp_path, 1, keep=1)
    saved = run.snapshot()
    run.train(1)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failure)
        with pytest.raises(
            CheckpointError, match=r"step-2 cannot be written: .*Earlier checkpoints are intact"
        ) as caught:
            run.save(tmp_path, 2, keep=1)
    assert "--resume" in str(caught.value)
    assert str(caught.value).count("cannot be written") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]
    path = newest_valid(tmp_path)
    assert path is not None
    run.load(path)
    assert_same(run.snapshot(), saved)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="step-1 cannot be written") as caught:
        Run().save(tmp_path / "file", 1)
    assert str(caught.value).count("cannot be written") == 1


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove, empty])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
):
    run = Run()
    run.save(tmp_path, 1)
    newest = run.save(tmp_path, 2)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == tmp_path / "step-1"
    assert f"checkpoint {newest} is damaged (" in caplog.text
    assert "falling back to the one before" in caplog.text
    if name != "manifest.json":
        assert name in caplog.text


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"state.json": 5}', "null"])
def test_checkpoint_whose_manifest_says_nothing_is_damaged(tmp_path: Path, manifest: str):
    run = Run()
    run.save(tmp_path, 1)
    (run.save(tmp_path, 2) / "manifest.json").write_text(manifest)
    assert newest_valid(tmp_path) == tmp_path / "step-1"


def test_when_every_checkpoint_is_damaged_nothing_is_read(tmp_path: Path):
    run = Run()
    for step in (1, 2):
        truncate(run.save(tmp_path, step) / SHARD)
    with pytest.raises(
        CheckpointError, match=r"every checkpoint in .* is damaged; start a new run in another output_dir"
    ):
        newest_valid(tmp_path)


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path):
    (Run().save(tmp_path, 2) / "optimizer.pt").touch()
    with pytest.raises(CheckpointError, match=r"step-2 was written by dar 0\.3 or before"):
        newest_valid(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "absent") is None


# --- another model ---------------------------------------------------------------------------------------------------


def test_checkpoint_of_a_model_of_another_size_is_refused(tmp_path: Path):
    path = Run(width=3).save(tmp_path, 1)
    other = Run(width=5)
    before = other.snapshot()
    with pytest.raises(CheckpointError) as caught:
        other.load(path)
    assert str(caught.value) == (
        f"{path} is of another model: 3 trainable tensors differ in name or shape, the first is 0.bias ((3,) saved, "
        "(5,) here)"
    )
    assert_same(other.snapshot(), before)


def test_checkpoint_with_other_names_is_refused(tmp_path: Path):
    run = Run()
    path = run.save(tmp_path, 1)
    fewer = {name: parameter for name, parameter in run.parameters.items() if name != "2.bias"}
    with pytest.raises(
        CheckpointError, match=r"1 trainable tensors differ .* first is 2\.bias \(\(2,\) saved, None here\)"
    ):
        load_checkpoint(path, fewer, run.optimizer, {})


def test_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    run = Run(spec=AdafactorSpec(learning_rate=0.1))
    run.train(1)
    path = run.save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="is of another optimizer: Adafactor, not AdamW"):
        Run(spec=AdamWSpec(learning_rate=0.1)).load(path)


def test_manifest_lists_every_file_with_its_size(tmp_path: Path):
    path = Run().save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted([*manifest, "manifest.json"]) == FILES
    assert all(manifest[name][0] == (path / name).stat().st_size for name in manifest)


def test_what_a_killed_run_left_half_done_is_swept(tmp_path: Path):
    for name in (".writing-step-7", ".removing-step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SHARD).write_bytes(b"half")
    run = Run()
    run.save(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]


def test_the_methods_numbers_and_the_extra_tensors_come_back_bit_for_bit(tmp_path: Path):
    run = Run()
    path = run.save(tmp_path, 3)
    assert read_state(path).algorithm == {"penalty": 1.0}
    reference = torch.zeros(2)
    extras = {"reference.weight": reference}
    load_checkpoint(path, run.parameters, run.optimizer, extras)
    assert sorted(extras) == ["reference.weight", "replay.0.mask"]
    assert extras["replay.0.mask"].tolist() == [True, False, True]
    assert torch.equal(reference, torch.full((2,), 3 / 7))
