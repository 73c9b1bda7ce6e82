"""Ranks, device and precision."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from dar.config.run import ComputeSpec, RunSpec
from dar.errors import ConfigError
from dar.policies.text.policy import Precision


def build_accelerator(spec: RunSpec, precision: Precision) -> Accelerator:
    """accelerate's view of ranks, devices and trackers.

    Raises:
        ConfigError: a tracker is unknown or not installed.
    """
    available = [str(name) for name in get_available_trackers()]
    missing = [name for name in spec.logging.trackers if name not in available]
    if missing:
        raise ConfigError(
            f"logging.trackers: {', '.join(missing)} cannot be used here; installed: {', '.join(available) or 'none'}"
        )
    # Trainer, engine and reference share one autocast of their own, so accelerate is to cast nothing.
    return Accelerator(
        cpu=precision.device.type == "cpu",
        mixed_precision="no",
        log_with=list(spec.logging.trackers) or None,
        project_dir=spec.output_dir,
    )


def resolve_precision(spec: ComputeSpec) -> Precision:
    """Device and compute precision of a recipe.

    Raises:
        ConfigError: the device does not exist here.
    """
    name = spec.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device: '{name}' is not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"runtime.device: '{name}' is not offered; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device is {name}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use runtime.device=cpu, or install a CUDA build of torch on a machine with a GPU"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("runtime.device is mps, but this torch sees no Apple GPU; use runtime.device=cpu")
    wants_bf16 = spec.precision == "bf16" or (spec.precision == "auto" and _has_bf16(device))
    return Precision(device, torch.bfloat16 if wants_bf16 else torch.float32)


def _has_bf16(device: torch.device) -> bool:
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            # Elsewhere bf16 is emulated, and slower than fp32.
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        case _:
            return False
