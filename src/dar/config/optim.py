"""Specs of the optimizers, one per `type`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dar.config.base import NotNegative, Positive, Spec, by_type
from dar.config.data import SourceSpec


class NullSpaceSpec(Spec):
    """Keep what the model does on general text: NSPO's projection of the weights' change (arXiv:2512.11391)."""

    shorthand: ClassVar[str | None] = "data"

    data: SourceSpec
    """General prompts; layers may change only where these have no inputs."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 5e-5
    """Directions whose eigenvalue is below this share of the largest are free to change."""
    layers: Literal["mlp", "all"] = "mlp"
    """The MLPs' linear layers (the authors' choice), or all linear layers but the head."""


class OptimSpec(Spec):
    """Base of the optimizers' specs: `type` says which."""

    shorthand: ClassVar[str | None] = "type"
    section: ClassVar[str] = "optim."

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at the last step linearly or along a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm; `.inf` turns clipping off."""
    null_space: NullSpaceSpec | None = None
    """Restrict the weights' change to the null space of general data."""


class AdamWSpec(OptimSpec):
    """AdamW (Loshchilov & Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the squared gradient's running mean."""
    eps: Positive = 1e-8
    """Added to the denominator."""


class AdamW8BitSpec(AdamWSpec):
    """AdamW with its moments in 8 bits, block by block (Dettmers et al. 2022, arXiv:2110.02861); of weights of fewer
    than 4096 numbers in fp32. By bitsandbytes (`dar-rlhf[bitsandbytes]`)."""

    type: Literal["adamw_8bit"] = "adamw_8bit"  # pyright: ignore[reportIncompatibleVariableOverride]


class AdafactorSpec(OptimSpec):
    """Adafactor (Shazeer & Stern 2018): the second moment of a matrix kept as a row and a column."""

    type: Literal["adafactor"] = "adafactor"


AnyOptim = Annotated[AdamWSpec | AdamW8BitSpec | AdafactorSpec, Field(discriminator="type"), by_type("adamw")]
