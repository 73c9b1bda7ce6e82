"""What every spec shares: frozen, strict, and helpful about misspelt keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from dar.config.other_names import batch_size, instead
from dar.config.problems import explain, in_one_message
from dar.errors import ConfigError
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
_FIELDS = "\n\nFields:\n"


if TYPE_CHECKING:
    _Model = BaseModel
else:
    # Unseen by type checkers, which would take it for the signature of every spec.
    class _SpecType(type(BaseModel)):
        def __call__(cls, *args: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*args, **settings)
            except ValidationError as error:
                raise ConfigError(in_one_message(cls.__name__, explain(error, settings))) from error

    class _Model(BaseModel, metaclass=_SpecType):
        pass


class Spec(_Model):
    """Base of every spec: frozen, strict about types, and helpful about misspelt keys.

    Raises (when constructed):
        ConfigError: every key that is unknown, missing or impossible, in one message.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra=lambda schema: _describe(schema),
    )

    shorthand: ClassVar[str | None] = None
    """The field a bare string stands for: `model: some/path` is `model: {path: some/path}`."""

    section: ClassVar[str] = ""
    """Where in a recipe it stands, as `optim.`, if it has one place."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        fields = []
        for name, field in cls.model_fields.items():
            if field.description is None and get_origin(field.annotation) is Literal:
                field.description = f"`{get_args(field.annotation)[0]}`"  # a `type` says all there is to say
            default = "" if field.is_required() else f" = {_default(field)!r}"
            fields.append(f"  {name}{default}\n" + fill(field.description or "", 100, initial_indent=" " * 6))
        cls.__doc__ = cleandoc(cls.__doc__ or "") + _FIELDS + "\n".join(fields)

    @model_validator(mode="wrap")
    @classmethod
    def _all_that_is_wrong(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """Unknown keys are told together with what is wrong with the others."""
        if isinstance(value, str) and cls.shorthand:
            value = {cls.shorthand: value}
        if not isinstance(value, dict) or cls.model_config.get("extra") == "allow":
            return handler(value)
        unknown = [key for key in value if key not in cls.model_fields]
        if not unknown:
            return handler(value)
        said = cls._unknown_keys(unknown, value.get("type"))
        for key in cls.model_fields.keys() & {"prompts_per_step", "pairs_per_step"}:
            said += [line for line in (batch_size(value, key),) if line is not None]
        found = [InitErrorDetails(type="value_error", ctx={"error": ValueError(line)}, input=value) for line in said]
        try:
            handler({key: given for key, given in value.items() if key in cls.model_fields})
        except ValidationError as error:
            # What does not fit together may be the unknown key's fault: told once the keys are right.
            found += [cast(InitErrorDetails, part) for part in error.errors(include_url=False) if part["loc"]]
        raise ValidationError.from_exception_data(cls.__name__, found)

    @classmethod
    def _unknown_keys(cls, unknown: list[Any], type: object) -> list[str]:
        """A line for each key that something can be said of, and one for all others."""
        shown = {key: cls.other_way(str(key), type) for key in unknown[:_MOST_KEYS]}
        lines = [line for line in shown.values() if line is not None]
        if others := [key for key, line in shown.items() if line is None]:
            named = ", ".join(f"'{one_line(str(key), 80)}'{nearest_hint(str(key), cls.model_fields)}" for key in others)
            more = f", … and {len(unknown) - _MOST_KEYS:,} more" if len(unknown) > _MOST_KEYS else ""
            plural = "s" if len(others) > 1 else ""
            lines.append(f"unknown key{plural} {named}{more}; allowed: {', '.join(cls.model_fields)}")
        return lines

    @classmethod
    def other_way(cls, key: str, type: object) -> str | None:
        """What to write instead of a key that the spec does not have, where that is known.

        Args:
            key: the unknown key.
            type: what the mapping that has it says it is.
        """
        keys = [f"{cls.section}{name}" for name in keys_below(cls)]
        return instead(key, keys, lambda found: found.removeprefix(cls.section))

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

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # What is as it always is would hide what is not.
        fields = type(self).model_fields
        for name, value in self:
            if name not in fields or fields[name].is_required() or value != _default(fields[name]):
                yield name, value


def _describe(schema: dict[str, Any]) -> None:
    """In a JSON schema each field has its own description."""
    schema["description"] = schema["description"].split(_FIELDS)[0]
    for field in schema.get("properties", {}).values():
        if "const" in field:
            field.setdefault("description", f"`{field['const']}`")


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def specs_in(annotation: Any) -> Iterator[type[Spec]]:
    """The specs an annotation mentions, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for argument in get_args(annotation):
        yield from specs_in(argument)


def keys_below(spec: type[Spec], prefix: str = "") -> Iterator[str]:
    """Every key of a spec, dotted, but for those of lists' entries."""
    for name, field in spec.model_fields.items():
        yield f"{prefix}{name}"
        if get_origin(field.annotation) is not list:
            for child in specs_in(field.annotation):
                yield from keys_below(child, f"{prefix}{name}.")


def specs_below(spec: type[Spec]) -> Iterator[type[Spec]]:
    """Every spec that is derived from one, whichever module defines it."""
    for each in spec.__subclasses__():
        yield each
        yield from specs_below(each)


def by_type(default: str | None = None) -> BeforeValidator:
    """For specs told apart by `type`: it may be given alone, as a string, and left out where there is a default."""

    def expanded(value: Any) -> Any:
        if isinstance(value, str):
            return {"type": value}
        return {"type": default, **value} if default and isinstance(value, dict) else value

    return BeforeValidator(expanded)


def _has_both_parts(value: str) -> str:
    module, _, attribute = value.partition(":")
    if not module or not attribute:
        raise ValueError(f"expected 'package.module:function', got '{value}'")
    return value


FunctionPath = Annotated[str, AfterValidator(_has_both_parts)]
"""`package.module:function` or `file.py:function`."""


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
