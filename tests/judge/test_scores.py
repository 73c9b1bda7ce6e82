"""Scores out of answers: expectations by hand, scores of two tokens, and texts that state none."""

from __future__ import annotations

import math

import pytest

from dar.judge.reply import REPLIES, Reply, Token
from dar.judge.scores import Scale, Score, read_score, stated_number

TEN = Scale(1, 10)


def token(text: str, **candidates: float) -> Token:
    """A token with the probabilities of its candidates; `_` before a digit makes it a name."""
    pairs = {name.lstrip("_").replace("SPACE", " "): math.log(p) for name, p in candidates.items()}
    return Token(text, tuple(pairs.items()))


def read(text: str, *tokens: Token, min_mass: float = 0.1, scale: Scale = TEN) -> Score | None:
    return read_score(Reply(text, tokens), scale, min_mass=min_mass)


def value_of(score: Score | None) -> tuple[float, float | None]:
    assert score is not None
    return score.value, score.mass


def test_expectation_over_the_score_tokens_renormalised():
    # Seen: 0.5 + 0.3 = 0.8; E = (7 · 0.5 + 8 · 0.3) / 0.8 = 5.9 / 0.8 = 7.375.
    value, mass = value_of(read("7", token("7", _7=0.5, _8=0.3, The=0.2)))
    assert value == pytest.approx(7.375)
    assert mass == pytest.approx(0.8)


def test_a_token_with_a_space_is_the_same_score():
    value, mass = value_of(read(" 7", token(" 7", SPACE7=0.5, _7=0.25, _9=0.25)))
    assert value == pytest.approx(7 * 0.75 + 9 * 0.25)
    assert mass == pytest.approx(1.0)


def test_the_token_that_holds_the_number_counts_and_not_the_first():
    value, _ = value_of(
        read("Score: 4", token("Score", Score=0.9, _9=0.1), token(": ", **{": ": 1.0}), token("4", _4=1.0))
    )
    assert value == pytest.approx(4)


def test_ten_of_two_tokens():
    # "1" with 0.6, then "0" with 0.75: P(10) = 0.45 and P(1) = 0.15. E = (10 · 0.45 + 1 · 0.15 + 9 · 0.4) / 1 = 8.25.
    first, second = token("1", _1=0.6, _9=0.4), token("0", _0=0.75, end=0.25)
    value, mass = value_of(read("10", first, second))
    assert value == pytest.approx(8.25)
    assert mass == pytest.approx(1.0)


def test_one_that_could_have_become_ten_is_left_out():
    # The judge said 9, so nobody knows what would have followed "1": 0.3 of the mass is not seen.
    value, mass = value_of(read("9", token("9", _9=0.6, _8=0.1, _1=0.3)))
    assert value == pytest.approx((9 * 0.6 + 8 * 0.1) / 0.7)
    assert mass == pytest.approx(0.7)


def test_one_is_one_where_ten_is_a_token_of_its_own():
    value, mass = value_of(read("9", token("9", _9=0.5, _10=0.25, _1=0.25)))
    assert value == pytest.approx(9 * 0.5 + 10 * 0.25 + 1 * 0.25)
    assert mass == pytest.approx(1.0)


def test_a_one_that_ends_the_answer_is_one():
    value, mass = value_of(read("1", token("1", _1=0.8, _2=0.2)))
    assert value == pytest.approx(1.2)
    assert mass == pytest.approx(1.0)


def test_a_hundred_of_three_tokens():
    # "1" with 0.8, "0" with 0.9, "0" with 0.5: P(100) = 0.36, P(10) = 0.36; "1" and "5": P(15) = 0.8 · 0.1.
    # What would have followed the 2 of 0.2 is unknown, and "1" is not 1, as a digit always follows.
    tokens = token("1", _1=0.8, _2=0.2), token("0", _0=0.9, _5=0.1), token("0", _0=0.5, end=0.5)
    value, mass = value_of(read("100", *tokens, scale=Scale(0, 100)))
    assert mass == pytest.approx(0.36 + 0.36 + 0.08)
    assert value == pytest.approx((100 * 0.36 + 10 * 0.36 + 15 * 0.08) / 0.8)


def cut(text: str, *tokens: Token) -> Score | None:
    return read_score(Reply(text, tokens, is_cut=True), TEN, min_mass=0.1)


