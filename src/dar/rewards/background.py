"""Where asynchronous rewards run: an event loop in a thread of its own, so that requests wait while the models work."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from functools import cache
from typing import Any


def start_in_background(work: Awaitable[Any]) -> Future[Any]:
    """Begins an awaitable at once; its `result()` waits, and `cancel()` gives it up.

    The loop is the same for the whole process, so a client may keep its connections from one step to the next.
    """

    async def wait() -> Any:
        return await work

    return asyncio.run_coroutine_threadsafe(wait(), _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # A daemon: what is still being waited for when the process ends is of no use to anyone.
    threading.Thread(target=_run, args=(loop,), name="dar-rewards", daemon=True).start()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        # A task that exits or interrupts keeps this as its result, and asyncio stops the loop, on which others wait.
        with contextlib.suppress(BaseException):
            loop.run_forever()
