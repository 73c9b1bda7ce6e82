"""What the algorithms' specs share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dar.config.base import Spec, specs_below

LoggedKind = Literal["demonstrations", "preferences", "verdicts", "rewards", "quantiles"]
"""`prompt` + `completion`, `prompt` + `chosen` + `rejected`, these with `chosen_complies` + `rejected_complies`,
`prompt` + `completions` + `rewards`, or these with `ref_rewards`.

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
        having = [spec.model_fields.get("type") for spec in specs_below(AlgorithmSpec) if key in spec.model_fields]
        owners = sorted(kind.default for kind in having if kind and not kind.is_required())
        if not owners:
            return super().other_way(key, type)
        return f"{method} has no {key}; these methods do: {', '.join(owners)}"


class GroupSpec(AlgorithmSpec):
    """Base of those that compare the completions of one prompt."""

    needs_group: ClassVar[bool] = True
