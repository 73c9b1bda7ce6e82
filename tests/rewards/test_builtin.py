"""The rewards that come with the library, on texts whose score is known."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dar.rewards import Failed, builtin
from dar.rewards.builtin import completion_text
from dar.rewards.function import Call, RewardValue


def values(function: builtin.RewardFunction, **arguments: list) -> list[RewardValue]:
    return Call("builtin", function, {"completions": [], **arguments}, where="step 1").result()


def test_sentiment_is_positive_for_praise_and_negative_for_blame():
    praise, blame, nothing = values(builtin.sentiment(), completions=["I love this!", "I hate this.", "The table."])
    # The published lexicon: love 3.2, hate −2.7, each "!" adds 0.292; compound = s / sqrt(s² + 15).
    assert praise == pytest.approx(3.492 / (3.492**2 + 15) ** 0.5, abs=1e-4)
    assert blame == pytest.approx(-2.7 / (2.7**2 + 15) ** 0.5, abs=1e-4)
    assert nothing == 0.0


def test_sentiment_reads_messages_too():
    messages = [{"role": "assistant", "content": "I love this!"}]
    assert values(builtin.sentiment(), completions=[messages]) == values(
        builtin.sentiment(), completions=["I love this!"]
    )


def test_length_is_best_at_the_target_and_counts_tokens():
    ids = [[], [1], [1, 2], [1, 2, 3, 4], [1] * 8]
    found = values(builtin.length(4), completions=[""] * 5, completion_ids=ids)
    assert found == [-1.0, -0.75, -0.5, 0.0, -1.0]


def test_regex_searches_anywhere_and_across_lines():
    found = values(
        builtin.regex("<b>.*</b>"), completions=["x <b>1\n2</b> y", "<b>", [{"role": "a", "content": "<b></b>"}]]
    )
    assert found == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("reward", [builtin.regex, builtin.pattern_count])
def test_a_pattern_that_backtracks_without_end_has_failed(monkeypatch: pytest.MonkeyPatch, reward: Any):
    monkeypatch.setattr(builtin, "_MAX_SECONDS", 0.05)
    pattern = r"(\w+\s?)*$"
    before = signal.getsignal(signal.SIGVTALRM)
    lost, found = reward(pattern)(completions=["word " * 40 + "!", "word"])
    assert lost == Failed(rf"the pattern {pattern} took longer than 0.05 s of processor time")
    assert found >= 1.0
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_pattern_is_searched_outside_of_the_main_thread_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(builtin.regex("a"), completions=["ba"]).result() == [1.0]


def test_missing_end_is_punished():
    found = values(builtin.missing_eos_penalty(2.0), completions=["", ""], finish_reasons=["eos", "length"])
    assert found == [0.0, -2.0]


def test_text_of_a_conversation_is_its_contents_joined():
    assert completion_text("plain") == "plain"
    assert completion_text([{"content": "one"}, {"content": "two"}]) == "one\ntwo"


def test_pattern_count_counts_places_and_overlaps_only_with_a_lookahead():
    # In "abab": "ab" at 0 and 2; the lookahead for "aba" or "bab" also sees the overlapping places 0 and 1.
    assert values(builtin.pattern_count("ab"), completions=["abab", "", "ba\nab"]) == [2.0, 0.0, 1.0]
    assert values(builtin.pattern_count("(?=aba|bab)"), completions=["abab"]) == [2.0]
    assert values(builtin.pattern_count("aba|bab"), completions=["abab"]) == [1.0]
