"""What the completions browser is given: recorded completions, packed small, as many as fit the page.

Each file becomes a chunk: JSON, compressed with gzip and written in base64, which the page unpacks when it is chosen.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar.report.kinds import CompletionFile, Training
from dar.report.plots import thinned
from dar.report.text import count, cut
from dar.shown import visible

MAX_PAGE_BYTES = 8_000_000
"""Of all chunks together, so that with plotly.js (4.8 MB) and the plots a page stays under 15 MB."""
MAX_ROWS = 1024
"""Completions of one chunk."""
MAX_TOKENS = 2048
"""Tokens of one completion that are shown one by one."""
MAX_IMAGE_BYTES = 1_000_000
"""Of the images of one chunk."""

_PLAIN = ("position", "reward", "advantage", "weight", "kl_ref")


@dataclass(frozen=True)
class Chunk:
    """One recorded file in the page. rows: shown, of `total` recorded."""

    id: str
    run: str
    label: str
    rows: int
    total: int
    data: str
    has_images: bool = False


@dataclass(frozen=True)
class Browser:
    """The chunks in the order of the page, and sentences about what did not fit."""

    chunks: list[Chunk]
    notes: list[str]


def browser_of(runs: Sequence[Training], *, max_bytes: int = MAX_PAGE_BYTES) -> Browser:
    """Packs the completions of some runs; of several, the held-out ones of the last evaluation first.

    Where they do not all fit, steps spread evenly over the run are taken, the first and the last before others.

    Args:
        runs: one or more.
        max_bytes: of all chunks together.
    """
    jobs = list(_by_importance(runs))
    taken: dict[int, Chunk] = {}
    used = 0
    for index, run, file in jobs:
        chunk = pack(f"{index}", run.name, file)
        if used + len(chunk.data) > max_bytes:
            break
        taken[index] = chunk
        used += len(chunk.data)
    chunks = [taken[index] for index in sorted(taken)]
    notes = []
    if len(taken) < len(jobs):
        notes.append(
            f"The completions of {count(len(taken))} of {count(len(jobs))} recorded steps and evaluations are in this "
            "page, spread over the run; the rest would make it too large. All are in the run's folder."
        )
    if cut_rows := [chunk for chunk in chunks if chunk.rows < chunk.total]:
        notes.append(
            f"Of {count(len(cut_rows))} of them with more than {count(MAX_ROWS)} completions"
            f"{' or large images' if cut_rows[0].has_images else ''}, a sample of the prompts is in this page."
        )
    return Browser(chunks, notes)


def pack(id: str, run: str, file: CompletionFile) -> Chunk:
    """One file as a chunk."""
    table = file.read()
    rows = table.to_pylist()
    has_images = "image" in table.column_names
    limit = MAX_IMAGE_BYTES // max(len(row["image"]) for row in rows) if has_images and rows else MAX_ROWS
    kept = _sample_of_groups(rows, max(1, min(limit, MAX_ROWS)))
    raw = json.dumps(columns_of(kept), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    data = base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode()
    return Chunk(id, run, file.label, len(kept), len(rows), data, has_images)


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows of some rows, column by column; every text made visible and cut.

    prompts: the different texts; prompt: each row's index into them. omitted: characters left out of a completion.
    tokens: indices into `vocabulary`; ratio: log π_t − log π₀ of each token, 1000 being half of `full` nats, the
    strongest color: 2, but of images, whose steps' log-probabilities have no common scale, the largest there is.
    """
    names = rows[0].keys() if rows else ()
    has_images = "image" in names
    plain = (*_PLAIN, "gold" if has_images else "length")  # images are all as many steps long
    prompts: dict[str, int] = {}
    texts = [cut(row["completion"]) for row in rows]
    found: dict[str, Any] = {
        "prompt": [prompts.setdefault(row["prompt"], len(prompts)) for row in rows],
        "text": [text for text, _ in texts],
        "omitted": [omitted for _, omitted in texts],
        "parts": {
            visible(name.removeprefix("reward/").removeprefix("extra/")): [_rounded(row[name]) for row in rows]
            for name in names
            if (name == "gold" and not has_images) or name.startswith(("reward/", "gold/", "extra/"))
        },
        **{name: [_rounded(row[name]) for row in rows] for name in plain if name in names},
    }
    if has_images:
        found["image"] = [base64.b64encode(row["image"]).decode() for row in rows]
    elif "finish_reason" in names:
        found["ended"] = [row["finish_reason"] != "length" for row in rows]
    found["prompts"] = [_whole(*cut(prompt)) for prompt in prompts]
    if {"tokens", "logprobs", "ref_logprobs"} <= set(names):
        vocabulary: dict[str, int] = {}
        found["tokens"] = [
            [vocabulary.setdefault(token, len(vocabulary)) for token in row["tokens"][:MAX_TOKENS]] for row in rows
        ]
        ratios = [[new - old for new, old in zip(row["logprobs"][:MAX_TOKENS], row["ref_logprobs"])] for row in rows]
        full = max((abs(ratio) for row in ratios for ratio in row), default=0.0) or 2.0 if has_images else 2.0
        found |= {"full": full, "ratio": [[round(2000 * ratio / full) for ratio in row] for row in ratios]}
        found["vocabulary"] = [visible(token[:200]) for token in vocabulary]
    return found


def _by_importance(runs: Sequence[Training]) -> Iterator[tuple[int, Training, CompletionFile]]:
    """(place in the page, run, file): each run's last and first before what lies between, in ever finer steps."""
    flat = [(run, file) for run in runs for file in run.completions if len(runs) == 1 or file.is_heldout]
    kinds: dict[tuple[Path, bool], list[int]] = {}
    for place, (run, file) in enumerate(flat):
        kinds.setdefault((run.path, file.is_heldout), []).append(place)
    ranks = {places[index]: rank for places in kinds.values() for rank, index in enumerate(_spread(len(places)))}
    for place in sorted(ranks, key=lambda place: (ranks[place], place)):
        yield place, *flat[place]


def _spread(length: int) -> list[int]:
    """0…length − 1, ordered so that any beginning of it is spread evenly: last, first, middle, quarters, …"""
    order = [length - 1, 0] if length > 1 else list(range(length))
    parts = 2
    while len(order) < length:
        order += [index for index in (round(k * (length - 1) / parts) for k in range(1, parts)) if index not in order]
        parts *= 2
    return order


def _sample_of_groups(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Whole groups, evenly spread, of at most `limit` rows (the first rows of a group that is larger itself)."""
    if len(rows) <= limit:
        return rows
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["position"], row["prompt"]), []).append(row)
    whole = list(groups.values())
    largest = max(map(len, whole))
    keep = thinned(len(whole), max(2, limit // largest)) if largest <= limit // 2 else [0]
    return [row for index in keep for row in whole[index]][:limit]


def _rounded(value: float | str | None) -> float | str | None:
    """Five digits are more than anybody reads; None for NaN, which says that a reward does not apply."""
    if isinstance(value, str):
        return _whole(*cut(value, 1000))
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _whole(text: str, omitted: int) -> str:
    return f"{text}\n… {count(omitted)} characters more" if omitted else text
