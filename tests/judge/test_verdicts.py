"""Verdicts out of answers, and preferences out of two orders."""

from __future__ import annotations

import math

import pytest

from dar.judge.reply import Reply, Token
from dar.judge.verdicts import Preference, Verdict, read_verdict


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", "first"),
        (" B.\n", "second"),
        ("b", "second"),
        ("tie", "tie"),
        ("C", "tie"),
        ("[[A]]", "first"),
        ("A good case can be made for the other. [[B]]", "second"),
        ("Answer: B", "second"),
        ("The winner is A.", "first"),
        ("**A**", "first"),
        ("<think>A? B?</think>B", "second"),
    ],
)
def test_verdicts(text: str, choice: str):
    verdict = read_verdict(Reply(text))
    assert verdict is not None
    assert verdict.choice == choice


@pytest.mark.parametrize("text", ["", "A good answer is B", "both", "[[A]] or [[B]]", "AB", "Neither."])
def test_texts_without_a_verdict(text: str):
    assert read_verdict(Reply(text)) is None


def test_share_of_the_first():
    # P(A) = 0.3 + 0.1 ("A" and " A"), P(B) = 0.1: 0.4 / 0.5.
    candidates = (("A", math.log(0.3)), (" A", math.log(0.1)), ("B", math.log(0.1)), ("tie", math.log(0.5)))
    verdict = read_verdict(Reply("tie", (Token("tie", candidates),)))
    assert verdict is not None
    assert verdict.first_share == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "before", "letter"),
    [
        ("A", ["B", " then", "</think>"], "A"),
        ("A", [], "A"),
        ("B? </think>\n**A**", ["B", "?", " </think>", "\n", "**"], "A"),
        ("Answer: A", ["Answer", ":"], " A"),
        ("It is [[A]]", ["It is", " "], "[[A"),
    ],
)
def test_the_share_is_that_of_the_verdicts_own_token(text: str, before: list[str], letter: str):
    # Every token before it would say P(B) = 1.
    tokens = [Token(token, (("B", 0.0),)) for token in before]
    own = Token(letter, tuple((letter.replace("A", name), math.log(p)) for name, p in (("A", 0.3), ("B", 0.1))))
    after = text.rpartition("A")[2]
    verdict = read_verdict(Reply(text, (*tokens, own, Token(after, (("B", 0.0),)))))
    assert verdict is not None
    assert verdict.first_share == pytest.approx(0.75)


def test_without_the_answers_own_tokens_there_is_no_share():
    verdict = read_verdict(Reply("A", (Token("B", (("B", 0.0),)),)))
    assert verdict == Verdict("first", None, "A")


def verdict(choice: str, share: float | None = None) -> Verdict:
    return Verdict(choice, share, "")  # pyright: ignore[reportArgumentType] - one of the three


@pytest.mark.parametrize(
    ("forward", "backward", "winner", "agrees"),
    [
        ("first", "second", "a", True),
        ("second", "first", "b", True),
        ("first", "first", "tie", False),
        ("second", "second", "tie", False),
        ("tie", "tie", "tie", True),
        ("first", "tie", "tie", False),
        ("tie", "first", "tie", False),
    ],
)
def test_only_what_both_orders_say_counts(forward: str, backward: str, winner: str, agrees: bool):
    preference = Preference(verdict(forward), verdict(backward))
    assert preference.winner == winner
    assert preference.agrees == agrees
    assert preference.score == {"a": 1.0, "b": 0.0, "tie": 0.5}[winner]


def test_the_share_of_a_is_the_mean_of_both_orders():
    # Shown first, a has 0.9; shown second, 1 − 0.4 = 0.6.
    assert Preference(verdict("first", 0.9), verdict("second", 0.4)).share == pytest.approx(0.75)
    assert Preference(verdict("first", 0.9), verdict("second", None)).share is None
