"""Rows become prompts once, before training; the stream hands them out in an order that follows from the step."""

from __future__ import annotations

import logging
import re
from datetime import date
from functools import partial
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dar.batch import Prompt
from dar.bounded import Bounded
from dar.config.data import DataSpec, SourceSpec
from dar.data.prompts import PromptSet, PromptStream, prepare_prompts
from dar.errors import ConfigError, DataError
from dar.policies.text import rendering

USER = [{"role": "user", "content": "say a"}]


def text_of(prompt: Prompt) -> str | list[str]:
    """What the model reads, special tokens included."""
    return make_tokenizer().decode(list(prompt.token_ids))


def prepare(
    rows: list[Any], tokenizer: Any = None, *, max_prompt_length: int | None = None, **settings: Any
) -> PromptSet:
    spec = DataSpec(train=SourceSpec(path="rows.jsonl"), **settings)
    read = partial(rendering.prompt_ids, tokenizer or make_tokenizer())
    return prepare_prompts(rows, read, spec, max_prompt_length=max_prompt_length, where="rows.jsonl")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_string_is_tokenised_as_it_is(tokenizer: PreTrainedTokenizerFast):
    (prompt,) = prepare([{"prompt": "say a"}], tokenizer).prompts
    assert prompt.content == "say a"
    assert text_of(prompt) == "say a"


def test_messages_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast):
    (prompt,) = prepare([{"prompt": USER}], tokenizer).prompts
    assert prompt.content == USER
    assert text_of(prompt) == "<|user|>say a<eos><|assistant|>"


def test_wrapped_string_becomes_a_user_message(tokenizer: PreTrainedTokenizerFast):
    assert prepare([{"prompt": "say a"}], tokenizer, wrap_as_user=True) == prepare([{"prompt": USER}], tokenizer)


def test_system_prompt_is_put_before_conversations_that_have_none(tokenizer: PreTrainedTokenizerFast):
    own = [{"role": "system", "content": "be rude"}, *USER]
    first, second = prepare([{"prompt": USER}, {"prompt": own}], tokenizer, system_prompt="be kind").prompts
    assert text_of(first) == "<|system|>be kind<eos><|user|>say a<eos><|assistant|>"
    assert second.content == own
    assert USER == [{"role": "user", "content": "say a"}]  # the caller's rows are not changed


def test_other_columns_go_to_the_rewards_and_rows_keep_their_index():
    rows = [{"question": "one", "answer": 1, "prompt": "not this"}, {"question": "two", "answer": 2, "prompt": ""}]
    prompts = prepare(rows, prompt_column="question").prompts
    assert [prompt.position for prompt in prompts] == [0, 1]
    assert [dict(prompt.columns) for prompt in prompts] == [
        {"answer": 1, "prompt": "not this"},
        {"answer": 2, "prompt": ""},
    ]


# --- bad rows --------------------------------------------------------------------------------------------------------

NO_PROMPT = "row 1: 'prompt' must be a non-empty string or a list of messages with 'role'"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "b", "id": 1}, "row 1 has no column 'prompt'; it has text, id. If .* data.prompt_column: text$"),
        ({}, "row 1 has no column 'prompt'; it has none"),
        *(({"prompt": content}, rf"{NO_PROMPT}.* found {re.escape(repr(content))}$") for content in (
            "", "  \n", None, 5, [], ["say a"], [{"role": "user"}], [{"content": "say a"}],
            {"role": "user", "content": "a"},
        )),
        *(({"prompt": [*USER, {"role": "user", "content": "a"} | change]},
           f"row 1: 'prompt': message 1.*{re.escape(problem)}") for change, problem in (
            ({"content": [{"type": "text", "text": "a"}]}, "'content' must be text (join the texts of its"),
            ({"content": 5}, "'content' must be text, found 5"),
            ({"content": None}, "'content' must be text, found None"),
            ({"role": 1}, "'role' must be text, found 1"),
            ({"role": None}, "'role' must be text, found None"),
            ({"at": date(2024, 1, 1)}, "holds more than text, numbers, lists and mappings"),
            ({"raw": b"a"}, "holds more than text, numbers, lists and mappings"),
        )),
    ],
)  # fmt: skip
def test_bad_row_is_refused_and_shown(row: dict[str, Any], problem: str):
    with pytest.raises(DataError, match=rf"^rows\.jsonl: {problem}"):
        prepare([{"prompt": "fine"}, row])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        # Without an end, the model is named.
        *((template, f"the chat template of some/model refuses this conversation: .*{why}") for template, why in (
            ("{% for i in range(999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 seconds"),
            ("{{ 'a' * 10**10 }}", "needs more than 256 MiB of memory"),
            ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "maximum recursion depth exceeded"),
            ("{{ 'a' * 2000000 }}", "writes 2,000,000 characters"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        )),
        ("{{ '' }}", "the prompt .* has no tokens"),
    ],
)  # fmt: skip
def test_template_that_writes_no_prompt_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str, problem: str
):
    # A busy machine may take its time over the others.
    monkeypatch.setattr(rendering, "Bounded", partial(Bounded, seconds=0.2 if "seconds" in problem else 60))
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    with pytest.raises(DataError, match=f"row 0: {problem}"):
        prepare([{"prompt": USER}], tokenizer)


