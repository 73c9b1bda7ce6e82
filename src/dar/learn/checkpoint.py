"""Checkpoints: written beside and renamed, verified before they are read, safetensors and weights-only loading.

A checkpoint folder holds `shard-R-….safetensors`, what rank R − 1 wrote of all tensors (`policy.…`, the trainable
weights; `optimizer.…`, their moments; `extras.…`, what else changes from step to step: replayed batches, completions on
their way, a moving reference, projections), `optimizer.json` (what of the optimizer are plain numbers), an `rng-….pt`
of each rank, `state.json` and, written last, `manifest.json` with every file's size and SHA-256. Any number of ranks
reads it.
"""

from __future__ import annotations

import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dar.collective import failing_together, from_main, num_ranks, own_part, own_rank
from dar.errors import CheckpointError
from dar.files.atomic import remove, remove_rests, written
from dar.files.intake import sha256_of

log = logging.getLogger(__name__)

_FILES = {"optimizer.json", "rng-0.pt", "state.json"}
_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class TrainState:
    """The plain numbers of a run after `step` steps.

    step: completed steps; the schedule follows from it, and the prompt stream from it and `replaced`.
    num_tokens: tokens processed so far.
    reference: fingerprint of π₀.
    algorithm: the method's own numbers.
    rewards: the rewards' own numbers.
    calibration: shifts and scales of reward models.
    adapter: ranks that shrink, and the step of the last cut.
    replaced: prompts drawn in place of others (`sampling.resample_tied`).
    """

    step: int
    num_tokens: int
    reference: str
    algorithm: dict[str, float] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    replaced: int = 0


