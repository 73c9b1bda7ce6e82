"""A verdict on two completions out of a judge's answers in both orders."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass
from typing import Literal

from dar.judge.reply import Reply, answer_start, answer_tokens, token_at

Choice = Literal["first", "second", "tie"]

# No part of a pattern is tried twice on the same characters: a judge's answer may be anything, of any length.
_BRACKETED = re.compile(r"\[\[\s*+(A|B|C|tie)\s*+\]\]", re.IGNORECASE)
# "A" is also an article: the letter must be all that the answer says before it pauses.
_LETTER = re.compile(
    r"[\s\"'*(\[]*+(?:(?:the\s++)?+(?:answer|verdict|winner|better|completion|summary|response|assistant)"
    r"\s*+(?:is\s*+)?+(?::\s*+)?+)*+(A|B|C|tie)(?:[^\S\n]|[\"'*)\]])*+(?:$|[.,:;!\n])",
    re.IGNORECASE,
)
_MEANING: dict[str, Choice] = {"A": "first", "B": "second", "C": "tie", "TIE": "tie"}


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two completions in one order.

    choice: which of the two as they were shown.
    first_share: P(A) / (P(A) + P(B)) at the token that holds the verdict; None where no log-probabilities were seen.
    text: what the judge said.
    """

    choice: Choice
    first_share: float | None
    text: str


@dataclass(frozen=True)
class Preference:
    """A judge's preference between completions a and b, asked in both orders.

    forward: the verdict with a shown first.
    backward: the verdict with b shown first.
    """

    forward: Verdict
    backward: Verdict

    @property
    def winner(self) -> Literal["a", "b", "tie"]:
        """The completion that was chosen in both orders; a tie where the two verdicts differ."""
        decided: dict[tuple[Choice, Choice], Literal["a", "b"]] = {("first", "second"): "a", ("second", "first"): "b"}
        return decided.get((self.forward.choice, self.backward.choice), "tie")

    @property
    def agrees(self) -> bool:
        """Whether both orders say the same of a and b; where not, the judge went by the place and not by the text."""
        swapped = {"first": "second", "second": "first", "tie": "tie"}
        return self.backward.choice == swapped[self.forward.choice]

    @property
    def score(self) -> float:
        """1 where a wins, 0 where b does, ½ for a tie."""
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[self.winner]

    @property
    def share(self) -> float | None:
        """The probability of a against b, mean of both orders; None where no log-probabilities were seen."""
        first, second = self.forward.first_share, self.backward.first_share
        return None if first is None or second is None else (first + 1.0 - second) / 2.0


def read_verdict(reply: Reply) -> Verdict | None:
    """The verdict in a reply: `A`, `B`, `C` or `tie`, alone or as `[[A]]`; None where there is none or two."""
    start = answer_start(reply.text)
    letters = list(_BRACKETED.finditer(reply.text, start)) or [_LETTER.match(reply.text, start)]
    found = {letter[1].upper(): letter.start(1) for letter in reversed(letters) if letter}
    meanings: set[Choice] = {_MEANING[mark] for mark in found}
    if len(meanings) != 1:
        return None
    return Verdict(meanings.pop(), _first_share(reply, min(found.values())), reply.text)


def _first_share(reply: Reply, place: int) -> float | None:
    tokens = answer_tokens(reply)
    at = token_at(tokens, place)
    if at is None:
        return None
    mass = {"A": 0.0, "B": 0.0}
    for text, logprob in tokens[at].candidates:
        if (name := text.strip("[]()*\"'" + string.whitespace).upper()) in mass:
            mass[name] += math.exp(logprob)
    both = mass["A"] + mass["B"]
    return mass["A"] / both if both > 0 else None
