"""A score out of a judge's answer: the expectation over what it might have said, or the number it said."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dar.judge.reply import Reply, Token, answer_start, answer_tokens, token_at

# No part of a pattern is tried twice on the same characters: a judge's answer may be anything, of any length.
_NUMBER = re.compile(r"(?<![\w.])-?\d++(?:\.\d++)?(?!\w)")
_OUT_OF = re.compile(r"(?<!\s)\s*+(?:/|out of)\s*+\d++(?:\.0++)?\b|\b\d++\s*+(?:-|–|to)\s*+\d++\b", re.IGNORECASE)
_BRACKETED = re.compile(r"\[\[\s*+(-?\d++(?:\.\d++)?)\s*+\]\]")


@dataclass(frozen=True)
class Scale:
    """Whole scores from `low` to `high`, both included."""

    low: int
    high: int

    def names(self) -> frozenset[str]:
        """The scores as they are written."""
        return frozenset(map(str, range(self.low, self.high + 1)))


@dataclass(frozen=True)
class Score:
    """A judge's score.

    value: on the scale; the expectation where log-probabilities were seen, else the number in the text.
    mass: probability of all scores that were seen, in [0, 1]; None where the value is the number in the text.
    text: what the judge said.
    """

    value: float
    mass: float | None
    text: str


def read_score(reply: Reply, scale: Scale, *, min_mass: float) -> Score | None:
    """The score in a reply; None where there is none.

        E[s] = Σ_s s · p(s) / Σ_s p(s)

    over the scores s among the candidates of the token in which the stated number begins, or of the answer's first
    token where it states none. Where these scores have less than `min_mass` together, or the stated number is a
    fraction, the number itself is taken.

    Args:
        reply: the judge's.
        scale: which numbers are scores; one outside is none.
        min_mass: least probability that must have been seen, in [0, 1].

    Liu et al. 2023, arXiv:2303.16634 (G-Eval), section 2, with log-probabilities in place of repeated samples.
    """
    stated = stated_number(reply.text)
    if stated is not None and not scale.low <= stated.value <= scale.high:
        return None
    tokens = answer_tokens(reply) if stated is None or stated.value.is_integer() else ()
    place = token_at(tokens, answer_start(reply.text) if stated is None else stated.start)
    masses = score_masses(tokens[place:], scale.names()) if place is not None else {}
    # A "1" at which the answer was cut off may be 10, unless 10 is a token.
    longer = _longer(reply.text[stated.start :], scale.names()) if reply.is_cut and stated is not None else set()
    if longer and (place is None or not longer & {text.strip() for text, _ in tokens[place].candidates}):
        return None
    mass = math.fsum(masses.values())
    if mass > 0 and mass >= min_mass:
        expectation = math.fsum(int(score) * p for score, p in masses.items()) / mass
        return Score(expectation, min(mass, 1.0), reply.text)
    return None if stated is None else Score(stated.value, None, reply.text)


@dataclass(frozen=True)
class _Stated:
    value: float
    start: int


def stated_number(text: str) -> _Stated | None:
    """The one number that a text states, and where; None where it states none, or several different ones.

    `[[7]]` wins over every other number; `/10`, `out of 10` and `1 to 10` are the scale and not a score; what stands
    before `</think>` is not the answer. Of several equal numbers the first counts.
    """
    offset = answer_start(text)
    answer = text[offset:]
    bracketed = [(float(found[1]), found.start(1)) for found in _BRACKETED.finditer(answer)]
    # Blanked and not cut, so that places stay where they are.
    bare = _OUT_OF.sub(lambda found: " " * len(found[0]), answer)
    numbers = bracketed or [(float(found[0]), found.start()) for found in _NUMBER.finditer(bare)]
    if len({value for value, _ in numbers}) != 1:
        return None
    return _Stated(numbers[0][0], offset + numbers[0][1])


def score_masses(tokens: Sequence[Token], names: frozenset[str], begun: str = "") -> dict[str, float]:
    """Probability of each score that was seen at the first of these tokens, behind the digits with which it has begun.

    A score of several tokens ("1", "0") needs the next token's candidates, and these are known only after the token
    that the judge did say. "1" among the others is then 1 or the beginning of 10, and which one is unknown: it is left
    out, unless "10" is a candidate too, and so a token of its own. Where the answer ends, so does the number.
    """
    candidates: dict[str, float] = {}
    digits = 0.0
    for text, logprob in tokens[0].candidates if tokens else ():
        # Ten tokens for "0" cannot be; but "0" and "0." can.
        number = re.match(r"\d*", text) if begun else None
        digits += math.exp(logprob) if number and number[0] else 0.0
        name = begun + (number[0] if number else text.strip())
        if name in names and name != begun:
            candidates[name] = candidates.get(name, 0.0) + math.exp(logprob)
    masses = {begun: max(0.0, 1.0 - digits)} if begun else {}
    for name, probability in candidates.items():
        longer = _longer(name, names)
        if not longer or longer & candidates.keys():
            masses[name] = probability
        elif name == begun + tokens[0].text.strip():
            further = score_masses(tokens[1:], names, begun=name)
            masses |= {score: probability * share for score, share in further.items()}
    return masses


def _longer(name: str, names: frozenset[str]) -> set[str]:
    return {other for other in names if other != name and other.startswith(name)}
