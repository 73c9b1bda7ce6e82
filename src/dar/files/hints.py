"""What was probably meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'eval/reward'?)`, or nothing where no known name is near.

    A name with another first letter must be nearer: `deepspeed` is not `seed`, nor `trpo` `grpo`.
    """
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.72)
    # Of equally near ones that which has the same letters: `gpro` is `grpo`, not `gspo`.
    for nearest in sorted(found, key=lambda each: sorted(each) != sorted(name)):
        if nearest[:1] == name[:1] or difflib.SequenceMatcher(None, nearest, name).ratio() > 0.85:
            return f" (did you mean '{nearest}'?)"
    return ""
