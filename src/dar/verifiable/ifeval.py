"""IFEval: which of a prompt's verifiable instructions a completion follows, strictly or loosely."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dar.errors import DataError
from dar.files.hints import nearest_hint
from dar.files.intake import parse_json
from dar.verifiable.instructions import CHECKS, Check


def check_instructions(
    text: str,
    instruction_ids: Sequence[str] | str,
    arguments: Sequence[Mapping[str, Any] | str | None] | str | None,
    *,
    loose: bool = False,
) -> list[bool]:
    """Which instructions a completion follows.

    Strict: the check holds for the text as it is. Loose: it holds for the text, or for one of seven variants of it:
    without its first line, last line or both, each with and without asterisks. An empty text follows nothing.

    The decisions are those of the authors' evaluation code, with four exceptions: sentences and capital words are told
    apart by rules in place of downloaded NLTK models; `letter_frequency` counts the character it is given, where the
    original draws a random letter in place of one that is not in a to z; language detection is seeded; keywords are
    taken literally, not as regular expressions.

    Args:
        text: the completion.
        instruction_ids: such as `punctuation:no_comma`, the column `instruction_id_list` of the published data.
        arguments: one mapping per instruction, the column `kwargs`; keys whose value is None are absent ones. Both may
            be JSON text, and whole numbers floats, as other files than the published one have them.
        loose: see above.

    Returns:
        One bool per instruction.

    Raises:
        DataError: an id is not known, or its arguments are not those it takes.

    Zhou et al. 2023, arXiv:2311.07911, section 2.2.
    """
    checks = read_instructions(instruction_ids, arguments)
    variants = [variant for variant in (_variants(text) if loose else [text]) if variant.strip()]
    return [any(check(variant, **kwargs) for variant in variants) for check, kwargs in checks]


def read_instructions(instruction_ids: Any, arguments: Any) -> list[tuple[Check, dict[str, Any]]]:
    """The checks of a row with their arguments. Raises as `check_instructions`, whose arguments these are."""
    ids = as_list(instruction_ids, "instruction_id_list")
    given = as_list([None] * len(ids) if arguments is None else arguments, "kwargs")
    if len(ids) != len(given):
        raise DataError(f"{len(ids)} IFEval instructions came with {len(given)} sets of arguments")
    return [_resolve(*pair) for pair in zip(ids, given, strict=True)]


def as_list(value: Any, name: str) -> list[Any]:
    """A column of a row that holds a list, or its JSON text. Raises DataError where it holds something else."""
    values = parse_json(value, name) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DataError(f"{name} must be a list, found {value!r:.200}")
    return [parse_json(each, name) if isinstance(each, str) and each[:1] in "{[" else each for each in values]


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(variant.replace("*", "") for variant in cut)]


def _resolve(instruction_id: Any, given: Any) -> tuple[Check, dict[str, Any]]:
    check = CHECKS.get(instruction_id) if isinstance(instruction_id, str) else None
    if check is None:
        hint = nearest_hint(str(instruction_id), CHECKS)
        raise DataError(f"unknown IFEval instruction '{instruction_id}'{hint}; known: {', '.join(CHECKS)}")
    if not isinstance(given or {}, Mapping):
        raise DataError(f"kwargs of '{instruction_id}' must be a mapping of names to values, found {given!r:.200}")
    kwargs = {key: _whole(value) for key, value in (given or {}).items() if value is not None}
    expected = {name: kind for name, kind in inspect.get_annotations(check).items() if name not in ("text", "return")}
    if kwargs.keys() != expected.keys():
        raise DataError(
            f"the IFEval instruction '{instruction_id}' takes {', '.join(expected) or 'no arguments'}; the data gives "
            f"{', '.join(sorted(kwargs)) or 'none'}"
        )
    for name, value in kwargs.items():
        wanted, is_one = _KINDS["relation" if name.endswith("relation") else expected[name]]
        if not is_one(value):
            raise DataError(
                f"{name} of the IFEval instruction '{instruction_id}' must be {wanted}, found {value!r:.200}"
            )
    return check, kwargs


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "Sequence[str]": (
        "a list of texts",
        lambda value: isinstance(value, list | tuple) and all(isinstance(each, str) for each in value),
    ),
    "relation": ("'at least' or 'less than'", lambda value: value in ("at least", "less than")),
}
"""What an argument may be, by its annotation."""
