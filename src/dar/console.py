"""The terminal, and the only way to write to it: what is written there is text, whatever it looks like."""

from __future__ import annotations

import logging
from typing import Any

import rich.console
from rich.text import Text

from dar.shown import visible


class Console(rich.console.Console):
    """rich's console, on which brackets are no markup, `:words:` no emoji, and control characters are signs.

    That is so of strings, wherever they stand (in lines, cells, titles); nothing else is to be printed.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


class LogHandler(logging.Handler):
    """Shows log records on standard error: what a command prints may be read by another program."""

    def emit(self, record: logging.LogRecord) -> None:
        Console(stderr=True).print(f"{record.levelname} {self.format(record)}"[:8_000], soft_wrap=True)
