"""The terminal, and the only way to write to it: what is written there is text, whatever it looks like."""

from __future__ import annotations

import logging
from typing import Any

import rich.console
from rich.text import Text

from dar.shown import visible

_LONGEST_RECORD = 8_000


class Console(rich.console.Console):
    """rich's console for text from anywhere: brackets are no markup, `:words:` no emoji, control characters are signs.

    Strings alone are made harmless, wherever they stand (in lines, cells, titles), so nothing else is to be printed.

    Args:
        settings: of rich's console.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


class LogHandler(logging.Handler):
    """Shows log records on standard error, a line each: what a command prints may be read by another program."""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {self.format(record)}"
        Console(stderr=True).print(text[:_LONGEST_RECORD], soft_wrap=True)
