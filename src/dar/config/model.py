"""Specs of the policy and of other models."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from dar.config.base import Count, Positive, Spec


class LoraSpec(Spec):
    """Train low-rank adapters only; the base model with the adapter off is then the reference."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scaling numerator: the adapter's output is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Which modules get an adapter: peft's `all-linear`, or a list of module-name suffixes."""


class ModelSourceSpec(Spec):
    """Where a model comes from."""

    shorthand: ClassVar[str | None] = "path"
    library: ClassVar[str] = "transformers"

    path: str
    """A Hub id, a folder, a `.gguf` file, `package:NAME/inner/path` for a file shipped by an installed package,
    or `toy:letters`, a tiny model that is made on the spot."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    sha256: str | None = None
    """Expected SHA-256 of a `.gguf` file; the run stops when the file is another one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class ReferenceSyncSpec(Spec):
    """Let π₀ follow the policy: π₀ ← mix · π_θ + (1 − mix) · π₀, weight by weight (Gorbatovski et al. 2024)."""

    every: Count
    """Steps between two synchronisations."""
    mix: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy's weights."""


class ModelSpec(ModelSourceSpec):
    """Where the policy comes from, and how it is trained."""

    lora: LoraSpec | None = None
    """Train LoRA adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
