"""Text for the page: numbers in one format, and hostile text made harmless to the eye."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from dar.shown import visible

MAX_TEXT = 20_000
"""Characters shown of one text."""

_FOR_SCRIPT = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def cut(text: str, limit: int = MAX_TEXT) -> tuple[str, int]:
    """(the text, made visible, up to `limit` characters; how many characters were left out)."""
    return visible(text[:limit]), max(0, len(text) - limit)


def script_json(value: Any) -> str:
    """JSON that may stand in a <script> element: no character in it can end or open anything.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_FOR_SCRIPT)


def number(value: float | None, form: str = ".3f") -> str:
    """A figure as every table of the page shows it, by its format specification or `duration`; '–' where none is.

    What rounds to 0 has no minus.
    """
    if value is None:
        return "–"
    text = duration(value) if form == "duration" else format(value, form)
    if not any(digit in text for digit in "123456789"):
        text = text.replace("-", "+" if "+" in form else "")
    return text.replace("-", "−").replace(",", "\u202f").replace("%", " %")


def difference(value: float, form: str = ".3f") -> str:
    """A difference as the tables show it: with its sign in every format."""
    text = number(value, form)
    return text if text[0] in "+−" else f"+{text}"


def duration(seconds: float) -> str:
    """1.23 s, 12.3 s, 4 min 05 s, 3 h 07 min."""
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def spans(steps: Iterable[int]) -> str:
    """3–5, 9: steps without gaps as one span."""
    runs = (list(run) for _, run in groupby(enumerate(sorted(set(steps))), lambda pair: pair[1] - pair[0]))
    return ", ".join("–".join(count(step) for step in sorted({run[0][1], run[-1][1]})) for run in runs)


def count(value: int) -> str:
    """12 345, with narrow spaces that do not break."""
    return f"{value:,}".replace(",", "\u202f")
