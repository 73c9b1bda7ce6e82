"""Around code that users wrote: whatever leaves it becomes an error in words."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from dar.errors import DarError
from dar.files.imports import raised_at
from dar.shown import words


class ForeignCode:
    """A block in which every exception becomes an error of ours, an exit and an interrupt too.

    Errors of `dar` pass, as they say already what, where and what to do. So does a `KeyboardInterrupt` that a signal
    has led to: it is the user's Ctrl-C.

    Args:
        explain: makes the error, from the exception's kind and its words, which say where in the user's code it was.
    """

    def __init__(self, explain: Callable[[str, str], DarError]) -> None:
        self._explain = explain
        self._is_interrupted = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers, nor sees signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, self._handle)

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None or isinstance(error, DarError):
            return
        if self._is_interrupted:
            raise KeyboardInterrupt from error
        raise self._explain(type(error).__name__, words(error) + raised_at(error)) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handlers[signal.Signals(number)](number, frame)
        except KeyboardInterrupt:
            self._is_interrupted = True
            raise
