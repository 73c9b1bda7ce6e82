"""What the algorithms' specs share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from dar.config.base import Spec, unknown_key_message

ClipHigh = Annotated[float, Field(ge=0)]


class AlgorithmSpec(Spec):
    """Base of the algorithms' specs: `type` says which."""

    shorthand: ClassVar[str | None] = "type"
    needs_group: ClassVar[bool] = False
    """Whether the method compares the completions of one prompt, and so needs at least two."""
    is_offline: ClassVar[bool] = False
    """Whether the method learns from completions that come with the data, and samples none."""

    @model_validator(mode="before")
    @classmethod
    def _expand_and_check_keys(cls, value: Any) -> Any:
        """Names the methods that do have an option this one has not."""
        if isinstance(value, dict):
            method = str(value.get("type", cls.model_fields["type"].default))
            problems = []
            for key in value:
                if key not in cls.model_fields:
                    owners = sorted(name for name, spec in concrete_specs(AlgorithmSpec) if key in spec.model_fields)
                    if owners:
                        problems.append(f"{method} has no {key}; these methods do: {', '.join(owners)}")
                    else:
                        problems.append(unknown_key_message(key, list(cls.model_fields)))
            if problems:
                raise ValueError("; ".join(problems))
        return value


def concrete_specs(base: type[AlgorithmSpec]) -> Iterator[tuple[str, type[AlgorithmSpec]]]:
    """(type, spec) of every method below a base, whichever module defines it."""
    for spec in base.__subclasses__():
        if "type" in spec.model_fields:
            yield spec.model_fields["type"].default, spec
        yield from concrete_specs(spec)
