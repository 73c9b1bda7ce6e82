"""Pixels as a PNG, with nothing but zlib."""

from __future__ import annotations

import struct
import zlib


def encode_png(pixels: bytes, *, width: int, channels: int) -> bytes:
    """A PNG of 8 bits a channel, from rows of `width` pixels from the top: grey (1 channel) or RGB (3)."""
    stride = width * channels
    lines = [b"\0" + pixels[start : start + stride] for start in range(0, len(pixels), stride)]
    header = struct.pack(">IIBBBBB", width, len(lines), 8, channels - 1, 0, 0, 0)  # color type 0 or 2
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
