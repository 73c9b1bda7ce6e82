"""The 25 instruction types of IFEval, one function each: text and arguments in, followed or not out.

Zhou et al. 2023, arXiv:2311.07911. They decide as the authors' evaluation code does, but for what `ifeval` says in its
docstring.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dar.verifiable.sentences import capital_words, split_sentences

Check = Callable[..., bool]


def _compares(count: int, relation: str, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


# --- keywords --------------------------------------------------------------------------------------------------------


def _existence(text: str, *, keywords: Sequence[str]) -> bool:
    folded = text.lower()
    return all(keyword.lower() in folded for keyword in keywords)


def _frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compares(text.lower().count(keyword.strip().lower()), relation, frequency)


def _forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compares(text.lower().count(letter.lower()), let_relation, let_frequency)


# --- language, case, punctuation -------------------------------------------------------------------------------------


@functools.cache
def _load_langdetect() -> Any:
    import langdetect  # noqa: PLC0415 - reads its profiles when it is first used

    # Without a seed langdetect draws at random, and answers short texts now so, now so.
    langdetect.DetectorFactory.seed = 0
    return langdetect


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, always the same for the same text; None where it has no letters."""
    langdetect = _load_langdetect()
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def _response_language(text: str, *, language: str) -> bool:
    return detect_language(text) in (language, None)


def _english_capital(text: str) -> bool:
    return text.isupper() and _response_language(text, language="en")


def _english_lowercase(text: str) -> bool:
    return text.islower() and _response_language(text, language="en")


def _capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _compares(len(capital_words(text)), capital_relation, capital_frequency)


def _no_comma(text: str) -> bool:
    return "," not in text


# --- lengths ---------------------------------------------------------------------------------------------------------


def _number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _compares(len(split_sentences(text)), relation, num_sentences)


def _number_words(text: str, *, num_words: int, relation: str) -> bool:
    return _compares(len(re.findall(r"\w+", text)), relation, num_words)


def _number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Paragraphs between `***`; an empty one is allowed only before the first divider and after the last."""
    parts = [part.strip() for part in text.split("***")]
    inner = parts[1:-1] if len(parts) > 1 else parts
    return all(inner) and sum(map(bool, parts)) == num_paragraphs


def _nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs between blank lines; empty ones count for the position but not for the number."""
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    if not words:
        return False
    opening = re.split(r"""[.,?!'"]""", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return opening.lower() == first_word.lower()


# --- content and format ----------------------------------------------------------------------------------------------


def _number_placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Lines that begin with `-`, or with a single `*` and something after it."""
    return len(re.findall(r"^[^\S\n]*(?:-|\*[^*])", text, re.MULTILINE)) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def _number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """`*so*` and `**so**` on one line, with something between the asterisks."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", text)]
    double = [found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(found.strip()) for found in [*single, *double]) >= num_highlights


def _multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    inner = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        inner = inner.removeprefix(fence)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    spans = (line[line.find("<<") : line.rfind(">>") + 2] for line in text.split("\n") if "<<" in line)
    return any(len(span) > 4 and span.lstrip("<").rstrip(">").strip() for span in spans)


# --- combination, start and end --------------------------------------------------------------------------------------


def _two_responses(text: str) -> bool:
    """Two different answers between `******`; an empty part is allowed only at the outside."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
"""Every instruction type of the published data, by its id there."""
