"""A score out of a judge's answer: the expectation over what it might have said, or the number it said."""

from __future__ import annotations

import math
import re
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
    masses = score_masses(tokens, place, scale) if place is not None else {}
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


def score_masses(tokens: tuple[Token, ...], place: int, scale: Scale) -> dict[str, float]:
    """Probability of each score that was seen at a token.

    A score of several tokens ("1", "0") needs the next token's candidates, and these are known only after the token
    that the judge did say. "1" among the others is then 1 or the beginning of 10, and which one is unknown: it is left
    out, unless "10" is a candidate too, and so a token of its own.
    """
    names = scale.names()
    candidates: dict[str, float] = {}
    for text, logprob in tokens[place].candidates:
        name = text.strip()
        if name in names:
            candidates[name] = candidates.get(name, 0.0) + math.exp(logprob)
    said = tokens[place].text.strip()
    masses: dict[str, float] = {}
    for name, probability in candidates.items():
        longer = {other for other in names if other != name and other.startswith(name)}
        if not longer or longer & candidates.keys():
            masses[name] = masses.get(name, 0.0) + probability
        elif name == said:
            for score, share in _continued(name, tokens[place + 1 : place + 2], names).items():
                masses[score] = masses.get(score, 0.0) + probability * share
    return masses


def _continued(name: str, following: tuple[Token, ...], names: frozenset[str]) -> dict[str, float]:
    """What a score that others begin with turned out to be: {score: share of its probability}."""
    if not following:
        # The answer ends here, and so does the number.
        return {name: 1.0}
    shares: dict[str, float] = {}
    digits = 0.0
    for text, logprob in following[0].candidates:
        if text[:1].isdigit():
            digits += math.exp(logprob)
            # Ten tokens for "0" cannot be; but "0" and "0." can.
            number = re.match(r"\d+", text)
            score = name + number[0] if number else ""
            if score in names:
                shares[score] = shares.get(score, 0.0) + math.exp(logprob)
    return shares | {name: max(0.0, 1.0 - digits)}
