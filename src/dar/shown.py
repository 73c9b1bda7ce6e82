"""Text from outside on its way out, to a terminal, an error, a page or a card: it does nothing and tells no secret."""

from __future__ import annotations

import json
import os
import re

_BIDI = {
    0x061C: "ALM", 0x200E: "LRM", 0x200F: "RLM", 0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO",
    0x202E: "RLO", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
}  # fmt: skip
_VISIBLE = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | {code: f"[U+{code:04X}]" for code in range(0x80, 0xA0)}
    | {code: f"[{name}]" for code, name in _BIDI.items()}
    # Neither a terminal nor a browser can be given half of a surrogate pair.
    | {code: "\ufffd" for code in range(0xD800, 0xE000)}
)
_HOSTILE = re.compile("[" + "".join(re.escape(chr(code)) for code in _VISIBLE) + "]")
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$#@]|:(?=//|\w+:)|(?<=www)\.", re.IGNORECASE)
_secrets: set[str] = set()
_SECRET_VARIABLES = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
_SHORTEST_SECRET = 8
"""What is shorter is no secret but a placeholder, such as EMPTY, and may be a word of any text."""


def keep_secret(value: str) -> None:
    """From now on the value is never shown or written, unless it has fewer than 8 characters: `visible` and `redacted`
    put `***` in its place."""
    _secrets.update({value, json.dumps(value)[1:-1]})


def redacted(text: str) -> str:
    """The text without the secrets this process knows: those kept, and those that the environment has for servers."""
    known = _secrets | {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text


def visible(text: str) -> str:
    """The text with control characters and marks of direction as signs that can be seen and do nothing; `\\n` and `\\t`
    stay, secrets do not."""
    text = redacted(text)
    return text.translate(_VISIBLE) if _HOSTILE.search(text) else text


def markdown(text: str) -> str:
    """The text, made visible, as one line of Markdown that shows just that: no heading, link, table or HTML."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(visible(text).split()))


def fenced(text: str, language: str = "") -> str:
    """The text, made visible, as a block of code in Markdown that it cannot end."""
    fence = max(["``", *re.findall("`{3,}", text)], key=len) + "`"
    return f"{fence}{language}\n{visible(text).rstrip()}\n{fence}"


def one_line(text: str, limit: int = 300) -> str:
    """The text, made visible, on one line of at most `limit` characters."""
    text = redacted(text)  # before anything is cut, so that half a secret is not left
    # Only so much is looked at: a message about a text of megabytes must not take as long as reading it.
    joined = " ".join(visible(text[: 4 * limit]).split())
    return joined if len(joined) <= limit and len(text) <= 4 * limit else joined[:limit] + "…"


def words(error: BaseException) -> str:
    """What an error says of itself: one of foreign code need not say anything, and asking it may raise."""
    try:
        return str.strip(str(error)) or "no message"
    except BaseException:
        return "no message"


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of its message."""
    return f"{type(error).__name__}: {words(error).splitlines()[0]}"
