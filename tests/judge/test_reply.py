"""Replies out of bodies: which tokens are the answer's, and characters of several tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from support.scripted_judge import said

from dar.judge.reply import Reply, Token, answer_start, answer_tokens, read_reply
from dar.judge.scores import Scale, read_score
from dar.judge.verdicts import read_verdict


def answered(text: str | None, *tokens: str) -> tuple[Token, ...]:
    """The answer's tokens of a reply with these ones."""
    return answer_tokens(Reply(text or "", tuple(Token(token, ((token, -0.5),)) for token in tokens)))


@pytest.mark.parametrize(
    ("text", "tokens", "own"),
    [
        ("7", ["7"], ["7"]),
        ("7", ["I", " say", " 3", "</think>", "\n\n", "7"], ["7"]),
        ("7", ["<think>", "7", "</think>", "7", "<|im_end|>"], ["7", "<|im_end|>"]),
        ("7", ["3", " 7", "</s>", "\n", "<eos>"], ["7", "</s>", "\n", "<eos>"]),
        ("Score: 10\n", ["5", "</think>", "Score", ": ", "1", "0", "\n"], ["Score", ": ", "1", "0", "\n"]),
        ("\n\n7", [">", "\n\n", "7"], ["\n\n7"]),
        (" 7", ["3", "\n 7"], [" 7"]),
        ("7", ["", "7", ""], ["7", ""]),
        # The last tokens are not the text, or only a part of one is.
        ("7", ["3", " is", " it"], []),
        ("7", ["7", " or", " 8"], []),
        ("7", ["3", ">7"], []),
        ("7", [], []),
        ("", ["7", "</think>"], []),
        (None, ["so", " 7"], []),
        (" \n", ["7", " \n"], []),
    ],
)
def test_the_answers_tokens_are_the_last_ones_that_join_to_it(text: str | None, tokens: list[str], own: list[str]):
    assert [token.text for token in answered(text, *tokens)] == own


def test_a_token_keeps_its_candidates():
    assert answered("7", "so", " 7") == (Token("7", ((" 7", -0.5),)),)


@pytest.mark.parametrize(
    ("text", "start"),
    [("7", 0), ("<think>3</think>7", 16), ("3</think>4</think>7", 18), ("<think>3", 8), ("a</think> <think>3", 18)],
)
def test_thoughts_are_not_the_answer(text: str, start: int):
    assert answer_start(text) == start


def body(text: str, tokens: Sequence[tuple[str, Any]], **changes: Any) -> bytes:
    """A chat completion with (token, its bytes)."""
    found = json.loads(said(text).body)
    content = [{"token": token, "logprob": -0.5, "bytes": given, "top_logprobs": []} for token, given in tokens]
    found["choices"][0] |= {"logprobs": {"content": content}} | changes
    return json.dumps(found).encode()


def test_a_character_of_several_tokens_is_one():
    emoji = list("😀".encode())
    parts = [
        ("I", None),
        (" 7", [32, 55]),
        (" ", [32]),
        (r"\xf0\x9f", emoji[:2]),
        (r"\x98\x80", emoji[2:]),
        ("!", [33]),
    ]
    reply = read_reply(body("7 😀!", parts))
    assert [token.text for token in answer_tokens(reply)] == ["7", " ", "", "😀", "!"]


@pytest.mark.parametrize("given", [None, [], "7", [300], [None], [1.5], [-1], {}, [195, 182]])
def test_bytes_that_are_not_the_tokens_are_not_needed(given: Any):
    assert [token.text for token in answer_tokens(read_reply(body("7", [("7", given)])))] == ["7"]


def test_two_tokens_of_one_text_both_count():
    found = json.loads(said("7", [("7", {"7": -1.0, "8": -2.0})]).body)
    found["choices"][0]["logprobs"]["content"][0]["top_logprobs"] += [
        {"token": "7", "logprob": -3.0},
        {"token": "8", "logprob": -2.0},
    ]
    reply = read_reply(json.dumps(found).encode())
    # The second 7 is a token of its own; the second 8 says the same of the same.
    assert reply.tokens[0].candidates == (("7", -1.0), ("8", -2.0), ("7", -3.0))


def test_only_a_limit_cuts():
    assert [read_reply(said("7", finish_reason=reason).body).is_cut for reason in ("stop", "length")] == [False, True]
    assert not read_reply(body("7", [], finish_reason={"length": 1})).is_cut


HOSTILE = [
    " " * 100_000,
    "\n" * 100_000,
    "answer" + " " * 100_000 + "x",
    "answer is" + " " * 100_000,
    "the" + " " * 100_000,
    "answer " * 20_000,
    "A" + " " * 100_000 + "x",
    "A" + "\n" * 100_000,
    "1" + " " * 100_000,
    "1" * 100_000 + "a",
    "7/" + " " * 100_000,
    "7 out of" + " " * 100_000,
    "[[" + "1" * 100_000,
    "[[" + " " * 100_000,
    "[[1" + " " * 100_000,
    "[" * 100_000,
    "1." * 50_000,
    "1-" * 50_000,
    "<think>" * 20_000,
    "</think>" * 20_000,
    "7" + "<" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_reading_ends(text: str):
    """Each takes milliseconds; where a pattern tries again and again, it takes minutes."""
    tokens = (Token(text, ((text, 0.0),)), Token("7", (("7", 0.0),)), Token(text, ()))
    read_score(Reply(text, tokens), Scale(1, 10), min_mass=0.1)
    read_verdict(Reply(text, tokens))
    read_score(Reply("7", tokens), Scale(1, 10), min_mass=0.1)
