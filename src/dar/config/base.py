"""What every spec shares: frozen, strict, and helpful about misspelt keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dar.files.hints import nearest_hint
from dar.files.intake import is_text
from dar.shown import one_line

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Rows = Annotated[int, Field(ge=1, le=1_000_000)]
"""A count of what is held in memory at once, one by one."""
_MOST_KEYS = 20


class Spec(BaseModel):
    """Base of every spec: frozen, strict about types, and helpful about misspelt keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    shorthand: ClassVar[str | None] = None
    """The field a bare string stands for: `model: some/path` is `model: {path: some/path}`."""

    @model_validator(mode="before")
    @classmethod
    def _expand_and_check_keys(cls, value: Any) -> Any:
        if isinstance(value, str) and cls.shorthand:
            return {cls.shorthand: value}
        if isinstance(value, dict) and cls.model_config.get("extra") == "forbid":
            unknown = [key for key in value if key not in cls.model_fields]
            if unknown:
                more = f"; … and {len(unknown) - _MOST_KEYS:,} more" if len(unknown) > _MOST_KEYS else ""
                method = value.get("type")
                raise ValueError("; ".join(cls.unknown_key(key, method) for key in unknown[:_MOST_KEYS]) + more)
        return value

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        if isinstance(value, str) and ("\0" in value or not is_text(value)):
            raise ValueError(f"'{one_line(value)}' has a NUL character or half of a surrogate pair, as no file can")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("no number here may be as large as 2**63")
        for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
            cls._can_be_used(part)
        return value

    @classmethod
    def unknown_key(cls, key: object, type: object) -> str:
        """What is wrong with a key that the spec does not have; `type` is what the mapping says it is."""
        return unknown_name_message("key", key, cls.model_fields)


def unknown_name_message(what: str, name: object, allowed: Iterable[str]) -> str:
    """`unknown metric 'eval/rewrad' (did you mean 'eval/reward'?); allowed: …`"""
    name = one_line(str(name), 80)
    return f"unknown {what} '{name}'{nearest_hint(name, allowed)}; allowed: {', '.join(allowed)}"


class OwnSpec(Spec):
    """A class of the user's own, which is imported when the run is built: a recipe can be read without it."""

    model_config = ConfigDict(extra="allow")

    type: str
    """`package.module:Class`, looked for in the working directory too, or `file.py:Class`."""

    @field_validator("type")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if not re.fullmatch(r"([\w.]+|.+\.py):\w+", value):
            raise ValueError(f"'{one_line(value)}' is no import path: write package.module:Class or file.py:Class")
        return value

    @property
    def settings(self) -> dict[str, Any]:
        """All other keys, for the class to check."""
        return dict(self.model_extra or {})
