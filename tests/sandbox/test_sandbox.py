"""Verifiers that hang, crash, eat memory or fork cost the score they were asked for, and nothing else."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dar.config.verifiable import SandboxSpec
from dar.errors import ConfigError
from dar.sandbox.process import Lines
from dar.sandbox.sandbox import Sandbox
from dar.sandbox.score import Failed

TESTS = Path(__file__).parent.parent
# Generous for a busy machine; a hanging call costs a test this much.
# Long enough for a loaded machine; what is to hang is given less.
LIMITS: Any = {"timeout_seconds": 120.0, "memory_gb": 0.5}


# Tells the processes of this run of the tests from those of another on the same machine.
MARK = f"{600 + os.getpid() / 1e8:.8f}"


@pytest.fixture(scope="module", autouse=True)
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every process a sandbox starts inherits TMPDIR, and nothing else that could be ours alone."""
    folder = tmp_path_factory.mktemp(f"sandbox-{MARK}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        yield
        assert not sandboxed_processes()


@pytest.fixture(scope="module")
def pool() -> Iterator[Sandbox]:
    pool = Sandbox("support.verifiers:behave", SandboxSpec(**LIMITS))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Sandbox]:
    """One worker, so that what a call leaves to it meets the next."""
    pool = Sandbox("support.verifiers:behave", SandboxSpec(workers=1, **LIMITS))
    yield pool
    pool.close()


def sandboxed_processes() -> set[int]:
    """Processes that sandboxes of this module have now, and children that cut every tie."""
    found = set()
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            is_ours = "DAR_SANDBOX" in environment and environment.get("TMPDIR") == os.environ["TMPDIR"]
            if is_ours or process.cmdline() == ["sleep", MARK]:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@contextlib.contextmanager
