"""Train, validation and test parts by a hash, so that what begins alike is never on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from dar.config.data import SplitByHashSpec
from dar.data.messages import read_conversation
from dar.errors import DataError
from dar.files.tables import Row

Part = Literal["train", "validation", "test"]


def part_of(text: str) -> Part:
    """The part a text belongs to: SHA-256 of its UTF-8 bytes modulo 10 is 0–7 (train), 8 (validation) or 9 (test)."""
    bucket = int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def select_part(rows: Sequence[Row], spec: SplitByHashSpec, *, where: str) -> list[Row]:
    """The rows of one part, in order.

    Raises:
        DataError: a row has no usable value in the column, or the part is empty.
    """
    kept = [
        row for index, row in enumerate(rows) if part_of(_key(row, spec.column, f"{where}: row {index}")) == spec.part
    ]
    if not kept:
        raise DataError(f"{where}: none of the {len(rows)} rows is in the part {spec.part}; there are too few to split")
    return kept


def _key(row: Row, column: str, here: str) -> str:
    """What is hashed: the string, or the first thing the user says."""
    value: Any = row.get(column)
    if messages := read_conversation(value, f"{here}: '{column}'"):
        value = next((each["content"] for each in messages if each["role"] == "user"), messages[0]["content"])
    if not isinstance(value, str):
        raise DataError(
            f"{here}: split_by_hash needs a string or messages in column '{column}', found {value!r:.120}; "
            f"name another with split_by_hash.column (the row has "
            f"{', '.join(map(str, row)) or 'none'})"
        )
    return value
