"""Tables of rows named by a recipe: local files and Hub data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from dar.config.data import SourceSpec
from dar.data.formats import formatted
from dar.data.splits import select_part
from dar.errors import DataError
from dar.files.hub import require_source
from dar.files.paths import resolve_path
from dar.files.tables import TABLE_KINDS, Row, read_table, rows_of, table_kind
from dar.verifiable.puzzles import PREFIX, puzzle_rows


def load_rows(source: SourceSpec, given: Iterable[Any] | None = None) -> list[Row]:
    """The rows of a file (JSON kinds may be gzipped), Hub data set or task; `format`, `split_by_hash` and `max_rows`
    are applied in this order.

    Args:
        source: what to read and how.
        given: rows to use instead of reading any.

    Raises:
        DataError: they do not exist, cannot be parsed, are not in the format, or none is left.
    """
    if given is None:
        where = resolve_path(source.path)
        rows = rows_of(_read(where, source), where=where)
    else:
        where = source.path
        rows = rows_of(given, where=where)
    if source.format is not None:
        rows = formatted(rows, source.format, where=where)
    if source.split_by_hash is not None:
        rows = select_part(rows, source.split_by_hash, where=where)
    return rows[: source.max_rows]


def _read(path: str, source: SourceSpec) -> Iterable[Any]:
    if path.startswith(PREFIX):
        return puzzle_rows(path)
    if table_kind(path) in TABLE_KINDS or path.startswith((".", "/")):
        return read_table(Path(path))
    return _read_hub(path, source)


def _read_hub(path: str, source: SourceSpec) -> Iterable[Any]:
    try:
        require_source(path, "dataset")
        table = datasets.load_dataset(path, source.name, split=source.split)
    except Exception as error:
        raise DataError(
            f"the data set {path} (split {source.split}) cannot be loaded: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. A local file needs one of the endings {', '.join(TABLE_KINDS)}."
        ) from error
    return table  # pyright: ignore[reportReturnType] - a named split is one table


def fingerprint(items: Iterable[Any]) -> str:
    """The beginning of a SHA-256. Of objects that JSON does not know only the type counts."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, skipkeys=True, default=_text_of).encode())
    return digest.hexdigest()[:16]


def _text_of(value: Any) -> str:
    return repr(value) if isinstance(value, bytes | date | Decimal) else type(value).__name__
