"""Reads a report as a program that knows HTML, and nothing of how it was made."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any


class ReadPage(HTMLParser):
    """scripts: (attributes, text) of each. tables: rows of cells' texts. text: all that is no script or style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append((dict(attrs), ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None
        if tag == "table":
            self.tables.append([])

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._inside is None:
            self.text += data
            if self.tables and self.tables[-1] and self.tables[-1][-1]:
                self.tables[-1][-1][-1] += data

    def table(self, first_head: str) -> list[list[str]]:
        """The table whose first head cell has this text, without its head; spaces are single."""
        (found,) = [rows for rows in self.tables if rows and rows[0][:1] and rows[0][0].strip() == first_head]
        return [[" ".join(cell.split()) for cell in row] for row in found[1:]]

    def block(self, id: str) -> str:
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == id]
        return found

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.block("report-data"))

    @property
    def prose(self) -> str:
        return " ".join(self.text.split())

    def chunk(self, id: str) -> dict[str, Any]:
        return json.loads(gzip.decompress(base64.b64decode(self.block(f"chunk-{id}"))))
