"""Blocks end in time and within their memory, and leave the process as it was."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Callable

import pytest

from dar.bounded import Bounded


def bounded(work: Callable[[], object], *, seconds: float = 0.2) -> None:
    with Bounded(seconds=seconds):
        work()


def test_a_block_that_never_ends_is_ended() -> None:
    def work() -> None:
        while True:
            with contextlib.suppress(Exception):  # an Exception would be taken for one of the block's own
                time.sleep(0.01)

    with pytest.raises(TimeoutError, match=r"it takes longer than 0\.2 seconds"):
        bounded(work)


def test_a_long_multiplication_is_ended_too() -> None:
    with pytest.raises(TimeoutError):
        bounded(lambda: 7 ** (10**9))


def test_an_interrupt_that_a_destructor_swallowed_comes_again() -> None:
    def work() -> None:
        with contextlib.suppress(BaseException):
            time.sleep(60)
        time.sleep(60)

    with pytest.raises(TimeoutError):
        bounded(work)


def test_memory_is_bounded_and_ordinary_amounts_are_not() -> None:
    bounded(lambda: "a" * (10 << 20), seconds=5)
    with pytest.raises(MemoryError, match="it needs more than 256 MiB of memory"):
        bounded(lambda: b"a" * 10**10, seconds=5)


def test_the_process_is_left_as_it_was() -> None:
    calls: list[int] = []
    limits: list[tuple[int, int]] = []
    before = resource.getrlimit(resource.RLIMIT_AS)

    def work() -> None:
        limits.append(resource.getrlimit(resource.RLIMIT_AS))
        raise KeyError

    handler = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyError):
            bounded(work, seconds=5)
        assert limits != [before]
        assert resource.getrlimit(resource.RLIMIT_AS) == before
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        time.sleep(0.3)
        assert calls == [1]  # whose alarm it was has it
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_in_other_threads_the_block_just_runs() -> None:
    found: list[int] = []

    def work() -> None:
        bounded(lambda: time.sleep(0.1), seconds=0.05)
        found.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1]
