"""Every IFEval instruction type, followed and not, strict and loose."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dar.errors import DataError
from dar.verifiable.ifeval import check_instructions
from dar.verifiable.instructions import CHECKS, detect_language

PROSE = "The weather is fine today and we will walk along the river."

# (id, arguments, followed by, not followed by): the texts are as close to the border as they can be.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["river", "a+b"]},
     ["The RIVER and a+b"], ["The river and aab", "a+b", "rive r a+b"]),
    # As in the original, inside of words too.
    ("keywords:frequency", {"keyword": " war ", "frequency": 2, "relation": "at least"},
     ["War and war", "warm wars"], ["war and peace"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["War"], ["War and war"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "sea"]}, ["rocks and seals"], ["Rock!", "by the sea"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "at least"}, ["Eel"], ["e"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, ["a!b!"], ["a!b"]),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 2, "let_relation": "less than"}, ["T"], ["tT"]),
    ("language:response_language", {"language": "de"},
     ["Heute ist das Wetter schön und wir gehen am Fluss spazieren.", "123"], [PROSE]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
     ["One. Two! Three?", "Mr. Smith came. He left. (He did.)"], ["One. Two!", "Mr. Smith came. He left."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"},
     ["Only one, e.g. this"], ["One. Two."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b***"], ["a\n\nb", "a***"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a *** b"], ["a *** *** b", "a***b***c"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"},
     ["one two three", "it's two"], ["one, two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Summary"},
     ["a\n\n'Summary' of it", "a\n\nSUMMARY. x\n\n"],
     ["summary\n\nb", "a\n\nb\n\nsummary", "a\n\nsummaries", "a\n\nsummary: x", "a"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name], [street 5]"], ["[name]", "[na\nme] [x]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP.S. y", "p. s. y"], ["PS: y", "P.P.S y"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S. y", "p. p. s y"], ["P.S. y"]),
    ("detectable_content:postscript", {"postscript_marker": "NB(1)"}, ["x nb(1) y"], ["nb1"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n* b", "x\n  - a\n\n* b"], ["* a", "* a\n- b\n- c", "** a\n* b"]),
    ("detectable_format:constrained_response", {},
     ["Well. My answer is maybe.", "My answer is yes."], ["My answer is yes", "my answer is no."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* and *b c*", "**a** and *b*"], ["*a* and b", "*a* and * *", "*a\nb* *c*", "**once**"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1", "Section 1 Section 2", "SECTION A SECTION B"]),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```', " 3 "], ["{a: 1}", "Sure: {}"]),
    ("detectable_format:title", {}, ["<<poem>>\nx"], ["<poem>", "<< >>", "<<po\nem>>"]),
    ("combination:two_responses", {},
     ["a\n******\nb", "******a******b******"], ["a******a", "a", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "},
     [" say hi. Hi!", "Say hi."], ["Hi! Say hi.", "Say hi"]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ['x "any questions?"'], ["Any questions? Yes"]),
    ("startend:quotation", {}, [' "x" ', '""'], ['"x', "'x'", '"']),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     ["I SEE it", "DON'T", "an X-RAY and a U.S. flag"], ["I see it", "Don't"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"},
     ["nothing"], ["a NASA rocket"]),
    ("change_case:english_capital", {}, [PROSE.upper()], [PROSE, "DAS WETTER IST HEUTE SCHÖN UND WARM"]),
    ("change_case:english_lowercase", {}, [PROSE.lower()], [PROSE, "das wetter ist heute schön und warm"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "followed", "broken"), CASES, ids=[case[0] for case in CASES])
def test_instruction(name: str, arguments: dict[str, Any], followed: list[str], broken: list[str]) -> None:
    assert [check_instructions(text, [name], [arguments]) for text in followed] == [[True]] * len(followed)
    assert [check_instructions(text, [name], [arguments]) for text in broken] == [[False]] * len(broken)


def test_every_type_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("Sure, here:\nno commas", False, True),  # without the first line
        ("no commas\nDone, bye", False, True),  # without the last
        ("Sure,\nno commas\nbye,", False, True),  # without both
        ("a,\nb,\nc,", False, False),
        ("", False, False),
        (" \n ", False, False),
    ],
)
def test_loose_forgives_an_introduction_and_a_farewell(text: str, strict: bool, loose: bool) -> None:
    assert check_instructions(text, ["punctuation:no_comma"], [{}]) == [strict]
    assert check_instructions(text, ["punctuation:no_comma"], [{}], loose=True) == [loose]


def test_loose_forgives_asterisks() -> None:
    end = ["startend:end_checker"], [{"end_phrase": "the end"}]
    assert check_instructions("This is **the end**", *end) == [False]
    assert check_instructions("This is **the end**", *end, loose=True) == [True]


def test_absent_arguments_may_be_none() -> None:
    # As the data set on the Hub has them: every row with every key.
    union = {"num_words": 2, "relation": "at least", "keywords": None, "language": None}
    ids = ["length_constraints:number_words", "startend:quotation"]
    assert check_instructions("two words", ids, [union, None]) == [True, False]


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (["punctuation:no_commas"], [{}], "unknown IFEval instruction 'punctuation:no_commas' (did you mean 'punct"),
        (["punctuation:no_comma"], [], "1 IFEval instructions came with 0 sets of arguments"),
        (["keywords:existence"], [{}], "'keywords:existence' takes keywords; the data gives none"),
        (["punctuation:no_comma"], [{"n": 1}], "'punctuation:no_comma' takes no arguments; the data gives n"),
        (
            ["length_constraints:number_words"],
            [{"num_words": 1, "relation": "exactly"}],
            "relation of the IFEval instruction 'length_constraints:number_words' must be 'at least' or 'less than'",
        ),
        (
            ["length_constraints:number_words"],
            [{"num_words": 2.5, "relation": "at least"}],
            "num_words of the IFEval instruction 'length_constraints:number_words' must be a whole number, found 2.5",
        ),
        (["keywords:existence"], [{"keywords": "sea"}], "must be a list of texts, found 'sea'"),
        (["startend:end_checker"], [{"end_phrase": 3}], "must be text, found 3"),
        (["punctuation:no_comma"], ["no"], "must be a mapping of names to values, found 'no'"),
        ("punctuation:no_comma", [{}], "instruction_id_list is not JSON that can be read"),
        (["punctuation:no_comma"], "{}", "kwargs must be a list, found '{}'"),
    ],
)
def test_instruction_that_cannot_be_checked_is_an_error(ids: Any, arguments: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        check_instructions("text", ids, arguments)


def test_arguments_may_be_json_text_and_floats_that_are_whole() -> None:
    # As CSV and Parquet files have them.
    ids = '["length_constraints:number_words", "punctuation:no_comma"]'
    given = [{"num_words": 2.0, "relation": "at least", "keywords": None}, {}]
    for arguments in (given, json.dumps(given), [json.dumps(each) for each in given]):
        assert check_instructions("two words", ids, arguments) == [True, True]
        assert check_instructions("one,", ids, arguments) == [False, False]
    assert check_instructions("a", ["punctuation:no_comma"], None) == [True]


def test_short_texts_get_the_same_language_every_time() -> None:
    # Unseeded, langdetect calls this one French, Spanish, German or Afrikaans.
    assert len({detect_language("un buen die") for _ in range(30)}) == 1


def test_published_data_can_be_checked() -> None:
    folder = os.environ.get("DAR_TEST_DATA")
    if folder is None or not (Path(folder) / "ifeval" / "input_data.jsonl").is_file():
        pytest.skip("DAR_TEST_DATA names no folder with ifeval/input_data.jsonl")
    rows = [json.loads(line) for line in (Path(folder) / "ifeval" / "input_data.jsonl").read_text().splitlines()]
    found = set()
    for row in rows:
        ids = row["instruction_id_list"]
        followed = check_instructions(PROSE, ids, row["kwargs"])
        found |= {name for name, is_followed in zip(ids, followed, strict=True) if is_followed}
    assert len(rows) == 541
    # One sentence of 12 words, no comma: exactly these can be followed by chance.
    assert found >= {"punctuation:no_comma", "length_constraints:number_sentences"}
    assert "startend:quotation" not in found
