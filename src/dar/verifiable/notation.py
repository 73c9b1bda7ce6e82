"""One way of writing for answers: `−3`, `1\\,000`, `2½` and `*73*` are `-3`, `1000`, `5/2` and `73`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_COMMANDS = {"π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne", "∪": "cup", "∩": "cap", "∈": "in"}
_CHARACTERS = str.maketrans("÷⁄∕×·⋅’~", "///***' ", "`") | str.maketrans(
    {"√": "sqrt", "°": r"^\circ "} | {sign: f"\\{name} " for sign, name in _COMMANDS.items()}
)
_SCALES = {"dozen": "12", "thousand": "10^(3)", "million": "10^(6)", "billion": "10^(9)", "trillion": "10^(12)"}


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-")


_Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
_CHARACTER_RULES: _Rules = [
    (r"[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{{{_compatible(found[0])}}}"),
    (r"[¼-¾⅐-⅞]", lambda found: f" {_compatible(found[0])}"),
    (r"√\s?([\w.]++)", r"\\sqrt{\1}"),
]
_RULES: _Rules = [
    # A dollar sign that is money, and not the beginning of a formula; markup.
    (r"\\\$|</?(?:b|i|u|em|strong|code)>", ""),
    (r"\\(?:mbox|(?:text|math)(?:bf|it|rm)?)\s?\{([^{}]*+)\}", r" \1 "),
    (r"(?<![\w*)])\*{1,3}+(?=\S)([^*\n]*+)(?<=\S)\*{1,3}+(?![\w*(])", r"\1"),
    (r"(?<![\w}])_{1,2}+(?=[^\s{])([^_\n]*+)(?<=\S)_{1,2}+(?!\w)", r"\1"),
    # Signs before a number.
    (r"(?<![\w)\]}])[‐‑–](?=[\d.])", "-"),
    (r"(?:^|(?<=[=:({,$])|(?<=[a-z][a-z] ))\s?\+(?=[\d.\\])", ""),
    # Powers, fractions, mixed numbers.
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
    (r"\\[dtc]?frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\d.,/^])(\d+)\s?\\[dtc]?frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.,/^])(\d+)\s(?:and\s)?(\d+)\s?/\s?(\d+)(?![\d/]|\.\d)", r"(\1+\2/\3)"),
    # Thousands.
    (r"(?<=\d)(?:,\\!|\{,\}|\\[,;:! ]|[~'_])(?=\d{3}(?!\d))", ","),
    (r"(?<![\d.,(\[{])[1-9]\d{0,2}(?:(?:,\d{3})++|(?: \d{3})++)(?!\d)", lambda found: re.sub("[., ]", "", found[0])),
    (r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3}){2,}+(?![\d.,])", lambda found: re.sub("[., ]", "", found[0])),
    # Powers of ten.
    (r"(?<=[\d.])\s?(?:\\times|\\cdot|x|\*)\s?10\s?\^\s?[({]?\+?(-?\d+)[)}]?", r"*10^(\1)"),
    (r"(?<![\w.])(\d++\.?\d*+|\.\d++)[eE]\+?(-?\d+)(?!\w)", r"\1*10^(\2)"),
    (rf"(?<=\d)\s({'|'.join(_SCALES)})\b", lambda found: f"*{_SCALES[found[1]]}"),
    (r"(?<![A-Za-z\\])(pi(?![A-Za-z])|(?:sin|cos|tan|ln|log|exp)(?=\())", r"\\\1 "),
]


def in_one_notation(text: str) -> str:
    """The text with its characters, emphasis, fractions, separators and powers of ten written in one way."""
    for pattern, replacement in _CHARACTER_RULES:
        text = re.sub(pattern, replacement, text)
    text = _compatible(text).translate(_CHARACTERS)
    text = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in text)
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text
