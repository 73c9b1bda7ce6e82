"""Answers on disk: what was asked once need not be paid for again, by this run or another."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dar.errors import ConfigError
from dar.judge.reply import REPLIES, Reply

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_WAIT = 30.0
"""Seconds to wait for another process that is writing."""


class ReplyCache:
    """Replies by the SHA-256 of what was asked, in an SQLite file that several processes may share.

    A file that is not a database, or a damaged one, is set aside under another name, with a warning, and a new one
    begun. A cache that cannot be written is a warning too: it costs money, not the run.

    Args:
        path: of the file; its folder is made.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder of the judge's cache {path}: {error}") from error

    def get(self, keys: Sequence[str]) -> dict[str, Reply]:
        """The replies that are there, by key."""

        def read(database: sqlite3.Connection) -> dict[str, Reply]:
            # As one variable: SQLite bounds how many a statement may have.
            asked = "SELECT key, reply FROM replies WHERE key IN (SELECT value FROM json_each(?))"
            return {key: REPLIES.validate_json(reply) for key, reply in database.execute(asked, [json.dumps(keys)])}

        return self._with_database(read) or {}

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply; one that is there already stays, so that everybody goes on seeing the same."""

        def write(database: sqlite3.Connection) -> None:
            row = (key, REPLIES.dump_json(reply).decode())
            database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", row)

        self._with_database(write)

    def _with_database(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """The work's result; None, after a warning, where the file cannot be used at all."""
        for _ in range(2):
            identity = _identity(self.path)
            try:
                with _opened(self.path) as database:
                    return work(database)
            except sqlite3.OperationalError as error:
                log.warning("the judge's cache %s cannot be used: %s", self.path, error)
                return None
            except (sqlite3.DatabaseError, ValueError) as error:
                self._set_aside(identity, error)
        return None

    def _set_aside(self, identity: int | None, error: Exception) -> None:
        """Renames the damaged file, unless another process was quicker and a new one stands in its place."""
        if identity is None or _identity(self.path) != identity:
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
            for suffix in ("-wal", "-shm"):
                # They belong to the damaged file; left here, they would be played into the new one.
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        except FileNotFoundError:
            return  # another process was quicker after all
        except OSError as problem:
            log.warning("the judge's cache %s is damaged (%s) and cannot be set aside: %s", self.path, error, problem)
            return
        log.warning("the judge's cache %s is damaged (%s): set aside as %s", self.path, error, aside.name)


def _identity(path: Path) -> int | None:
    """The file's inode number; None where there is no file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one transaction: rewards may be asked from another thread at every step."""
    database = sqlite3.connect(path, timeout=_WAIT)
    try:
        # Readers do not wait for a writer then, nor it for them.
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")
        with database:
            yield database
    finally:
        database.close()
