"""Text from outside on its way in: decoded by one rule, bounded, and refused with the file and what to do."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from numbers import Real
from pathlib import Path
from typing import Any

from dar.errors import DataError
from dar.shown import one_line

MAX_BYTES = 2 << 30
"""Most that is read of one text file, after decompression."""


def read_text(file: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The file's UTF-8 text without a byte-order mark; `.gz` is decompressed. Line ends stay as they are.

    Raises:
        DataError: it cannot be read, is larger than `max_bytes` after decompression, or is no UTF-8; the message has
            the line of the first byte that is none.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{file} cannot be read: {one_line(str(error))}") from error
    if len(data) > max_bytes:
        raise DataError(f"{file} holds more than {max_bytes:,} bytes of text; split it into smaller files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}: line {line} is not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8, for "
            "example with `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is none, is nested too deeply, or has a number with too many digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = " ".join(str(error).split())
        raise DataError(f"{where} is not JSON that can be read ({shown}): {one_line(text, 120)}") from error


def sha256_of(file: Path) -> str:
    """The digest of a file's bytes. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_text(value: Any) -> bool:
    """Whether the value is a string that can be written as UTF-8: one with half of a surrogate pair cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_number(value: Any) -> bool:
    """Whether it is a finite number, which a truth value is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
