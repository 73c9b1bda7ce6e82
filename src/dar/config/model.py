"""Specs of the policy and of other models."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Discriminator, Field, Tag

from dar.config.base import Count, Positive, Spec


class RankScheduleSpec(Spec):
    """Let ranks shrink to what each adapter needs: AdaRL's rule (Li et al. 2025, arXiv:2510.11899) on LoRA's BA."""

    start: Count
    """Rank of every adapter at first; at most the inputs and outputs of its layer."""
    energy: Annotated[float, Field(gt=0, le=1)] = 0.98
    """A rank becomes the largest number of singular values of BA whose share of their sum is at most this: below 1 at
    least one less at every look."""
    every: Count
    """Steps between two looks at the ranks. After a cut `optim.warmup_steps` are gone through again."""


_Rank = Annotated[
    Annotated[Count, Tag("count")] | Annotated[RankScheduleSpec, Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, dict | RankScheduleSpec) else "count"),
]


class LoraSpec(Spec):
    """Train low-rank adapters only; the base model with the adapter off is then the reference."""

    rank: _Rank = 16
    """Rank of the adapters; or a mapping, by which it shrinks while training goes on."""
    alpha: Positive = 32.0
    """Scaling numerator: the adapter's output is multiplied by alpha / rank, the rank at first where it shrinks."""
    target_modules: str | list[str] = "all-linear"
    """Which modules get an adapter: peft's `all-linear`, or a list of module-name suffixes."""

    @property
    def first_rank(self) -> int:
        """Rank of the adapters before the first step."""
        return self.rank.start if isinstance(self.rank, RankScheduleSpec) else self.rank


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

    @property
    def rank_schedule(self) -> RankScheduleSpec | None:
        """How the ranks of adapters shrink, if there are any that do."""
        return self.lora.rank if self.lora and isinstance(self.lora.rank, RankScheduleSpec) else None
