"""Device and compute precision, which every kind of policy shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dar.config.run import ComputeSpec
from dar.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Where matrix products run, and in what precision. Weights and log-softmax are fp32 in either case."""

    device: torch.device
    dtype: torch.dtype

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        """Matrix products inside run in `dtype`."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            yield

    @property
    def logprob_noise(self) -> float:
        """Nats per token within which two ways to the same log-probability may differ."""
        return 1e-3 if self.dtype == torch.float32 else 0.05


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
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # On other processors bf16 is emulated, and slower than fp32.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