def test_a_number_at_which_the_answer_was_cut_off_may_go_on():
    assert cut("1") is None
    assert cut("Score: 1") is None
    assert cut("1", token("1", _1=0.6, _9=0.4)) is None
    assert cut("1.") == Score(1.0, None, "1.")
    assert cut("7") == Score(7.0, None, "7"), "no score begins with it"
    # Where 10 is a token, 1 is one.
    value, _ = value_of(cut("1", token("1", _1=0.5, _10=0.5)))
    assert value == pytest.approx(5.5)


def test_reasoning_among_the_tokens_is_not_the_answer():
    thoughts = token("3", _3=0.9, _4=0.1), token(" or", **{" or": 1.0}), token(" 7", SPACE7=1.0)
    value, mass = value_of(read("7", *thoughts, token("</think>"), token("7", _7=0.5, _8=0.3), token("<|im_end|>")))
    assert value == pytest.approx(7.375)
    assert mass == pytest.approx(0.8)
    assert read("7", *thoughts, token("</think>")) == Score(7.0, None, "7"), "the text alone"
    assert read("", *thoughts) is None


def test_the_first_token_of_an_answer_without_a_number_is_the_one_behind_its_thoughts():
    thoughts = token("3", _3=1.0), token("</think>")
    value, _ = value_of(read("3</think>The", *thoughts, token("The", The=0.6, _5=0.4)))
    assert value == pytest.approx(5)
    assert read("<think>3", token("<think>"), token("3", _3=1.0)) is None


def test_digits_that_make_no_score_take_their_mass_along():
    # "1" then "5" with 0.5 would be 15, no score: P(1) = 0.8 · 0.5, and the other 0.4 are not seen.
    value, mass = value_of(
        read("1.", token("1", _1=0.8, _2=0.2), Token(".", ((".", math.log(0.5)), ("5", math.log(0.5)))))
    )
    assert mass == pytest.approx(0.6)
    assert value == pytest.approx((1 * 0.4 + 2 * 0.2) / 0.6)


def test_without_a_number_the_first_token_is_what_might_have_been_said():
    value, mass = value_of(read("The", token("The", The=0.6, _3=0.3, _5=0.1)))
    assert value == pytest.approx((3 * 0.3 + 5 * 0.1) / 0.4)
    assert mass == pytest.approx(0.4)


def test_too_little_mass_falls_back_to_the_stated_number():
    tokens = token("7", _7=0.05, The=0.95)
    assert read("7", tokens, min_mass=0.1) == Score(7.0, None, "7")
    assert read("The", token("The", The=0.95, _7=0.05), min_mass=0.1) is None


def test_a_fraction_is_taken_as_it_is_stated():
    assert read("7.5", token("7", _7=1.0), token(".5")) == Score(7.5, None, "7.5")


def test_tokens_that_are_not_the_text_are_not_trusted():
    assert read("7", Token("", ())) == Score(7.0, None, "7")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        (" 7.\n", 7),
        ("7/10", 7),
        ("8 out of 10", 8),
        ("Score: 6", 6),
        ("On a scale of 1 to 10, I give it a 6.", 6),
        ("1-10 scale: 4", 4),
        ("[[9]]", 9),
        ("It has 3 errors. Rating: [[2]]", 2),
        ("<think>9? no, 3</think>\n5", 5),
        ("4, I mean 4", 4),
        ("7.5", 7.5),
    ],
)
def test_the_number_a_text_states(text: str, value: float):
    score = read(text)
    assert score == Score(value, None, text)


@pytest.mark.parametrize(
    "text", ["", "good", "3 or 4", "0", "11", "-3", "v2", "[[3]] no, [[4]]", "between 1 and 10", "1 to 10"]
)
def test_texts_that_state_no_score(text: str):
    assert read(text) is None


def test_a_number_out_of_range_is_no_score_whatever_the_candidates_say():
    assert read("75", token("7", _7=1.0), token("5", _5=1.0)) is None


def test_the_place_of_a_number_is_where_it_stands_in_the_whole_text():
    found = stated_number("<think>3</think>Score: 8/10")
    assert found is not None
    assert (found.value, found.start) == (8.0, len("<think>3</think>Score: "))


def test_other_scales():
    value, _ = value_of(read("0", token("0", _0=0.5, _1=0.5), scale=Scale(0, 1)))
    assert value == pytest.approx(0.5)


def test_replies_survive_the_cache():
    reply = Reply('7 "ü"', (token("7", _7=0.5, _8=0.5), Token("x", ())), 3, 4)
    assert REPLIES.validate_json(REPLIES.dump_json(reply)) == reply
