"""Where English sentences and words begin and end, by rules: no model and nothing to download."""

from __future__ import annotations

import re

_ABBREVIATIONS = re.compile(
    r"(mr|mrs|ms|dr|prof|rev|gen|col|capt|lt|sgt|gov|sen|rep|st|vs|approx|dept|est|fig|e\.g|i\.e"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)"
)
"""Words whose full stop does not end a sentence."""

_MAY_END = re.compile(r"(a\.m|p\.m|u\.s|u\.k|u\.n|etc|inc|ltd|co|corp|jr|sr|d\.c|ph\.d|m\.d|b\.a|m\.a)")
"""Words whose full stop ends a sentence when a capital letter follows."""

_ENDING = re.compile(r"""(?<![.?!])([.?!]++)['"”’)\]*_]*+(?=\s++["'“‘(\[*_]*+(.?))""", re.DOTALL)
"""Final stops and what closes after them; then the first character of what follows."""
_LAST_WORD = re.compile(r"\S+\Z")

_CAPITAL_WORD = re.compile(r"\w[\w.’'&/-]*")
_CLITIC = re.compile(r"(n['’]t|['’](?:s|m|d|ll|re|ve))$", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text: a stop, a question or exclamation mark and white space end one.

    Abbreviations, single initials and an ellipsis before a small letter do not. A line break alone does not either.

    The IFEval reference uses NLTK's trained Punkt model, which has to be downloaded; these rules agree with it on most
    texts, not on all.
    """
    sentences, start = [], 0
    padded = text + "\n"
    for match in _ENDING.finditer(padded):
        word = _LAST_WORD.search(padded[max(start, match.start() - 40) : match.start()])
        if _ends_sentence(word[0] if word else "", match[1], match[2]):
            sentences.append(padded[start : match.end()].strip())
            start = match.end()
    rest = padded[start:].strip()
    return [sentence for sentence in [*sentences, rest] if sentence]


def capital_words(text: str) -> list[str]:
    """The words without a small letter, as the Treebank convention counts them: `DON'T` is two (`DO`, `N'T`)."""
    found = []
    for match in _CAPITAL_WORD.finditer(text):
        word = match.group().rstrip("'’")
        clitic = _CLITIC.search(word)
        parts = [word[: clitic.start()], clitic.group()] if clitic else [word]
        found += [part for part in parts if part.isupper()]
    return found


def _ends_sentence(word: str, stops: str, following: str) -> bool:
    if stops[-1] in "?!" or "?" in stops or "!" in stops:
        return True
    if len(stops) > 1:
        return not following.islower()
    bare = word.lstrip("\"'“‘([*_").lower()
    if _MAY_END.fullmatch(bare):
        return following.isupper()
    is_initial = len(bare) == 1 and bare.isalpha() and word[-1:].isupper() and bare != "i"
    return not is_initial and _ABBREVIATIONS.fullmatch(bare) is None
