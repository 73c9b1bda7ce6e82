"""What a run is asked for from outside: Ctrl-C and SIGTERM as a wish to stop soon, and the wishes of callbacks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Control:
    """What a run is to do once the present step is finished; callbacks ask for it with the three methods."""

    is_stopping: bool = False
    is_saving: bool = False
    is_evaluating: bool = False
    reason: str | None = None

    def stop(self, reason: str) -> None:
        """Ends the run, with a checkpoint to continue from; the reason is shown."""
        self.is_stopping, self.reason = True, self.reason or reason

    def save(self) -> None:
        """Writes a checkpoint."""
        self.is_saving = True

    def evaluate(self) -> None:
        """Samples and measures the held-out prompts, if there are any."""
        self.is_evaluating = True


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
