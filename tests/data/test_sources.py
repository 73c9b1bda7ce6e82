"""Tables of rows from files and objects; what is wrong with one is said with file and line."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from dar.config.data import SourceSpec
from dar.data.sources import load_rows
from dar.errors import DataError
from dar.files.tables import rows_of, typed

ROWS: list[dict[str, Any]] = [{"prompt": "say a", "answer": "a"}, {"prompt": "say ü\u2028!", "answer": "b"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def load(path: Path, **settings: Any) -> list[Any]:
    return list(load_rows(SourceSpec(path=str(path), **settings)))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(path)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what can be read ------------------------------------------------------------------------------------------------

# JSON is told from JSON Lines by what is in the file; a line separator inside a string ends no line.
BLANK_LINES = "\n" + JSONL.replace("\n", "\r\n\n")
JSON_TEXTS = [JSONL, BLANK_LINES, "\ufeff" + JSONL, json.dumps(ROWS), json.dumps(ROWS, indent=1)]
READ: list[tuple[str, str | bytes, list[dict[str, Any]]]] = [
    *((name, text, ROWS) for name in ("rows.json", "rows.jsonl") for text in JSON_TEXTS),
    ("rows.jsonl.gz", gzip.compress(JSONL.encode()), ROWS),
    ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode()), ROWS),
    ("rows.csv", 'prompt,score\n"say a, b",1\n', [{"prompt": "say a, b", "score": "1"}]),
    ("rows.csv.gz", gzip.compress(b"a,b\r1,2\r"), [{"a": "1", "b": "2"}]),
]


@pytest.mark.parametrize(("name", "content", "rows"), READ)
def test_files_are_read(tmp_path: Path, name: str, content: str | bytes, rows: list[dict[str, Any]]):
    assert load(write(tmp_path / name, content)) == rows


def test_parquet_is_read_with_its_nested_messages(tmp_path: Path):
    rows = [{"prompt": [{"role": "user", "content": "say a"}], "score": 0.5}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet") == rows


def test_csv_is_read_as_pythons_own_reader_reads_it(tmp_path: Path):
    # Over a megabyte, with all that a cell may hold; arrow's reader loses the beginnings of such rows.
    row = '"line {}\nline, ""two""\r\nthree",007,12:30,12345678901234567890,,é,true,NULL\r\n'
    text = "a,b,c,d,e,f,g,h\r\n" + "".join(row.format(number) for number in range(25_000)) + "\n"
    path = write(tmp_path / "rows.csv", b"\xef\xbb\xbf" + text.encode())
    found = load(path)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        assert found == list(csv.DictReader(stream))
    cells = ('line 0\nline, "two"\r\nthree', "007", "12:30", "12345678901234567890", "", "é", "true", "NULL")
    assert tuple(found[0].values()) == cells


def test_csv_cells_may_be_long_and_the_process_keeps_its_limit(tmp_path: Path):
    limit = csv.field_size_limit()
    assert load(write(tmp_path / "rows.csv", "prompt\n" + "a" * 200_000)) == [{"prompt": "a" * 200_000}]
    assert csv.field_size_limit() == limit


def test_dataset_and_list_give_the_same_rows():
    assert rows_of(datasets.Dataset.from_list(ROWS), where="data") == rows_of(iter(ROWS), where="data") == ROWS


def test_max_rows_keeps_the_first(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", JSONL)
    assert load(path, max_rows=1) == ROWS[:1]
    assert load(path, max_rows=9) == ROWS


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", JSONL)
    assert load(Path("~/rows.jsonl")) == ROWS


def test_file_of_an_installed_package_is_read():
    rows = load_rows(SourceSpec(path="package:dar/prompts/reviews_train.jsonl", max_rows=3))
    assert len(rows) == 3
    assert all("prompt" in row for row in rows)


# --- what cannot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "rows.jsonl.gz"])
def test_missing_file_is_refused(tmp_path: Path, name: str):
    assert refusal(tmp_path / name) == f"the data file {tmp_path / name} does not exist"


ZIPPED = gzip.compress(JSONL.encode() * 50)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        *(("rows.jsonl", text, " has no rows") for text in ("", "\n \n")),
        ("rows.json", "[]", " has no rows"),
        *(("rows.csv", text, " has no rows") for text in ("", "prompt\n")),
        ("rows.jsonl.gz", b'{"prompt": "not compressed"}', " cannot be read: .*gzip.*"),
        ("rows.parquet", b"PAR1 but no more", " cannot be read: .*arquet.*"),
        # Cut; then a block of a type that does not exist.
        ("rows.jsonl.gz", ZIPPED[:-12], " cannot be read: .*"),
        ("rows.jsonl.gz", ZIPPED[:10] + b"\x07" + ZIPPED[11:], " cannot be read: .*"),
        ("rows.json", '{"prompt": 1}', ": expected a list of rows or JSON Lines, found one dict with the keys prompt"),
        ("rows.jsonl", '{"prompt": "a"}\n["b"]\n', ": row 1 is a list, expected a mapping of columns to values, as .*"),
        ("rows.txt", JSONL, r": the file type is not known; use one of \.jsonl, \.json, \.parquet, \.csv"),
        ("rows.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n',
         r""": line 3 is not JSON that can be read \(Expecting ',' delimiter.*: \{"prompt": "b\""""),
    ],
)  # fmt: skip
def test_what_is_no_table_in_a_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, problem: str
):
    path = write(tmp_path / name, content)
    assert re.fullmatch(re.escape(str(path)) + problem, refusal(path))