def save_checkpoint(
    folder: Path,
    state: TrainState,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Writes checkpoints/step-N and removes all but the newest `keep`; every rank calls, and writes its part.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or not writable, on whichever rank; what was saved before is untouched.
    """
    target = folder / f"step-{state.step}"
    moments, numbers = _optimizer_state(parameters, optimizer)
    tensors = _named("policy", parameters) | moments | _named("extras", extras)
    with failing_together(), ExitStack() as opened:

        def begin() -> Path:
            with _explained(target):
                opened.enter_context(_explained(target))
                scratch = opened.enter_context(written(target))
                scratch.mkdir()
                return scratch

        scratch = from_main(begin)
        with _explained(target):
            writer = HuggingFaceStorageWriter(str(scratch), _portions(tensors), save_distributed=True)
            _quietly(save, tensors, storage_writer=writer)
        with failing_together(), _explained(target):
            torch.save(_rng_state(), scratch / f"rng-{own_rank()}.pt")
        if own_rank() == 0:
            for name, found in ("optimizer", numbers), ("state", asdict(state)):
                (scratch / f"{name}.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
            manifest = {file.name: [file.stat().st_size, sha256_of(file)] for file in sorted(scratch.iterdir())}
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    if own_rank() == 0:
        for old in list_checkpoints(folder)[keep:]:
            remove(old)
        remove_rests(folder)
    return target


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        # torch and safetensors report a full disk as a RuntimeError of their own.
        cause: BaseException = error
        while isinstance(cause, CheckpointError) and cause.__cause__ is not None:
            cause = cause.__cause__  # `written`, or a block inside, has said this already
        if isinstance(cause, CheckpointException):
            cause = next(iter(cause.failures.values()))[0]
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {cause}. Earlier checkpoints are intact; free some space and "
            "continue with --resume."
        ) from error


def _quietly(pass_on: Callable[..., Any], *arguments: Any, **others: Any) -> None:
    """torch's distributed checkpoint, which warns where it is used by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        pass_on(*arguments, **others, no_dist=num_ranks() == 1)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without gradient, under names that begin so; one that wraps others (quantised moments, say) as these."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
            inner = {part: getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
            found |= _named(f"{prefix}.{name}", inner)
        else:
            found[f"{prefix}.{name}"] = tensor.detach()
    return found


def _optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizer remembers of each parameter: tensors, and plain numbers beside its kind."""
    tensors, numbers = dict[str, Tensor](), dict[str, Any]()
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= _named(f"optimizer.{name}", {key: each for key, each in state.items() if isinstance(each, Tensor)})
        numbers[name] = {key: each for key, each in state.items() if not isinstance(each, Tensor)}
    return tensors, {"type": type(optimizer).__name__, "numbers": numbers}


def _portions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of a rank's files each tensor goes to, from 1: the writer makes a whole file in memory."""
    ends = accumulate(own_part(tensor).nbytes for tensor in tensors.values())
    # Ranks hold unequal parts of a tensor, and must agree.
    return from_main(lambda: {name: 1 + end // _FILE_BYTES for name, end in zip(tensors, ends, strict=True)})


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first (verified or not)."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_valid(folder: Path, chosen: Path | None = None) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged, or None where there is no checkpoint at all.

    A damaged one is passed over with a warning, unless it is the `chosen` one, which alone will do. What a kill left
    half-done is finished first.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged, or they are an older version's.
    """
    remove_rests(folder)
    candidates = list_checkpoints(folder) if chosen is None else [chosen]
    for path in candidates:
        if (path / "optimizer.pt").exists():
            raise CheckpointError(
                f"{path} was written by dar 0.3 or before, whose checkpoints are not read any more: finish the run "
                "with that version, or start a new one in another output_dir"
            )
        problem = _damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s); falling back to the one before", path, problem)
    if candidates:
        said = f"{chosen} is damaged; name another, or" if chosen else f"every checkpoint in {folder} is damaged;"
        raise CheckpointError(f"{said} start a new run in another output_dir")
    return None


def read_state(checkpoint: Path) -> TrainState:
    """The plain numbers of a checkpoint."""
    return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def load_checkpoint(
    checkpoint: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extras: dict[str, Tensor],
) -> None:
    """Restores weights, optimizer and random-number generators in place; every rank calls, and reads its part.

    Args:
        extras: those of the present, into which the saved ones are read where they are as large; the others are added,
            and what was not saved is taken out.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer.
    """
    reader = HuggingFaceStorageReader(str(checkpoint))
    saved = cast("Mapping[str, TensorStorageMetadata]", reader.read_metadata().state_dict_metadata)
    shapes = {name.removeprefix("policy."): tuple(each.size) for name, each in saved.items() if name[:7] == "policy."}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != expected:
        differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise CheckpointError(
            f"{checkpoint} is of another model: {len(differing)} trainable tensors differ in name or shape, the first "
            f"is {differing[0]} ({shapes.get(differing[0])} saved, {expected.get(differing[0])} here)"
        )
    kept = json.loads((checkpoint / "optimizer.json").read_text(encoding="utf-8"))
    if kept["type"] != type(optimizer).__name__:
        raise CheckpointError(f"{checkpoint} is of another optimizer: {kept['type']}, not {type(optimizer).__name__}")
    _step_nowhere(optimizer)
    for name, parameter in parameters.items():
        if not any(each.startswith(f"optimizer.{name}.") for each in saved):
            optimizer.state.pop(parameter, None)  # one that no gradient had reached
        else:
            optimizer.state[parameter] |= kept["numbers"][name]
    targets = _named("policy", parameters) | _optimizer_state(parameters, optimizer)[0]
    for name in [name for name in extras if f"extras.{name}" not in saved]:
        del extras[name]
    for name, each in saved.items():
        kind, _, rest = name.partition(".")
        if kind == "extras":
            if rest not in extras or extras[rest].shape != each.size:
                extras[rest] = torch.empty(each.size, dtype=each.properties.dtype)
            targets[name] = extras[rest].detach()
    _quietly(load, targets, storage_reader=reader)
    num_saved = len(list(checkpoint.glob("rng-*.pt")))
    _restore_rng(torch.load(checkpoint / f"rng-{own_rank() % num_saved}.pt", weights_only=True))


def _step_nowhere(optimizer: torch.optim.Optimizer) -> None:
    """A step at rate 0 on gradients of 0: the optimizer then has all that it remembers, whatever that is."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


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
        if not any(name.startswith("shard-") for name in manifest):
            return "manifest.json lists no tensors"
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
