"""What a sandbox's processes load to compare mathematical answers: slow imports happen here, not in a timed call."""

from __future__ import annotations

from dar.verifiable.maths import is_correct

# The grammar is built, and sympy's caches are filled, when something is first parsed.
is_correct(r"\boxed{\frac{1}{2}}", "0.5")


def score(completions: list[str], golds: list[object]) -> list[float]:
    """1.0 where the answer is the gold answer, 0.0 where not."""
    return [float(is_correct(text, gold)) for text, gold in zip(completions, golds, strict=True)]
