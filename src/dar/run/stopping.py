"""Ctrl-C and SIGTERM as a wish to stop soon, and not an exception in the middle of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_handled(ask: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, the first Ctrl-C or SIGTERM calls `ask` with the signal's name; the second interrupts."""
    asked: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        ask(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where signals cannot be handled
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
