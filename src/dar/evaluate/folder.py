"""The folder of an evaluation: its settings, and rows appended as they come, so that it can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dar.errors import CheckpointError, ConfigError, DataError
from dar.files.atomic import write_text
from dar.files.intake import parse_json, read_text, sha256_of
from dar.files.paths import expanded
from dar.shown import redacted

_SETTINGS = "settings.json"


class EvaluationFolder:
    """A folder that holds one evaluation.

    Args:
        path: made if it does not exist.
        settings: everything the rows depend on, as JSON would have it.

    Raises:
        ConfigError: the folder holds an evaluation with other settings, or something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path = Path(expanded(path))
        wanted = json.loads(json.dumps(settings))
        file = path / _SETTINGS
        if file.exists():
            found = _read_settings(file)
            if found == wanted:
                return
            # Settings alone are those of a call that ended before its first row: nothing is there to mix with.
            if any(path.glob("*.jsonl")):
                raise ConfigError(
                    f"{path} holds an evaluation with other settings, and the two must not mix: "
                    f"{_changes(found, wanted)}. Choose another --out, or remove the folder."
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path} is in use, and not by an evaluation (it has no {_SETTINGS}): choose another --out"
            )
        try:
            self._write(_SETTINGS, wanted)
        except CheckpointError as error:
            raise ConfigError(f"{error}. Choose another --out.") from error

    def lines(self, name: str, *, key: tuple[str, ...]) -> Lines:
        """The rows of one of its files, which begins empty."""
        return Lines(self.path / f"{name}.jsonl", key)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`."""
        self._write("result.json", result)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class Lines:
    """Rows of a JSON Lines file by key, in their order; a last line that was cut off is dropped.

    Raises:
        DataError: another line is not JSON.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path = path
        self.key = key
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                self._keep(parse_json(line.decode(), "the text"))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: line {number} is not a row of this evaluation: {error}") from error

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows and has them on the disk when it returns."""
        lines = [redacted(json.dumps(row, ensure_ascii=False)) for row in rows]
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
        for line in lines:
            self._keep(json.loads(line))

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows[tuple(row[name] for name in self.key)] = row


def file_digest(path: Path) -> dict[str, str]:
    """The file and what is in it, for settings: the same name may hold other rows tomorrow."""
    return {"path": str(path), "sha256": sha256_of(path)}


def _read_settings(file: Path) -> Mapping[str, Any]:
    try:
        found = parse_json(read_text(file), str(file))
    except DataError as error:
        raise ConfigError(f"{error}. Choose another --out.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}. Choose another --out.")
    return found


def _changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {found.get(name)!r} → {wanted.get(name)!r}"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    )
