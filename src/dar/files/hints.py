"""What was probably meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'eval/reward'?)`, or nothing where no known name is near.

    A name with another first letter must be nearer: `deepspeed` is not `seed`, nor `trpo` `grpo`.
    """
    for nearest in difflib.get_close_matches(name, list(known), n=1, cutoff=0.72):
        if nearest[:1] == name[:1] or difflib.SequenceMatcher(None, nearest, name).ratio() > 0.85:
            return f" (did you mean '{nearest}'?)"
    return ""
