"""Checkpoints: written beside and renamed, verified before they are read, safetensors and weights-only loading.

A checkpoint folder holds `policy.safetensors` (trainable fp32 weights), `optimizer.pt`, `rng.pt`, `state.json`,
`extras.safetensors` (what else changes from step to step: replayed batches, a moving reference, projections) and,
written last, `manifest.json` with every file's size and SHA-256.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dar.errors import CheckpointError
from dar.files.atomic import remove, remove_rests, written
from dar.files.intake import sha256_of

log = logging.getLogger(__name__)

_FILES = {"policy.safetensors", "optimizer.pt", "rng.pt", "state.json", "extras.safetensors"}


@dataclass(frozen=True)
class TrainState:
    """The plain numbers of a run after `step` steps.

    step: completed steps; the prompt stream and the schedule follow from it.
    num_tokens: tokens processed so far.
    reference: fingerprint of π₀.
    algorithm: the method's own numbers.
    rewards: the rewards' own numbers.
    calibration: shifts and scales of reward models.
    """

    step: int
    num_tokens: int
    reference: str
    algorithm: dict[str, float] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    state: TrainState,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Writes checkpoints/step-N and removes all but the newest `keep`.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or not writable; what was saved before is untouched.
    """
    target = folder / f"step-{state.step}"
    try:
        with written(target) as scratch:
            scratch.mkdir()
            for name, tensors in ("policy", parameters), ("extras", extras):
                kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(kept, scratch / f"{name}.safetensors")
            torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
            torch.save(_rng_state(), scratch / "rng.pt")
            (scratch / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
            manifest = {file.name: [file.stat().st_size, sha256_of(file)] for file in sorted(scratch.iterdir())}
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        # torch and safetensors report a full disk as a RuntimeError of their own.
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error}. Earlier checkpoints are intact; free some space and "
            "continue with --resume."
        ) from error
    for old in _superseded(folder, state.step, keep):
        remove(old)
    remove_rests(folder)
    return target


def _superseded(folder: Path, step: int, keep: int) -> list[Path]:
    """All but the newest `keep` up to `step`, and any after it: left by a run that fell back and came here again."""
    found = list_checkpoints(folder)
    later = [path for path in found if _step_of(path) > step]
    return later + found[len(later) :][keep:]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first (verified or not)."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged, or None where there is no checkpoint at all.

    A damaged one is passed over with a warning. What a kill left half-done is finished first.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    remove_rests(folder)
    candidates = list_checkpoints(folder)
    for path in candidates:
        problem = _damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s); falling back to the one before", path, problem)
    if candidates:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start a new run in another output_dir")
    return None


def read_state(checkpoint: Path) -> TrainState:
    """The plain numbers of a checkpoint."""
    return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def read_extras(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of extras.safetensors."""
    return load_file(checkpoint / "extras.safetensors")


def load_checkpoint(
    checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> TrainState:
    """Restores weights, optimizer and random-number generators in place.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer.
    """
    tensors = load_file(checkpoint / "policy.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != expected:
        differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise CheckpointError(
            f"{checkpoint} is of another model: {len(differing)} trainable tensors differ in name or shape, the first "
            f"is {differing[0]} ({shapes.get(differing[0])} saved, {expected.get(differing[0])} here)"
        )
    optimizer_state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    saved, here = (state["param_groups"][0].keys() for state in (optimizer_state, optimizer.state_dict()))
    if saved != here:
        raise CheckpointError(
            f"{checkpoint} is of another optimizer than {type(optimizer).__name__}: its settings are {', '.join(saved)}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(optimizer_state)
    _restore_rng(torch.load(checkpoint / "rng.pt", weights_only=True))
    return read_state(checkpoint)


def _rng_state() -> dict[str, Any]:
    """States as tensors and plain numbers, which weights-only loading accepts."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "python": (version, list(internal), gauss),
    }


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if unlisted := sorted(_FILES - manifest.keys()):
            return f"manifest.json does not list {', '.join(unlisted)}"
        for name, (size, digest) in manifest.items():
            file = checkpoint / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, expected {size}"
            if sha256_of(file) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
