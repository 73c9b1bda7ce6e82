"""The terminal, and the only way to write to it: what is written there is text, whatever it looks like."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import rich.console
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
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


def show_logs(level: int, *, force: bool = False) -> None:
    """Has records from this level on, and warnings, shown; `force` takes the place of handlers that are there."""
    logging.basicConfig(level=level, format="%(message)s", handlers=[LogHandler()], force=force)
    logging.captureWarnings(True)
    # What libraries tell those who call them of their next release; no recipe can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """One bar on standard error, if that is a terminal, while the block runs, and nothing of what libraries print
    there; what they raise goes its way."""
    console = Console(file=sys.stderr)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with shown, redirect_stderr(StringIO()):
        shown.add_task(visible(what), total=None)
        yield


def new_table(title: str, *headings: str, caption: str = "", is_text: bool = False) -> Table:
    """An empty table in the one look that all have: no frame, which leaves more of 80 columns to what is said.

    Args:
        title: above it, on the left.
        headings: of the columns; with none that says anything there is no line of headings.
        caption: below it; what a `±` is of, above all.
        is_text: the cells are sentences; else figures, on the right of every column but the first.
    """
    found = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        title=f"\n{title}",
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        show_header=any(headings),
        show_lines=is_text and any(headings),
    )
    for index, heading in enumerate(headings):
        is_name = not index and not is_text
        found.add_column(heading, justify="right" if index and not is_text else "left", no_wrap=is_name)
    return found


def about(seconds: float) -> str:
    """A time that is only estimated: 45 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
