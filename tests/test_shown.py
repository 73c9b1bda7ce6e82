"""Text from outside in a page of Markdown: it stands there as it is, and makes nothing of its own."""

from __future__ import annotations

import pytest

from dar.shown import fenced, markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("good_pairs", r"good\_pairs"),
        ("a\n# b\r\n---\u2028c", r"a \# b␍ --- c"),
        ("| a | `b` |", r"\| a \| \`b\` \|"),
        ("<b>&amp;</b>", r"\<b\>\&amp;\</b\>"),
        ("![x](y) [z]", r"!\[x\](y) \[z\]"),
        ("http://e.vil www.e.vil a@e.vil", r"http\://e.vil www\.e.vil a\@e.vil"),
        ("$x$ ~~y~~ **z** \\n :smile:", r"\$x\$ \~\~y\~\~ \*\*z\*\* \\n \:smile:"),
        ("\x1b[31m\u202e", r"␛\[31m\[RLO\]"),
    ],
)
def test_markdown_of_a_text_shows_the_text(text: str, shown: str):
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("a: 1\n", "```yaml\na: 1\n```"),
        ("a ``` b\n`````\n\x1b", "``````yaml\na ``` b\n`````\n␛\n``````"),
    ],
)
def test_a_block_of_code_ends_where_its_text_does(text: str, block: str):
    assert fenced(text, "yaml") == block
