"""A bound on the time and memory of code from outside that runs in this process: a template's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

MEMORY = 256 << 20


class _TimeIsUpError(BaseException):
    """No Exception, so that what runs inside does not take it for one of its own."""


class Bounded:
    """A context: its block ends within `seconds`, and the process grows by at most MEMORY bytes in it.

    Cheap enough for every rendering of a template. Only the main thread can be interrupted, and only Linux says how
    large a process is: elsewhere that bound is not there.

    Raises:
        TimeoutError: the block took longer.
        MemoryError: it asked for more.
    """

    def __init__(self, *, seconds: float = 10.0) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self._is_on = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        if self._is_on:
            self._started, self._give_back = time.monotonic(), _limit_growth()
            self._handler = signal.signal(signal.SIGALRM, _end)
            # Again and again: an exception that reaches a destructor is printed and forgotten.
            self._others = signal.setitimer(signal.ITIMER_REAL, self.seconds, 0.5)

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        if self._is_on:
            delay, interval = self._others
            # Somebody else's alarm goes on as if nothing had been.
            left = max(1e-3, delay - (time.monotonic() - self._started)) if delay else 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
            self._give_back()
        if kind is _TimeIsUpError:
            raise TimeoutError(f"it takes longer than {self.seconds:g} seconds") from None
        if kind is MemoryError:
            raise MemoryError(f"it needs more than {MEMORY >> 20} MiB of memory") from None


def _end(_signal: int, frame: FrameType | None) -> None:
    # A block that is over is not ended again.
    if frame is None or frame.f_code is not Bounded.__exit__.__code__:
        raise _TimeIsUpError


def _limit_growth() -> Callable[[], object]:
    """Sets the limit, where somebody knows how large the process is; what is returned sets the one before."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as stream:
            size = int(stream.read(100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return lambda: None
    import resource  # noqa: PLC0415 - where there is /proc, there is this

    soft, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([size + MEMORY, *known]), hard))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, limits)
