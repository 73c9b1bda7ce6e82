"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from dar.collective import gathered, own_part, whole_tensor
from dar.config.optim import AdafactorSpec, AdamW8BitSpec, AdamWSpec, OptimSpec
from dar.errors import NonFiniteError, require_package


def build_optimizer(spec: AdamWSpec | AdafactorSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a recipe, over fp32 master weights."""
    parameters = list(parameters)
    match spec:
        case AdamW8BitSpec():
            from bitsandbytes.optim import AdamW8bit  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra

            betas = spec.beta1, spec.beta2
            return AdamW8bit(
                parameters, lr=spec.learning_rate, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay
            )
        case AdamWSpec():
            return torch.optim.AdamW(
                parameters,
                lr=spec.learning_rate,
                betas=(spec.beta1, spec.beta2),
                eps=spec.eps,
                weight_decay=spec.weight_decay,
                fused=parameters[0].device.type in ("cpu", "cuda"),
            )
        case AdafactorSpec():
            # An absolute learning rate, as everybody who writes "Adafactor, 1e-6" means; by default the rate would be
            # relative to each parameter's scale.
            return Adafactor(
                parameters,
                lr=spec.learning_rate,
                weight_decay=spec.weight_decay,
                scale_parameter=False,
                relative_step=False,
                warmup_init=False,
            )


def require_optimizer(spec: OptimSpec) -> None:
    """Raises ConfigError where the package of an optimizer is not installed; before anything is loaded."""
    if isinstance(spec, AdamW8BitSpec):
        require_package("bitsandbytes", "optim.type adamw_8bit")


def learning_rate_factor(
    step: int, *, schedule: Literal["constant", "linear", "cosine"], warmup_steps: int, total_steps: int
) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step` (from 0).

    Warm-up rises linearly and reaches 1 in its last step (the first step already learns something); afterwards the
    factor stays 1, or falls to 0 just after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_grad_norm: float, *, where: str
) -> float:
    """One step on the gradients, scaled down to a norm; they are gone afterwards.

    Args:
        where: for messages, such as `step 7`.

    Returns:
        Their norm before clipping.

    Raises:
        NonFiniteError: it is NaN or infinite, and the weights are untouched; or weights or moments are so afterwards.
    """
    norm = float(whole_tensor(nn.utils.clip_grad_norm_(parameters, max_grad_norm)))
    if not math.isfinite(norm):
        optimizer.zero_grad()
        raise NonFiniteError(
            f"the gradient is not finite at {where} (norm {norm}); the weights were not changed. Try a lower "
            "optim.learning_rate, runtime.precision=fp32, or continue from an earlier checkpoint."
        )
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        moments = [each for kept in optimizer.state.values() for each in kept.values() if isinstance(each, Tensor)]
        moments = [each for each in moments if each.is_floating_point()]  # what is in 8 bits has its scales there
        tensors = [*(parameter for group in optimizer.param_groups for parameter in group["params"]), *moments]
        is_sharded = any(isinstance(each, DTensor) for each in tensors)
        tensors = [own_part(each) for each in tensors]
        # The norm is read in a tenth of the time, but overflows before they do.
        is_well = bool(nn.utils.get_total_norm(tensors).isfinite() or all(each.isfinite().all() for each in tensors))
        if not (all(gathered(is_well)) if is_sharded else is_well):
            raise NonFiniteError(
                f"the update at {where} overflowed: weights or the optimizer's moments are not finite, and nothing of "
                "it was saved. Try a lower optim.learning_rate or optim.weight_decay, from the checkpoint before."
            )
    return norm


def set_learning_rate(
    optimizer: torch.optim.Optimizer, spec: OptimSpec, step: int, total_steps: int, restarted: int = 0
) -> float:
    """Sets the rate of optimizer step `step` (from 0), at most that of a warm-up that begins (again) at `restarted`."""
    factor = learning_rate_factor(step, schedule=spec.schedule, warmup_steps=spec.warmup_steps, total_steps=total_steps)
    factor = min(factor, (step - restarted + 1) / max(1, spec.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = spec.learning_rate * factor
    return spec.learning_rate * factor
