"""What the algorithms' specs share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dar.config.base import Spec

LoggedKind = Literal["demonstrations", "preferences", "verdicts", "rewards"]
"""`prompt` + `completion`, `prompt` + `chosen` + `rejected`, these with `chosen_complies` + `rejected_complies`, or
`prompt` + `completions` + `rewards`.

Preferences (with verdicts or without) may also be two whole conversations without a prompt: it is then what both begin
with.
"""
ClipHigh = Annotated[float, Field(ge=0)]


class AlgorithmSpec(Spec):
    """Base of the algorithms' specs: `type` says which."""

    shorthand: ClassVar[str | None] = "type"
    section: ClassVar[str] = "algorithm."
    needs_group: ClassVar[bool] = False
    """Whether the method compares the completions of one prompt, and so needs at least two."""
    logged: ClassVar[LoggedKind | None] = None
    """What rows of the data an offline method learns from; None for a method that samples its own completions."""

    @classmethod
    def other_way(cls, key: str, type: object) -> str | None:
        """Names the methods that do have an option this one has not."""
        method = type or cls.model_fields["type"].default
        owners = sorted(name for name, spec in concrete_specs(AlgorithmSpec) if key in spec.model_fields)
        if not owners:
            return super().other_way(key, type)
        return f"{method} has no {key}; these methods do: {', '.join(owners)}"


def concrete_specs(base: type[AlgorithmSpec]) -> Iterator[tuple[str, type[AlgorithmSpec]]]:
    """(type, spec) of every method below a base, whichever module defines it."""
    for spec in base.__subclasses__():
        if "type" in spec.model_fields and isinstance(name := spec.model_fields["type"].default, str):
            yield name, spec
        yield from concrete_specs(spec)
