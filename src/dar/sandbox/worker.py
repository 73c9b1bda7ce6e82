"""The program a sandbox runs in each of its workers: it calls one function, in processes of the call's own.

A script of the standard library alone, run by its path, so that a process holds the function's own imports and nothing
else. The *keeper*, in which no foreign code runs, starts the *loader*, and ends all that is left when that has ended or
the sandbox is gone. The loader imports the function. For each call it gets one end of a socket, forks a process that
reads its request and writes its answer there, a line of JSON, and ends what that process has left before it says so: a
call has no way to the requests and answers of others. `dar.sandbox.sandbox` is the other side; it unpickles nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import glob
import importlib
import inspect
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Set
from json import dumps, loads  # as they are before an import has replaced them
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_HEADROOM_PROCESSES = 256
"""Processes the user's account may still start when a call begins: the kernel's own end of a fork bomb."""


def main() -> None:
    """The keeper: starts the loader, and ends as it does when nothing is left of it."""
    channel, hello = socket.socket(fileno=int(sys.argv[1])), loads(sys.argv[2])
    _adopt_orphans()
    loader = _fork()
    if loader == 0:
        _adopt_orphans()
        _serve(channel, hello)
        os._exit(0)
    threading.Thread(target=_end_with_sandbox, args=(channel, loader), daemon=True).start()
    _, status = os.waitpid(loader, 0)
    _end_descendants()
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _serve(channel: socket.socket, hello: dict[str, Any]) -> None:
    """The loader: loads the function, says so, and forks for each call until the sandbox hangs up."""
    try:
        function = _load(hello["function"], hello["path"])
        parameters = _parameters(function)
    except BaseException as error:  # whatever an import may raise, SystemExit included
        _say(channel, {"error": _described(error)})
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else an import may have us hear of no end
    gc.freeze()  # what is never collected is never written to, and stays shared with the calls' processes
    spared = _descendants()
    _say(channel, {"parameters": parameters})
    while ends := socket.recv_fds(channel, 1, 1)[1]:
        call = _fork()
        if call == 0:
            if not hello["is_trusted"]:
                channel.close()
            _limit(hello["memory_bytes"])
            while ends and _answer(function, ends[0], hello["cpu_seconds"]) and hello["is_trusted"]:
                _say(channel, {"ended": 0})
                ends = socket.recv_fds(channel, 1, 1)[1]
            os._exit(0)
        os.close(ends[0])
        pid = status = 0
        while pid != call:  # orphans are ours now, and end too
            pid, status = os.waitpid(-1, 0)
        with contextlib.suppress(OSError):
            os.killpg(call, signal.SIGKILL)
        _end_descendants(spared)
        _say(channel, {"ended": os.waitstatus_to_exitcode(status)})


def _answer(function: Callable[..., Any], end: int, cpu_seconds: float) -> bool:
    """The call's process: reads the request, calls, answers; whether all went well."""
    own = os.getpid()
    with socket.socket(fileno=end) as stream:
        request = pickle.load(stream.makefile("rb"))
        _allow_seconds(cpu_seconds)
        answer = _call(function, request)
        if os.getpid() != own:
            os._exit(0)  # a child the function forked has come this far; the request is its parent's to answer
        _say(stream, answer)
    return "value" in answer


def _load(path: str, search: list[str]) -> Callable[..., Any]:
    sys.path[:] = search
    module, _, attribute = path.partition(":")
    function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise AttributeError(f"the module {module} has no callable '{attribute}'")
    return function


def _parameters(function: Callable[..., Any]) -> list[str] | None:
    """The names it takes; None for all."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return list(parameters)


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        values = function(**arguments)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(values) != 1:
            return {"failed": f"it returned {len(values)} values for 1 completion"}
        return _plain(values[0])
    except MemoryError:
        return {"failed": "it ran out of its memory limit"}
    except BaseException as error:  # sys.exit() in a verifier costs its score like any other exception
        return {"failed": f"it raised {_described(error)}"}


async def _awaited(values: Any) -> Any:
    return await values


def _plain(value: Any) -> dict[str, Any]:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return {"value": None if value is None else float(value)}
    reason = getattr(value, "reason", None)
    if type(value).__name__ == "Failed" and isinstance(reason, str):
        return {"failed": reason[:500]}
    return {"failed": f"it returned {repr(value)[:200]}, which is not a number"}


def _described(error: BaseException) -> str:
    with contextlib.suppress(BaseException):  # an error need not have words
        return f"{type(error).__name__}: {error}"[:500]
    return type(error).__name__


# --- limits ----------------------------------------------------------------------------------------------------------


def _limit(memory_bytes: int) -> None:
    """Caps what may be allocated beyond what is there now, and how many processes the account may have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return  # what is in use already cannot be read there, and a limit below it would end the process at once
    with open("/proc/self/statm", encoding="ascii") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, size + memory_bytes))
    with open("/proc/loadavg", encoding="ascii") as stream:
        threads = int(stream.read().split()[3].partition("/")[2])
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    wanted = threads + _HEADROOM_PROCESSES
    wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NPROC, (wanted, most))


def _allow_seconds(seconds: float) -> None:
    """Ends the process when it has burnt so much processor time from here: nobody else may be left to do it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, hard))


# --- processes -------------------------------------------------------------------------------------------------------


def _fork() -> int:
    """Forks; the child has a session and a group of its own, so that one that kills its group kills no more."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
    return pid


def _adopt_orphans() -> None:
    """Makes this process the parent of whatever its children leave behind, so that nothing escapes its sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants(spared: Set[int] = frozenset()) -> None:
    """Kills all that this process has started, until none is left: what a killed one leaves behind becomes ours."""
    while found := _descendants(spared):
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)


def _descendants(spared: Set[int] = frozenset()) -> set[int]:
    """All but some and theirs."""
    found, waiting = set[int](), [os.getpid()]
    while waiting:
        for path in glob.glob(f"/proc/{waiting.pop()}/task/*/children"):
            with contextlib.suppress(OSError), open(path, encoding="ascii") as stream:
                fresh = set(map(int, stream.read().split())) - found - spared
                found |= fresh
                waiting += fresh
    return found


def _end_with_sandbox(channel: socket.socket, loader: int) -> None:
    """Waits for the sandbox's end of the channel to close, as it does when its process is killed."""
    hangup = select.poll()
    hangup.register(channel, 0)
    hangup.poll()
    with contextlib.suppress(OSError):
        os.kill(loader, signal.SIGKILL)


def _say(end: socket.socket, message: dict[str, Any]) -> None:
    end.sendall(dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
