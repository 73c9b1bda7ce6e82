"""The cache on disk: shared, damaged, unwritable."""

from __future__ import annotations

import logging
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from dar.errors import ConfigError
from dar.judge.cache import ReplyCache
from dar.judge.reply import Reply, Token

REPLY = Reply("7", (Token("7", (("7", -0.25),)),), 10, 1)


def test_what_was_put_is_found_again(tmp_path: Path):
    cache = ReplyCache(tmp_path / "deep" / "judge.sqlite")
    assert cache.get(["a"]) == {}
    cache.put("a", REPLY)
    assert ReplyCache(cache.path).get(["b", "a"]) == {"a": REPLY}


def test_more_keys_than_a_statement_holds(tmp_path: Path):
    cache = ReplyCache(tmp_path / "judge.sqlite")
    for number in (0, 700, 1600):
        cache.put(str(number), Reply(str(number)))
    found = cache.get([str(number) for number in range(1700)])
    assert {key: reply.text for key, reply in found.items()} == {"0": "0", "700": "700", "1600": "1600"}


def test_the_first_answer_stays(tmp_path: Path):
    cache = ReplyCache(tmp_path / "judge.sqlite")
    cache.put("a", REPLY)
    cache.put("a", Reply("8"))
    assert cache.get(["a"]) == {"a": REPLY}


@pytest.mark.parametrize(
    "content", [b"this is no database at all, and long enough to be read as one " * 50, b"SQLite format 3\0"]
)
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes):
    path = tmp_path / "judge.sqlite"
    path.write_bytes(content)
    cache = ReplyCache(path)
    with caplog.at_level(logging.WARNING):
        assert cache.get(["a"]) == {}
    cache.put("a", REPLY)
    assert cache.get(["a"]) == {"a": REPLY}
    assert (tmp_path / "judge.sqlite.damaged-1").read_bytes() == content
    assert "is damaged" in caplog.text
    assert "set aside as judge.sqlite.damaged-1" in caplog.text


def test_a_file_damaged_in_the_middle_is_set_aside(tmp_path: Path):
    path = tmp_path / "judge.sqlite"
    cache = ReplyCache(path)
    for number in range(40):
        cache.put(str(number), Reply("x" * 2000))
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    cache.get(["25"])
    cache.put("a", REPLY)
    assert cache.get(["a"]) == {"a": REPLY}
    assert (tmp_path / "judge.sqlite.damaged-1").exists()


def test_a_reply_that_cannot_be_read_is_damage_too(tmp_path: Path):
    cache = ReplyCache(tmp_path / "judge.sqlite")
    cache.put("a", REPLY)
    with sqlite3.connect(cache.path) as database:
        database.execute("UPDATE replies SET reply = '{'")
    database.close()
    assert cache.get(["a"]) == {}
    assert (tmp_path / "judge.sqlite.damaged-1").exists()


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "judge.sqlite"
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        ReplyCache(path).put("a", REPLY)
    assert "cannot be used: unable to open database file" in caplog.text


def test_a_damaged_file_that_cannot_be_set_aside_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "judge.sqlite"
    path.write_bytes(b"no database " * 50)

    def refuse(self: Path, target: Path) -> None:
        # A folder that cannot be written; permissions would not keep root from it.
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with caplog.at_level(logging.WARNING):
        ReplyCache(path).put("a", REPLY)
    assert "and cannot be set aside: [Errno 13] Permission denied" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the folder of the judge's cache"):
        ReplyCache(tmp_path / "file" / "judge.sqlite")


def _fill(path: Path, name: str) -> None:
    cache = ReplyCache(path)
    for number in range(100):
        cache.put(f"{name}{number}", Reply(name))
        cache.put(f"both{number}", Reply("both"))


def test_two_processes_share_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "judge.sqlite"
    # Forked: a spawned one would load torch first.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(path, name)) for name in ("x", "y")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    names = [f"{name}{number}" for name in ("x", "y", "both") for number in range(100)]
    assert len(ReplyCache(path).get(names)) == 300
    assert [found.name for found in tmp_path.iterdir() if "damaged" in found.name] == []
