"""Specs of what samples completions, one per `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from dar.config.base import Count, OwnSpec, Spec


class InProcessSpec(Spec):
    """Sample in the trainer's process, with its own weights."""

    type: Literal["in_process"] = "in_process"
    """`in_process`"""
    max_cache_tokens: Count = 16384
    """Prompt and completion tokens whose keys and values the sampler holds at once; further prompts wait their turn."""
    in_place: bool = False
    """Read the trainer's weights as they are. By default layers whose weights are not in the compute precision, and on
    a CPU all, are read from copies made for each step: 4 bytes a parameter (2 in bf16) for about half of the time."""


class OwnEngineSpec(OwnSpec):
    """Your own class, by import path, with the methods of `dar.rollout.protocol.Engine`. Further keys are its arguments
    ([design](design.md#seams))."""


def _kind(value: Any) -> str:
    """Which spec is meant, so that a mistake is explained once."""
    name = value.get("type", "in_process") if isinstance(value, dict) else getattr(value, "type", None)
    return "package.module:Class" if ":" in str(name) else str(name)


AnyEngine = Annotated[
    Annotated[InProcessSpec, Tag("in_process")] | Annotated[OwnEngineSpec, Tag("package.module:Class")],
    Discriminator(_kind),
]
