"""Ranks, device and precision."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.learn.optim import require_optimizer
from dar.learn.ranks import join_ranks
from dar.policies.precision import Precision, resolve_precision
from dar.policies.text.compiling import require_compiler


def build_precision(spec: RunSpec) -> Precision:
    """Device and precision. Raises ConfigError: no such device, or no compiler or optimizer where one is asked for."""
    precision = resolve_precision(spec.runtime)
    if spec.runtime.compile_layers:
        require_compiler(precision.device)
    require_optimizer(spec.optim)
    return precision


def build_accelerator(spec: RunSpec, precision: Precision) -> Accelerator:
    """accelerate's view of ranks, devices and trackers.

    Raises:
        ConfigError: a tracker is unknown or not installed, or a step has fewer prompts than there are ranks.
    """
    known, available = ({str(name) for name in names} - {"all"} for names in (LoggerType, get_available_trackers()))
    for name in spec.logging.trackers:
        if name not in available:
            what_to_do = f"pip install {name}" if name in known else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"logging.trackers: {name} cannot be used here; {what_to_do}")
    trackers = list(spec.logging.trackers) or None
    accelerator = join_ranks(spec.runtime, precision, log_with=trackers, project_dir=spec.output_dir)
    if spec.prompts_per_step < accelerator.num_processes:
        raise ConfigError(
            f"prompts_per_step is {spec.prompts_per_step}, but there are {accelerator.num_processes} ranks, and each "
            "samples a prompt of its own: start fewer, or raise prompts_per_step"
        )
    return accelerator
