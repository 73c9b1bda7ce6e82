"""Answers to mathematical questions, compared as mathematics: `1/2` is `\\frac{1}{2}` and `0.5`."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from typing import Any

from dar.errors import DataError
from dar.files.intake import is_number
from dar.verifiable.notation import in_one_notation

_CLAUSE = re.compile(r"answer\s?(?:is|[:=])[: ]*+(\S[^\n]*+)", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.!?;](?=\s|$)|,?\s(?:because|since)\b")
_MARKS = re.compile(r"(?:USD?|EUR|GBP|INR|Rs\.?)\s?(?=[$\d])|[$€£¥₹₩₽₿¢\"]|\\[()\[\]]")
"""Delimiters and currencies."""
_PERCENT = re.compile(r"\s?\\?%$|\s(?:percent|percentage|pct)$", re.IGNORECASE)
_UNIT = re.compile(
    r"(.*[\d)}])(?:\s?\^\{?\\circ ?\}?[CFK]?|(?:\s(?!(?:hundred|hal[fv]|thirds|squared|cubed|factorial))"
    r"(?:[A-Za-z]{2,}+|[mgslhLVWNJKCF](?![\w^]))|(?:mm|cm|km|mg|kg|ml|ft|lb|oz|mph|hr|min|sec)(?![A-Za-z]))"
    r"(?:\^?\{?[23]\}?)?(?:[ /-][A-Za-z]++(?:\^?\{?[23]\}?)?)*+)",
    re.DOTALL,
)
"""A value, and the degrees or words after it."""
_WORDS = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:a?(?:sin|cos|tan)h?|log|exp|max|min|mod|gcd|lcm|sqrt)(?![A-Za-z]))"
    r"(?:[A-Za-z]{3,}|(?<!\S)[A-Za-z]{2}(?!\S))|\d\s?:\s?\d|\d\s\d"
)
"""What makes an answer words, or a time, and no mathematics."""


def final_answer(solution: str) -> str:
    """The answer in a solution: what follows the last `####` on its line (GSM8K), or else the whole text."""
    marked = [part.partition("\n")[0].strip() for part in solution.split("####")[1:]]
    return next(filter(None, reversed(marked)), solution.strip())


def last_tagged(text: str) -> str:
    """What stands in the last `<answer>…</answer>`, or else the whole text."""
    end = max(text.rfind("</answer>"), 0)
    start = text.rfind("<answer>", 0, end)
    return text if start < 0 else text[start + len("<answer>") : end]


def gold_text(gold: Any) -> str:
    """A gold answer as text.

    Raises:
        DataError: it is neither text nor a finite number, or there is no answer in it.
    """
    said = [each for each in _readings(str(gold)) if re.search(r"[^\W_]|\\|[^\x00-\x7f]", each) and each != "nan"]
    if not (is_number(gold) or isinstance(gold, str)) or not said:
        raise DataError(f"no answer can be read from the gold answer {gold!r:.200}; it must be text or a finite number")
    return str(gold)


def is_correct(text: str, gold: Any) -> bool:
    """Whether a completion's final answer equals the gold answer.

    Both are read in the same way. The answer is what stands in the last `<answer>…</answer>`, after the last `####` or
    in the last `\\boxed{…}`; there, it is the whole text, or what follows "answer is", or the last line. Units,
    currencies and percent signs are taken off; `5` and `5 %` are equal, as the question's unit is not known. Answers
    written alike are equal, and so are those that math-verify finds equal. In a completion whose answer is a sentence,
    math-verify looks for an expression.

    There is no time limit in here, and a power such as `9^9^9^9` can take forever: the reward runs this in a sandbox.

    Args:
        text: the completion.
        gold: a number, LaTeX or words, or a GSM8K solution that ends in `#### number`.

    Raises:
        DataError: there is no answer in `gold`.
    """
    expected, found = _readings(gold_text(gold)), _readings(text)
    if (expected.keys() & found.keys()) - {""}:
        return True
    worth, others = (next(filter(None, map(_worth, filter(None, each.values()))), ()) for each in (expected, found))
    if worth and not others and not next(iter(found.values()), ""):
        others = _located(_marked(text))
    if len(worth) == len(others) == 2:  # of two percentages only the numbers count
        worth, others = worth[:1], others[:1]
    # In this order: math-verify takes the gold answer first, and is not symmetric.
    return any(itertools.starmap(_are_equal, itertools.product(worth, others)))


def _marked(text: str) -> str:
    text = final_answer(last_tagged(text))
    if "\\boxed" in text or "\\fbox" in text:
        from latex2sympy2_extended.math_normalization import extract_boxed_content  # noqa: PLC0415 - slow to import

        text = extract_boxed_content(text, mode="last")
    return in_one_notation(text)


@functools.lru_cache(maxsize=4096)
def _readings(text: str) -> dict[str, str]:
    """What may be the answer, by how it is written: LaTeX, maybe with `%` at its end, or nothing where it is words."""
    whole = _marked(text)
    clauses = _CLAUSE.findall(whole)
    clause = _CLAUSE_END.split(clauses[-1], maxsplit=1)[0] if clauses else whole.strip().rpartition("\n")[2]
    found: dict[str, str] = {}
    for each in (whole, clause):
        if len(each) > 1000:
            continue
        bare = _MARKS.sub("", each).strip(" \n\t'=•").rstrip(".,;:?")
        number = _PERCENT.sub("", bare)
        with_unit = _UNIT.fullmatch(number)
        latex = re.sub(r",?\s(?:and|or)\s", ", ", with_unit[1] if with_unit else number)
        words = " ".join(bare.split()).strip("!()[]. ").casefold()
        if _WORDS.search(latex):
            found[words] = ""
        else:
            is_letter = re.fullmatch(r"\W*[A-Za-z]?\W*", bare)
            found[words if is_letter else latex.replace(" ", "")] = latex + "%" * (number != bare)
        if choice := re.match(r"\(([A-Z])\)\s+\w", bare):
            found[choice[1].casefold()] = ""
    return found


def _worth(latex: str) -> tuple[Any, ...]:
    """The expression, or for a percentage both its number and its share; nothing where it cannot be parsed."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex  # noqa: PLC0415
    from math_verify.parser import parse_latex_cached  # noqa: PLC0415

    config = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    try:
        value: Any = parse_latex_cached(normalize_latex(latex.removesuffix("%"), config))
        return (value, value / 100) if latex.endswith("%") else (value,)
    except Exception:  # of whatever kind: what the parser cannot read is compared as text alone
        return ()


def _located(prose: str) -> tuple[Any, ...]:
    """The expression that math-verify finds in a sentence; a time is none."""
    found = _math_verify().parse(
        re.sub(r"(?<!\d)\d++(?:\s?:\s?\d++)++", "", prose), fallback_mode="no_fallback", parsing_timeout=None
    )
    number = _math_verify().grader.get_pct_val(found[0]) if found else None
    return tuple(found) if number is None else (number, number / 100)


def _are_equal(expected: Any, found: Any) -> bool:
    are_numbers = getattr(expected, "is_number", False) and getattr(found, "is_number", False)
    return _math_verify().verify(expected, found, timeout_seconds=None) and not (
        # It rounds decimals to six places, where 1e-8 is 0.
        are_numbers and abs(complex(expected) - complex(found)) > 1e-5 * abs(complex(expected))
    )


@functools.cache
def _math_verify() -> Any:
    import math_verify  # noqa: PLC0415 - sympy and a LaTeX grammar take seconds

    # It warns that its own time limits, which need the main thread's signals, are off.
    for part in ("parser", "grader", "utils"):
        logging.getLogger(f"math_verify.{part}").setLevel(logging.ERROR)
    return math_verify
