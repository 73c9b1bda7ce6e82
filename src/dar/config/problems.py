"""What is wrong with a spec, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError

from dar.files.hints import nearest_hint
from dar.shown import one_line

_MOST_PROBLEMS = 20


def unknown_name_message(what: str, name: object, allowed: Iterable[str]) -> str:
    """`unknown metric 'eval/rewrad' (did you mean 'eval/reward'?); allowed: …`"""
    name = one_line(str(name), 80)
    return f"unknown {what} '{name}'{nearest_hint(name, allowed)}; allowed: {', '.join(allowed)}"


def in_one_message(where: str, problems: Sequence[str]) -> str:
    """`where: problem`, or a line for each of several."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where} cannot be used as written:" + "".join(f"\n  {problem}" for problem in problems)


def explain(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    """pydantic's findings as `key.path: what is wrong (found …)`, without pydantic's vocabulary."""
    lines = []
    problems = error.errors(include_url=False)
    for found in problems[:_MOST_PROBLEMS]:
        path = _key_path(found["loc"], raw, keep_last=found["type"] == "missing")
        message = found["msg"].removeprefix("Value error, ")
        if found["type"] == "union_tag_invalid":
            context = found.get("ctx", {})
            allowed = str(context.get("expected_tags", "")).replace("'", "").split(", ")
            message = unknown_name_message("type", context.get("tag", ""), allowed)
        elif found["type"] == "union_tag_not_found":
            message = "the key 'type' is required"
        elif found["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = f"expected a mapping of keys to values (found {quoted(found['input'])})"
        elif found["type"] == "missing":
            message = "this key is required"
        elif found["type"] != "value_error":
            message = f"{message} (found {quoted(found['input'])})"
        lines.append(f"{path}: {message}" if path else message)
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"… and {len(problems) - _MOST_PROBLEMS:,} more")
    return lines


def quoted(value: Any) -> str:
    """What was found: of any size, and of any type where it comes from Python."""
    try:
        return one_line(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def _key_path(location: tuple[int | str, ...], raw: Mapping[str, Any], *, keep_last: bool) -> str:
    """pydantic's location without the union tags it puts between a key and its fields.

    A part that the data does not have is such a tag, or (with `keep_last`) at the end the missing key itself.
    """
    keys: list[str] = []
    here: Any = dict(raw)
    for index, part in enumerate(location):
        known = range(len(here)) if isinstance(here, list) else here if isinstance(here, dict) else ()
        if part in known:
            here = cast(Any, here)[part]
        elif not (keep_last and index == len(location) - 1):
            continue
        keys.append(str(part))
    return ".".join(keys)
