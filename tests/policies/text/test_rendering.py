"""Texts as tokens: what a tokenizer adds by itself is there once, in front of a prompt and never behind it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer
from tokenizers.processors import TemplateProcessing

from dar.policies.text.rendering import chat_text, prompt_ids, render, text_ids

EOS, BOS, HI = "<eos>", "<|system|>", "hi"
USER = [{"role": "user", "content": HI}]


def adding(single: str) -> Any:
    """A tokenizer that makes `$A` this; the tiny one's role markers stand for BOS and the like."""
    tokenizer = make_tokenizer()
    names = [EOS, BOS, "<|user|>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("single", "prompt", "read", "whole"),
    [
        ("$A", "hi", "hi", "hi!"),
        (f"$A {EOS}", "hi", "hi", f"hi!{EOS}"),
        (f"{BOS} $A", "hi", f"{BOS}hi", f"{BOS}hi!"),
        (f"{BOS} $A {EOS}", "hi", f"{BOS}hi", f"{BOS}hi!{EOS}"),
        (f"{BOS} $A {EOS}", f"{BOS}hi", f"{BOS}hi", f"{BOS}hi!{EOS}"),
        (f"{BOS} <|user|> $A", "hi", f"{BOS}<|user|>hi", f"{BOS}<|user|>hi!"),
        (f"{BOS} <|user|> $A", f"{BOS}<|user|>hi", f"{BOS}<|user|>hi", f"{BOS}<|user|>hi!"),
        (f"$A {EOS}", f"hi{EOS}", f"hi{EOS}", f"hi{EOS}!{EOS}"),
        ("$A", f"{BOS}hi", f"{BOS}hi", f"{BOS}hi!"),
    ],
)
def test_strings_are_read_with_one_beginning_and_only_whole_ones_with_an_end(
    single: str, prompt: str, read: str, whole: str
):
    tokenizer = adding(single)
    assert tokenizer.decode(list(prompt_ids(tokenizer, prompt, here="row 0"))) == read
    assert tokenizer.decode(list(render(tokenizer, prompt, "!"))) == whole
    assert tokenizer.decode(list(text_ids(tokenizer, prompt))) == prompt


def test_an_end_that_is_there_is_not_put_there_again():
    assert render(adding(f"$A {EOS}"), "hi", f"!{EOS}") == render(adding("$A"), "hi", f"!{EOS}")


def test_a_conversation_gets_nothing_but_its_template():
    tokenizer = adding(f"{BOS} $A {EOS}")
    assert tokenizer.decode(list(prompt_ids(tokenizer, USER, here="row 0"))) == "<|user|>hi<eos><|assistant|>"
    assert tokenizer.decode(list(render(tokenizer, USER, "yo"))) == "<|user|>hi<eos><|assistant|>yo<eos>"
    assert chat_text(tokenizer, USER, here="row 0") == "<|user|>hi<eos>"