def test_only_messages_take_a_chat_template_and_a_system_prompt():
    assert len(prepare([{"prompt": "say a"}], make_tokenizer(chat=False))) == 1
    with pytest.raises(ConfigError, match="prompts are messages, but the tokenizer has no chat template"):
        prepare([{"prompt": USER}], make_tokenizer(chat=False))
    with pytest.raises(ConfigError, match=r"data\.system_prompt is set, but row 0 of rows\.jsonl is a plain string"):
        prepare([{"prompt": "say a"}], system_prompt="be kind")


# --- long prompts ----------------------------------------------------------------------------------------------------

SIX_LONG = [{"prompt": "ab"}, *[{"prompt": "a" * 10}] * 6, {"prompt": "abc"}]


def test_long_prompts_are_refused_by_default_and_counted():
    with pytest.raises(DataError) as caught:
        prepare(SIX_LONG, max_prompt_length=3)
    message = str(caught.value)
    assert "rows.jsonl: 6 of 8 prompts are longer than 3 tokens (rows 1, 2, 3, 4, 5, …)" in message
    assert "data.long_prompts: drop" in message


def test_long_prompts_are_dropped_when_asked_for_and_counted(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        found = prepare(SIX_LONG, max_prompt_length=3, long_prompts="drop")
    assert [prompt.content for prompt in found.prompts] == ["ab", "abc"]
    assert [prompt.position for prompt in found.prompts] == [0, 7]
    assert found.num_dropped == 6
    assert "rows.jsonl: 6 of 8 prompts are too long and were left out" in caplog.text


def test_the_limit_itself_is_not_too_long():
    assert prepare([{"prompt": "abc"}], max_prompt_length=3).num_dropped == 0
    with pytest.raises(DataError, match=r"1 of 1 prompts are longer than 2 tokens \(rows 0\)"):
        prepare([{"prompt": "abc"}], max_prompt_length=2)
    with pytest.raises(DataError, match="no prompt is left, all 1 are longer than 2 tokens"):
        prepare([{"prompt": "abc"}], max_prompt_length=2, long_prompts="drop")


# --- the stream ------------------------------------------------------------------------------------------------------


def stream(num_prompts: int, *, prompts_per_step: int, seed: int = 0) -> PromptStream:
    prompts = tuple(Prompt(index, f"prompt {index}", (index,), {}) for index in range(num_prompts))
    return PromptStream(PromptSet(prompts), prompts_per_step=prompts_per_step, seed=seed)


def drawn(found: PromptStream, num_steps: int) -> list[int]:
    return [prompt.token_ids[0] for step in range(num_steps) for prompt in found.at(step)]


@settings(max_examples=50, deadline=None)
@given(num_prompts=st.integers(1, 12), prompts_per_step=st.integers(1, 15), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(num_prompts: int, prompts_per_step: int, seed: int):
    num_steps = 4 * num_prompts // prompts_per_step + 1
    order = drawn(stream(num_prompts, prompts_per_step=prompts_per_step, seed=seed), num_steps)
    epochs = [order[start : start + num_prompts] for start in range(0, len(order) - num_prompts + 1, num_prompts)]
    assert epochs
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)


@settings(max_examples=50, deadline=None)
@given(step=st.integers(0, 500), prompts_per_step=st.integers(1, 9))
def test_position_counts_draws_since_the_start(step: int, prompts_per_step: int):
    found = stream(5, prompts_per_step=prompts_per_step).at(step)
    assert [prompt.position for prompt in found] == list(range(step * prompts_per_step, (step + 1) * prompts_per_step))


def test_step_does_not_depend_on_the_steps_asked_for_before():
    one, other = stream(7, prompts_per_step=3), stream(7, prompts_per_step=3)
    forwards = [one.at(step) for step in range(10)]
    backwards = [other.at(step) for step in reversed(range(10))]
    assert forwards == backwards[::-1]


def test_order_does_not_depend_on_the_number_of_prompts_per_step():
    assert drawn(stream(7, prompts_per_step=2), 14) == drawn(stream(7, prompts_per_step=4), 7)


def test_epochs_and_seeds_have_orders_of_their_own():
    order = drawn(stream(50, prompts_per_step=50), 3)
    assert order[:50] != order[50:100] != order[100:]
    assert order[:50] != drawn(stream(50, prompts_per_step=50, seed=1), 1)


def test_epoch_counts_passes_over_the_data():
    assert stream(8, prompts_per_step=2).epoch(6) == 1.5