def test_long_malformed_line_is_shown_in_part(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "' + "a" * 1000 + "\n")
    assert "line 1 is not JSON" in refusal(path)
    assert refusal(path).endswith("a…")
    assert len(refusal(path)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("rows.json", b"[1,", " is not JSON that can be read (Expecting value: line 1 column 4 (char 3)): [1,"),
        ("rows.jsonl", b"{}\n\xff\xfe{}", ": line 2 is not UTF-8 text (byte 0xff); save the file as UTF-8"),
        ("rows.csv", "a\ncafé\n".encode("cp1252"), ": line 2 is not UTF-8 text (byte 0xe9); save the file as UTF-8"),
        ("rows.csv", b"a,b\n1,2\n\n1\n", ": row 1 (it ends in line 4) has 1 cells, but there are 2 columns (a, b)"),
        ("rows.csv", b"a,b\n1,2,3\n", ": row 0 (it ends in line 2) has 3 cells, but there are 2 columns (a, b)"),
        ("rows.csv", b'a,b\n1,"2\n3,4\n', ": line 3 is not CSV: unexpected end of data (row 0)"),
        ("rows.csv", b"a,b,a\n1,2,3\n", ": two columns have the same name: a, b, a"),
        ("rows.jsonl", b"[" * 100_000, " is not JSON that can be read (maximum recursion depth exceeded"),
        ("rows.jsonl", b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", ": row 0: column 'a' is nested more than 100 deep"),
        ("rows.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ": line 1 is not JSON that can be read (Exceeds the limit"),
        ("rows.jsonl", b'{"a": "\\ud83d"}', ": row 0: column 'a' holds half of a surrogate pair"),
        ("rows.jsonl", b'{"a": [{"b": "\\ud83d"}]}', ": row 0: column 'a' holds half of a surrogate pair"),
    ],
)
def test_file_that_cannot_be_read_rightly_is_refused(tmp_path: Path, name: str, content: bytes, found: str):
    path = write(tmp_path / name, content)
    assert refusal(path).startswith(f"{path}{found}")


# --- rows given from Python ------------------------------------------------------------------------------------------


def test_arrays_are_read_as_lists_and_a_frame_as_rows_with_nulls():
    messages = [{"role": "user", "content": "hi"}]
    rows = rows_of([{"a": np.array([1.5, 2]), "b": np.int64(3), "c": np.array(messages, dtype=object)}], where="data")
    assert rows == [{"a": [1.5, 2.0], "b": 3, "c": messages}]
    assert type(rows[0]["b"]) is int
    frame = pandas.DataFrame({"prompt": ["a", None], "score": [1, 2], "c": [messages, None]})
    assert rows_of(frame, where="data") == [
        {"prompt": "a", "score": 1, "c": messages},
        {"prompt": None, "score": 2, "c": None},
    ]


def test_rows_are_copies():
    given = [{"a": [{"b": [1]}]}]
    rows_of(given, where="data")[0]["a"][0]["b"].append(2)
    assert given == [{"a": [{"b": [1]}]}]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}),
            "is a DatasetDict of test, and no table of rows",
        ),
        ({"prompt": ["a"]}, "is a dict of prompt, and no table of rows"),
        (Path("rows.jsonl"), "is a PosixPath; expected a list of rows"),
        (5, "is a int; expected a list of rows"),
        (["a"], "row 0 is a str, expected a mapping"),
        ([{"prompt": "a"}, {0: "a"}], "row 1 has a column 0; columns need names"),
        ([{"prompt": "a\ud83d"}], "row 0: column 'prompt' holds half of a surrogate pair"),
    ],
)
def test_what_is_no_table_is_refused(table: Any, problem: str):
    with pytest.raises(DataError, match=f"data:? {re.escape(problem)}"):
        rows_of(table, where="data")


def test_rows_that_contain_themselves_are_refused():
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(DataError, match="data: row 0: column 'a' is nested more than 100 deep"):
        rows_of([{"a": circle}], where="data")


@pytest.mark.parametrize(
    ("cell", "value"),
    [("", None), (" 7", 7), ("007", 7), ("0.5", 0.5), ("1e3", 1000.0), ("True", True), ("false", False)],
)
def test_a_cell_says_its_number_to_who_asks(cell: str, value: Any):
    assert typed(cell) == value
    assert type(typed(cell)) is type(value)


@pytest.mark.parametrize("value", ["1_000", "yes", "1,5", 3, None, 1.0])
def test_what_is_no_number_stays(value: Any):
    assert typed(value) is value


def test_data_set_that_cannot_be_had_is_refused_with_a_hint():
    with pytest.raises(DataError) as caught:
        load_rows(SourceSpec(path="no-such-organisation/no-such-set", split="test"))
    message = str(caught.value)
    assert message.startswith("the data set no-such-organisation/no-such-set (split test) cannot be loaded: ")
    assert re.search(r"A local file needs one of the endings \.jsonl, \.json, \.parquet, \.csv\.$", message)


def test_folder_is_not_said_to_be_missing(tmp_path: Path):
    assert "does not exist" not in refusal(tmp_path)