def fresh(function: str, num_workers: int = 1, *, is_trusted: bool = False, **limits: Any) -> Iterator[Sandbox]:
    """A pool of the test's own, of which nothing is left in the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", f"{os.environ['TMPDIR']}/{secrets.token_hex(8)}")
        pool = Sandbox(function, SandboxSpec(workers=num_workers, **(LIMITS | limits)), is_trusted=is_trusted)
        yield pool
        pool.close()
        assert not sandboxed_processes()


def sleepers() -> set[int]:
    """What the daemons of these tests become."""
    return {pid for pid in sandboxed_processes() if "sleep" in _name(pid)}


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def assert_only_workers_are_left() -> None:
    """Of three workers a keeper and a loader each. A killed process may take a moment to be gone."""
    patience = time.monotonic() + 30
    while len(sandboxed_processes()) > 6:
        assert time.monotonic() < patience
        time.sleep(0.05)


def ask(pool: Sandbox, *completions: str, argument: str = MARK) -> list[float | Failed | None]:
    return pool.map([{"completions": [text], "answer": [argument], "unasked": [1]} for text in completions])


def test_values_come_back_in_order(pool: Sandbox) -> None:
    assert ask(pool, "a", "nothing", "bbb", "cc", "print", "") == [1.0, None, 3.0, 2.0, 5.0, 0.0]


def test_each_call_has_a_process_of_its_own_made_by_the_same_loaders(pool: Sandbox) -> None:
    assert len(set(ask(pool, *["pid"] * 8))) == 8
    assert len(set(ask(pool, *["parent"] * 8))) <= 2


def test_calls_of_a_trusted_function_share_a_process_until_one_fails() -> None:
    with fresh("support.verifiers:behave", is_trusted=True) as pool:
        before, again, failed, after = ask(pool, "pid", "pid", "raise", "pid")
        assert before == again != after
        assert failed == Failed("support.verifiers:behave: it raised ValueError: no such answer")
        assert ask(pool, "a", "segfault", "bb") == [
            1.0,
            Failed("support.verifiers:behave: its process was ended by signal SIGSEGV"),
            2.0,
        ]


# --- what a call does to others: nothing ------------------------------------------------------------------------------

FORGED = "b'{\"value\": 99}\\n' * 3"
WRITE = "import os\nfor end in range(3, 256):\n    try: os.write(end, {})\n    except OSError: pass\n"


@pytest.mark.parametrize(
    "code",
    [
        WRITE.format(FORGED),
        "import json\njson.dumps = lambda message: '{\"value\": 99}'",
        "import json.encoder\njson.encoder.JSONEncoder.encode = lambda *_: '{\"value\": 99}'",
        "import os, sys\nfor name in list(vars(sys.modules['__main__'])):\n"
        "    if name.startswith('_'): setattr(sys.modules['__main__'], name, lambda *_: {'value': 99.0})\n",
        "import sys\nsys.modules['verifiers']._behaves = lambda *_: 99.0",
        "import builtins\nbuiltins.float = lambda *_: 99.0",
        # Requests that wait are read away, on every descriptor there is.
        "import os, select\nfor end in range(256):\n    try:\n"
        "        while select.select([end], [], [], 0.01)[0] and os.read(end, 2**20): pass\n    except OSError: pass\n",
        # A thread that goes on writing, and a process that does, with everything it inherits.
        f"import threading\ndef go():\n    while True:\n        exec({WRITE.format(FORGED)!r})\n"
        "threading.Thread(target=go, daemon=True).start()",
        f"import os\nif os.fork() == 0:\n    while True:\n        exec({WRITE.format(FORGED)!r})",
        "import os\nos._exit = lambda code: None",
        "import os\nos.fork = lambda: 0",
        "import os\nos.closerange(0, 256)",
        "import os\nos.killpg(0, 9)",
        "import os\nos.kill(os.getppid(), 9)",
        "import sys\nsys.setrecursionlimit(30)",
        "import os\nfor end in range(256):\n    try: os.set_blocking(end, False)\n    except OSError: pass\n",
        "import os\nprint('{\"value\": 99}\\n' * 1000, flush=True)\nos.write(0, b'x')",
    ],
)
def test_a_call_can_spoil_no_other_score(pool: Sandbox, alone: Sandbox, code: str) -> None:
    for each in pool, alone:
        found = ask(each, "a", f"run: {code}", "bb", "ccc", f"run: {code}", "pppp", "")
        assert [*found[:1], *found[2:4], *found[5:]] == [1.0, 2.0, 3.0, 4.0, 0.0]


NONSENSE = Failed("support.verifiers:behave: its process sent something that is no answer")


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"value": 2}', 2.0),
        ('{"value": true}', 1.0),
        ('{"value": "abc"}', NONSENSE),
        ('{"value": "2"}', NONSENSE),
        ('{"value": [2]}', NONSENSE),
        ('{"value": {}}', NONSENSE),
        ('{"value": NaN}', Failed("support.verifiers:behave: it returned nan, which is not a finite number")),
        ('{"value": -1e999}', Failed("support.verifiers:behave: it returned -inf, which is not a finite number")),
        ('{"value": 1e39}', Failed("support.verifiers:behave: it returned 1e+39, which is not a finite number")),
        ('{"value": 1%s}' % ("0" * 5000), NONSENSE),
        ('{"failed": 2}', NONSENSE),
        ('{"failed": "so"}', Failed("support.verifiers:behave: so")),
        ('{"ended": 0}', NONSENSE),
        ("2", NONSENSE),
        ("null", NONSENSE),
        ("[" * 60_000, NONSENSE),
        ('{"value":' * 10_000, NONSENSE),
        ("\xff", NONSENSE),
        ("", NONSENSE),
        ("x" * 10**6, NONSENSE),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_said_in_place_of_an_answer_costs_one_score(pool: Sandbox, said: str, score: object) -> None:
    whole = repr((said + "\n").encode("latin-1"))
    code = f"import os\nfor end in range(3, 256):\n    try: os.write(end, {whole})\n    except OSError: pass\n"
    assert ask(pool, "a", f"run: {code}", "bb") == [1.0, score, 2.0]


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ("True", 1.0),
        ("float('nan')", Failed("support.verifiers:behave: it returned nan, which is not a finite number")),
        ("float('inf')", Failed("support.verifiers:behave: it returned inf, which is not a finite number")),
        ("1e39", Failed("support.verifiers:behave: it returned 1e+39, which is not a finite number")),
        ("10**400", Failed("support.verifiers:behave: it raised OverflowError: int too large to convert to float")),
        ("{}", Failed("support.verifiers:behave: it returned {}, which is not a number")),
        ("__import__('support.verifiers').verifiers.OddNumber(1)", Failed("support.verifiers:behave: it raised Odd")),
        ("__import__('support.verifiers').verifiers.Odd()", Failed("support.verifiers:behave: it raised Odd")),
        ("1j", Failed("support.verifiers:behave: it returned 1j, which is not a number")),
    ],
)
def test_values_that_are_no_score_cost_one(pool: Sandbox, value: str, score: object) -> None:
    assert ask(pool, "a", f"run: value = {value}", "bb") == [1.0, score, 2.0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("KeyboardInterrupt", "KeyboardInterrupt: "),
        ("GeneratorExit('gone')", "GeneratorExit: gone"),
        ("StopIteration", "StopIteration: "),
        ("__import__('asyncio').CancelledError", "CancelledError: "),
        ("__import__('support.verifiers').verifiers.Odd", "Odd"),
    ],
)
def test_errors_that_are_no_exceptions_cost_one_score(pool: Sandbox, error: str, reason: str) -> None:
    assert ask(pool, "a", f"run: raise {error}", "bb") == [
        1.0,
        Failed(f"support.verifiers:behave: it raised {reason}"),
        2.0,
    ]


def test_no_more_is_read_than_a_line_may_have() -> None:
    own, theirs = socket.socketpair()
    theirs.setblocking(False)
    with own, theirs:
        sent = theirs.send(bytes(2**20))
        lines = Lines(own)
        lines.receive()
        assert len(lines.next_line() or b"") <= 2**17 < sent


def test_an_answer_without_end_fills_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    code = f"while True:\n    exec({WRITE.format('bytes(2**20)')!r})"
    with fresh("support.verifiers:behave") as pool:
        assert ask(pool, f"run: {code}", "bb") == [NONSENSE, 2.0]
    assert psutil.Process().memory_info().rss - before < 2**26


def test_an_import_may_replace_what_answers_are_written_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patching.py").write_text(
        "import json\njson.dumps = json.loads = json.JSONEncoder = None\n"
        "def score(completions):\n    return [float(len(completions[0]))]\n"
    )
    monkeypatch.chdir(tmp_path)
    with fresh("patching:score") as pool:
        assert ask(pool, "a", "bb") == [1.0, 2.0]


# --- what a call leaves behind: nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("DAEMON\n", 7.0),
        ("DAEMON\nDAEMON\nDAEMON\n", 7.0),
        ("import os, signal\nsignal.signal(15, signal.SIG_IGN)\nsignal.signal(1, signal.SIG_IGN)\nDAEMON\n", 7.0),
        ("DAEMON\nraise ValueError('so')", Failed("support.verifiers:behave: it raised ValueError: so")),
        ("DAEMON\nos._exit(1)", Failed("support.verifiers:behave: its process was ended by exit code 1")),
        ("DAEMON\nos.abort()", Failed("support.verifiers:behave: its process was ended by signal SIGABRT")),
        (
            "DAEMON\nos.wait()\nos.killpg(0, 9)",
            Failed("support.verifiers:behave: its process was ended by signal SIGKILL"),
        ),
        (
            "DAEMON\nos.kill(os.getppid(), 9)",
            Failed("support.verifiers:behave: its process was ended by signal SIGKILL"),
        ),
        ("DAEMON\n" + WRITE.format("b'nonsense\\n'"), NONSENSE),
        # One that is never the same process for long.
        (
            "import os\nif os.fork() == 0:\n    while True:\n        if os.fork(): os._exit(0)\n        os.setsid()\n",
            7.0,
        ),
    ],
)
def test_no_daemon_outlives_its_call(pool: Sandbox, code: str, score: object) -> None:
    ask(pool, "a", "bb")  # both workers are there
    assert ask(pool, f"run: {code}", "bb") == [score, 2.0]
    assert not sleepers()
    assert_only_workers_are_left()


def test_no_daemon_outlives_a_call_that_took_too_long() -> None:
    late = Failed("support.verifiers:behave: it took longer than 4 s")
    with fresh("support.verifiers:behave", timeout_seconds=4) as hasty:
        assert ask(hasty, "run: DAEMON\nimport time\ntime.sleep(600)", "bb") == [late, 2.0]
        assert not sleepers()
        # Nor where the process that would have ended it is stopped.
        assert ask(hasty, "run: DAEMON\nos.kill(os.getppid(), 19)", "bb") == [late, 2.0]
        assert not sleepers()


@pytest.mark.parametrize("victim", ["keeper", "loader"])
def test_no_daemon_outlives_its_worker(victim: str) -> None:
    with fresh("support.verifiers:behave") as pool:
        pool.start()
        keeper = psutil.Process(pool._workers[0].process.pid)
        killed = keeper if victim == "keeper" else keeper.children()[0]

        def kill() -> None:
            while not sleepers():
                time.sleep(0.01)
            killed.kill()

        thread = threading.Thread(target=kill)
        thread.start()
        found = ask(pool, "run: DAEMON\nimport time\ntime.sleep(600)", "bb")
        thread.join()
        assert found == [Failed("support.verifiers:behave: its process was ended by signal SIGKILL"), 2.0]
        assert not sleepers()


def test_processes_a_module_starts_serve_its_calls_and_end_with_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with_helper.py").write_text(
        "import os, subprocess, time\n"
        f"helper = subprocess.Popen(['sleep', '{MARK}'], start_new_session=True, env={{}})\n"
        "def score(completions):\n"
        f"    subprocess.Popen(['sleep', '{MARK}'], start_new_session=True, env={{}})\n"
        "    os.kill(helper.pid, 0)\n"
        "    time.sleep(0.6)\n"  # long enough to be counted
        "    return [float(helper.pid)]\n"
    )
    monkeypatch.chdir(tmp_path)
    with fresh("with_helper:score", max_processes=1) as pool:
        helper = ask(pool, "a")[0]
        assert ask(pool, "a", "b") == [helper, helper]
        assert sleepers() == {helper}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("segfault", "its process was ended by signal SIGSEGV"),
        ("exit", "its process was ended by exit code 3"),
        ("fork and die", "its process was ended by exit code 1"),
        ("sys.exit", "it raised SystemExit: 3"),
        ("raise", "it raised ValueError: no such answer"),
        ("eat memory", "it ran out of its memory limit"),
        ("fork", "it had started more than 8 processes"),
        ("write nonsense", "its process sent something that is no answer"),
        ("word", "it returned 'seven', which is not a number"),
    ],
)
def test_misbehaviour_costs_one_score(pool: Sandbox, bad: str, reason: str) -> None:
    assert ask(pool, "a", bad, "bb", "ccc") == [1.0, Failed(f"support.verifiers:behave: {reason}"), 2.0, 3.0]
    assert_only_workers_are_left()


@pytest.mark.parametrize("bad", ["hang", "burn", "ignore signals and hang"])
def test_what_hangs_costs_one_score(bad: str) -> None:
    hasty = Sandbox("support.verifiers:behave", SandboxSpec(**(LIMITS | {"timeout_seconds": 4})))
    assert ask(hasty, "a", bad, "bb")[1] == Failed("support.verifiers:behave: it took longer than 4 s")
    hasty.close()


@pytest.mark.parametrize("bad", ["leave a child", "leave an orphan", "fork and return twice"])
def test_children_left_behind_are_ended_and_the_score_counts(pool: Sandbox, bad: str) -> None:
    assert ask(pool, "a", bad, "bb") == [1.0, float(len(bad)), 2.0]
    assert_only_workers_are_left()


def test_environment_is_not_inherited(pool: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Sandbox("support.verifiers:behave", SandboxSpec(workers=1, **LIMITS))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert ask(fresh, "environment", argument="OPENAI_API_KEY") == [0.0]
    assert ask(fresh, "environment", argument="PATH") == [1.0]
    fresh.close()


def test_asynchronous_functions_and_all_columns() -> None:
    pool = Sandbox("support.verifiers:wait", SandboxSpec(workers=1, **LIMITS))
    assert ask(pool, "a") == [2.0]  # answer and unasked
    pool.close()


def test_one_value_is_due() -> None:
    pool = Sandbox("support.verifiers:twice", SandboxSpec(workers=1, **LIMITS))
    assert ask(pool, "a") == [Failed("support.verifiers:twice: it returned 2 values for 1 completion")]
    pool.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "nowhere:fn",
            "reward nowhere:fn cannot be loaded in its sandbox: ModuleNotFoundError: No module",
        ),
        ("support.verifiers:nothing", "AttributeError: the module support.verifiers has no callable 'nothing'"),
    ],
)
def test_function_that_cannot_be_loaded(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sandbox(function, SandboxSpec(**LIMITS)).start()


def test_nothing_outlives_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = (
        "import os, sys, threading\n"
        "from dar.config.verifiable import SandboxSpec\n"
        "from dar.sandbox.sandbox import Sandbox\n"
        "pool = Sandbox('support.verifiers:behave', SandboxSpec(workers=1, timeout_seconds=300))\n"
        "pool.start()\n"
        "print('ready', flush=True)\n"
        f"pool.map([{{'completions': ['run: DAEMON\\nimport time\\ntime.sleep(600)'], 'answer': ['{MARK}']}}])\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    patience = time.monotonic() + 60
    while not sleepers() and time.monotonic() < patience:
        time.sleep(0.05)
    assert sleepers()
    run.send_signal(signal.SIGKILL)
    run.communicate()
    deadline = time.monotonic() + 60
    while sandboxed_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sandboxed_processes() == set()
