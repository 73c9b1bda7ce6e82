"""Reward functions that misbehave on demand, for tests of the sandbox: each does what the completion says."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any


def behave(completions: list[str], answer: list[str]) -> list[Any]:
    """The length of the completion, unless it asks for something else."""
    return [_behaves(completion, argument) for completion, argument in zip(completions, answer, strict=True)]


DAEMON = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve("/bin/sleep", ["sleep", argument], {})
    os._exit(0)
"""
"""Code that leaves a process behind which has cut every tie: session, group, parent and environment."""


def _behaves(completion: str, argument: str) -> Any:
    if completion.startswith("run: "):  # what a verifier of programs does
        names: dict[str, Any] = {"argument": argument}
        exec(completion.removeprefix("run: ").replace("DAEMON\n", DAEMON), names)
        return names.get("value", 7.0)
    match completion:
        case "hang":
            time.sleep(600)
        case "burn":
            while True:
                pass
        case "ignore signals and hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(3)
        case "raise":
            raise ValueError("no such answer")
        case "eat memory":
            return len(bytearray(2**33))
        case "fork":
            # Bounded: 40 children, of which each leaves its session, so that killing the group does not reach it.
            for _ in range(40):
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(600)
            time.sleep(600)
        case "leave a child":
            subprocess.Popen(["sleep", argument], start_new_session=True, env={})
        case "leave an orphan":
            # The shell is gone at once; what it started has nobody's environment and a session of its own.
            subprocess.run(["/bin/sh", "-c", f"setsid sleep {argument} &"], env={}, check=True)
        case "fork and return twice":
            os.fork()
        case "fork and die":
            if os.fork() == 0:
                os.setsid()
                time.sleep(600)
            os._exit(1)
        case "write nonsense":
            for descriptor in range(3, 1024):
                try:
                    os.write(descriptor, b"nonsense\n")
                except OSError:
                    continue
            time.sleep(600)
        case "parent":
            return float(os.getppid())
        case "environment":
            return float(argument in os.environ)
        case "word":
            return "seven"
        case "nothing":
            return None
        case "print":
            print("noise", flush=True)
        case "pid":
            return float(os.getpid())
    return float(len(completion))


class Odd(BaseException):
    """Has no words, and nothing that shows it works."""

    def __str__(self) -> str:
        raise self

    __repr__ = __str__


class OddNumber(float):
    """Cannot be made a number."""

    def __float__(self) -> float:
        raise Odd


async def wait(completions: list[str], **columns: Any) -> list[float]:
    """Asynchronous, and takes every column."""
    await asyncio.sleep(0)
    return [float(len(columns)) for _ in completions]


def twice(completions: list[str]) -> list[float]:
    """One value too many."""
    return [1.0, 2.0]
