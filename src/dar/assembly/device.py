"""Ranks, device and precision."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.policies.precision import Precision


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
