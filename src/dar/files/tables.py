"""Tables of rows: JSON, JSON Lines, Parquet and CSV files, and objects of Python's."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dar.errors import DataError
from dar.files.intake import MAX_BYTES, is_text, parse_json, read_text
from dar.files.paths import missing
from dar.shown import one_line

Row = Mapping[str, Any]
TABLE_KINDS = (".jsonl", ".json", ".parquet", ".csv")


def table_kind(path: str | Path) -> str:
    """The file's ending, `.gz` apart."""
    return Path(str(path).removesuffix(".gz")).suffix


def read_table(file: Path) -> list[Any]:
    """The rows of a file; all kinds but Parquet may be gzipped.

    The cells of CSV are text, all of them: what is a number is known to who asks for one (`typed`). JSON may be a list
    or JSON Lines, whatever the file is called.

    Raises:
        DataError: it does not exist, is of another kind, or cannot be parsed.
    """
    if file.is_dir():
        raise DataError(f"{file} is a folder; name a file in it")
    if not file.is_file():
        raise DataError(f"the data file {missing(file)}")
    match table_kind(file):
        case ".jsonl" | ".json":
            return _json_rows(read_text(file), file)
        case ".csv":
            return _csv_rows(read_text(file), file)
        case ".parquet":
            try:
                return pyarrow.parquet.read_table(file).to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read: {one_line(str(error))}") from error
        case _:
            raise DataError(f"{file}: the file type is not known; use one of {', '.join(TABLE_KINDS)}")


def rows_of(table: Iterable[Any], *, where: str) -> list[Row]:
    """The rows of a `datasets.Dataset`, a pandas DataFrame, or any iterable of mappings, arrays in them as lists.

    Raises:
        DataError: there are none, a row is not a mapping, or one holds text that no file can hold.
    """
    if hasattr(table, "iloc"):
        frame: Any = table
        table = frame.astype(object).where(frame.notna(), None).to_dict("records")
    if isinstance(table, Mapping):
        raise DataError(
            f"{where} is a {type(table).__name__} of {', '.join(map(str, table)) or 'nothing'}, and no table of rows: "
            f"give one of its parts, such as data['{next(iter(table), 'train')}'] (of columns: Dataset.from_dict(data))"
        )
    if isinstance(table, str | bytes) or not isinstance(table, Iterable):
        raise DataError(f"{where} is a {type(table).__name__}; expected a list of rows, a datasets.Dataset or a path")
    rows = list(table)
    if not rows:
        raise DataError(f"{where} has no rows")
    return [_row(row, f"{where}: row {index}") for index, row in enumerate(rows)]


def typed(value: Any) -> Any:
    """What a text says where a number, a truth value or nothing is due, as a cell of CSV; all else as it is."""
    if not isinstance(value, str) or "_" in value:
        return value
    text = value.strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return value


_WORDS = {"": None, "true": True, "false": False}


def _json_rows(text: str, file: Path) -> list[Any]:
    if text.lstrip().startswith("["):
        return parse_json(text, str(file))
    # Not splitlines(): a JSON string may hold U+2028, which Python takes for the end of a line.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if table_kind(file) == ".json":
        try:
            found = parse_json(text, str(file))
        except DataError:
            found = None  # more than one value
        if found is not None:
            keys = f" with the keys {', '.join(found)}" if isinstance(found, dict) else ""
            raise DataError(f"{file}: expected a list of rows or JSON Lines, found one {type(found).__name__}{keys}")
    return [parse_json(line, f"{file}: line {number}") for number, line in lines]


def _csv_rows(text: str, file: Path) -> list[Any]:
    limit = csv.field_size_limit(MAX_BYTES)
    rows: list[Any] = []
    # Strict: a quote that is never closed would make one cell of all that follows.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{file}: two columns have the same name: {', '.join(names)}")
        for cells in filter(None, reader):
            if len(cells) != len(names):
                raise DataError(
                    f"{file}: row {len(rows)} (it ends in line {reader.line_num}) has {len(cells)} cells, but there "
                    f"are {len(names)} columns ({', '.join(names)}): a cell with a comma or a line break needs quotes"
                )
            rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num} is not CSV: {error} (row {len(rows)})") from error
    finally:
        csv.field_size_limit(limit)
    return rows


_DEEPEST = 100


def _row(row: Any, here: str) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{here} is a {type(row).__name__}, expected a mapping of columns to values, as {{'prompt': '…'}}"
        )
    if unnamed := [name for name in row if not isinstance(name, str)]:
        raise DataError(f"{here} has a column {unnamed[0]!r}; columns need names that are text")
    return {name: _plain(value, f"{here}: column '{name}'") for name, value in row.items()}


def _plain(value: Any, here: str, depth: int = 0) -> Any:
    """The value with lists for arrays and dicts for mappings; a copy, whose strings can be written."""
    if isinstance(value, str):
        if not is_text(value):
            raise DataError(
                f"{here} holds half of a surrogate pair, such as an emoji that was cut in two, which cannot be "
                f"written or tokenised; remove it: {one_line(value, 120)}"
            )
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping | list | tuple) and depth == _DEEPEST:
        raise DataError(f"{here} is nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping):
        return {name: _plain(item, here, depth + 1) for name, item in value.items()}
    return [_plain(item, here, depth + 1) for item in value] if isinstance(value, list | tuple) else value
