"""Completions that come with the data: the tokens a policy could have sampled after the prompt, and nothing else."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import make_tokenizer
from tokenizers import models, normalizers

from dar.config.algorithm import LoggedKind
from dar.config.data import DataSpec, SourceSpec
from dar.data.logged import LoggedSet, prepare_logged
from dar.errors import ConfigError, DataError

EOS = 0  # of the tiny tokenizer


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def prepare(
    rows: Sequence[Any],
    kind: LoggedKind = "preferences",
    tokenizer: Any = None,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int = 50,
    eos_token_ids: tuple[int, ...] = (EOS,),
    **settings: Any,
) -> LoggedSet:
    return prepare_logged(
        rows,
        tokenizer or make_tokenizer(),
        DataSpec(train=SourceSpec(path="rows.jsonl"), **settings),
        kind=kind,
        eos_token_ids=eos_token_ids,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        where="rows.jsonl",
    )


def read(found: LoggedSet) -> list[tuple[str, list[str]]]:
    """What the model reads of every row: the prompt, and each completion, special tokens included."""
    tokenizer = make_tokenizer()

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    return [
        (decode(group.prompt.token_ids), [decode(each.token_ids) for each in group.completions])
        for group in found.groups
    ]


def problem(rows: Sequence[Any], kind: LoggedKind = "preferences", tokenizer: Any = None, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(rows, kind, tokenizer, **settings)
    return str(caught.value)


# --- what the rows hold ----------------------------------------------------------------------------------------------

APART = {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("go")]}
WHOLE = {"chosen": [user("hi"), assistant("hello")], "rejected": [user("hi"), assistant("go")]}
TEXTS = {"prompt": "hi", "chosen": "hello", "rejected": "go"}
SAME = [user("hi"), assistant("hello")]
AS_CHAT = ("<|user|>hi<eos><|assistant|>", ["hello<eos>", "go<eos>"])
AS_TEXT = ("hi", ["hello<eos>", "go<eos>"])


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        # Strings are read one after the other, messages through the chat template behind their prompt.
        ([{"prompt": "Human: hi\n\nAssistant:", "chosen": " hello", "rejected": " go"}], {},
         [("Human: hi\n\nAssistant:", [" hello<eos>", " go<eos>"])]),
        ([APART], {}, [AS_CHAT]),
        # A string after messages is the assistant's.
        ([TEXTS | {"prompt": [user("hi")]}], {}, [AS_CHAT]),
        ([TEXTS], {"wrap_as_user": True}, [AS_CHAT]),
        ([{"question": "hi", "chosen": "hello", "rejected": "go"}], {"prompt_column": "question"}, [AS_TEXT]),
        # Whole conversations, alone, beside their prompt and beside rows that have one; the same answer twice is two.
        ([WHOLE], {}, [AS_CHAT]),
        ([WHOLE | {"prompt": "hi"}], {"wrap_as_user": True}, [AS_CHAT]),
        ([WHOLE, TEXTS], {}, [AS_CHAT, AS_TEXT]),
        *(([row], {"system_prompt": "be kind"}, [("<|system|>be kind<eos>" + AS_CHAT[0], AS_CHAT[1])])
          for row in (WHOLE, APART)),
        ([{"chosen": SAME, "rejected": SAME}], {}, [(AS_CHAT[0], ["hello<eos>", "hello<eos>"])]),
    ],
)  # fmt: skip
def test_preferences_are_read(rows: list[dict[str, Any]], settings: dict[str, Any], expected: list[Any]):
    found = prepare(rows, **settings)
    assert read(found) == expected
    assert [each.reward for group in found.groups for each in group.completions] == [1.0, 0.0] * len(rows)


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "expected"),
    [
        ([user("hi")], [assistant(" hello ")], " hello ", " hello <eos>"),
        # EOS is not added twice, and what stands behind it is left out.
        ("hi", "hello<eos>", "hello<eos>", "hello<eos>"),
        ("hi", "one<eos>two", "one<eos>two", "one<eos>"),
        ([user("hi")], "one<eos>two", "one<eos>two", "one<eos>"),
    ],
)
def test_demonstrations_are_read(prompt: Any, completion: Any, text: str, expected: str):
    found = prepare([{"prompt": prompt, "completion": completion}], "demonstrations")
    assert read(found)[0][1] == [expected]
    assert [(each.text, each.reward) for each in found.groups[0].completions] == [(text, 1.0)]


def test_verdicts_are_rewards_of_one_and_zero():
    row = {"chosen": [user("hi"), assistant("hello")], "rejected": [user("hi"), assistant("go")]}
    found = prepare([{**row, "chosen_complies": False, "rejected_complies": True}], "verdicts")
    # As other preferences, they may come as two conversations.
    assert read(found) == [("<|user|>hi<eos><|assistant|>", ["hello<eos>", "go<eos>"])]
    assert [each.reward for each in found.groups[0].completions] == [0.0, 1.0]


def test_rewards_stay_with_their_completions():
    row = {"prompt": [user("hi")], "completions": ["hello", [assistant("go")], "oh"]}
    for rewards in ([0.5, -2, 0.25], np.array([0.5, -2, 0.25], dtype=np.float32)):
        found = prepare([{**row, "rewards": rewards}], "rewards")
        read_back = [(each.text, each.reward) for each in found.groups[0].completions]
        assert read_back == [("hello", 0.5), ("go", -2.0), ("oh", 0.25)]
        assert read(found)[0][1] == ["hello<eos>", "go<eos>", "oh<eos>"]


def test_quantiles_are_shares_of_the_references_rewards_that_are_no_better():
    # Of (1, 2, 2, 4): none is at most .5, three are at most 2, all at most 4. What is equal counts.
    row = {"prompt": "hi", "completions": ["a", "b", "c"], "rewards": [0.5, 2, 4.0], "ref_rewards": (2.0, 1, 4.0, 2.0)}
    (group,) = prepare([row], "quantiles").groups
    assert [completion.reward for completion in group.completions] == [0.0, 0.75, 1.0]


def test_dataset_rows_are_read_as_they_are():
    rows = [
        {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("go")], "id": index}
        for index in range(2)
    ]
    assert read(prepare(list(datasets.Dataset.from_list(rows)))) == read(prepare(rows))


def test_groups_are_in_the_order_of_the_data_without_the_prompts_left_out():
    rows = [{"prompt": "p" * length, "completion": f"after {length}"} for length in (2, 9, 1)]
    found = prepare(rows, "demonstrations", max_prompt_length=3, long_prompts="drop")
    assert read(found) == [("pp", ["after 2<eos>"]), ("p", ["after 1<eos>"])]
    assert tuple(group.prompt for group in found.groups) == found.prompts.prompts
    assert [prompt.position for prompt in found.prompts.prompts] == [0, 2]
    assert found.prompts.num_dropped == 1


# --- where a completion ends -----------------------------------------------------------------------------------------


def test_a_completion_ends_at_the_first_of_several_end_tokens():
    # A model that samples until <|user|> (2) or <eos> (0): what stands behind the first of them is never sampled.
    rows = [{"prompt": "a", "completion": "b<|user|>c"}, {"prompt": "a", "completion": "b"}]
    found = prepare(rows, "demonstrations", eos_token_ids=(0, 2))
    assert [group.completions[0].token_ids[1:] for group in found.groups] == [(2,), (0,)]


def test_newline_of_the_template_behind_the_turn_is_left_out():
    tokenizer = make_tokenizer()
    # As ChatML: every turn is followed by a newline, which a sampled completion, ending at EOS, never has.
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    found = prepare([{"prompt": [user("hi")], "completion": "hello"}], "demonstrations", tokenizer)
    assert read(found) == [("<|user|>hi<eos>\n<|assistant|>", ["hello<eos>"])]


def test_eos_is_added_where_the_template_has_none():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = prepare([{"prompt": [user("hi")], "completion": "hello"}], "demonstrations", tokenizer)
    assert read(found) == [("[user]hi[assistant]", ["hello<eos>"])]


def test_long_completion_is_cut_without_eos_and_counted(caplog: pytest.LogCaptureFixture):
    # Bytes are tokens: "1234" and EOS are 5, one too many; "123" and EOS are 4 and stay whole.
    rows = [{"prompt": "hi", "chosen": "1234", "rejected": "123"}, {"prompt": "hi", "chosen": "12", "rejected": "1"}]
    with caplog.at_level(logging.WARNING):
        found = prepare(rows, max_completion_length=4)
    assert [completions for _, completions in read(found)] == [["1234", "123<eos>"], ["12<eos>", "1<eos>"]]
    assert [each.finish_reason for each in found.groups[0].completions] == ["length", "eos"]
    assert caplog.messages == [
        "rows.jsonl: 1 of 4 completions are longer than 4 tokens and were cut there (sampling.max_completion_length)"
    ]


def test_nothing_is_said_where_nothing_is_cut(caplog: pytest.LogCaptureFixture):
    prepare([{"prompt": "hi", "completion": "123"}], "demonstrations", max_completion_length=4)
    assert caplog.messages == []


# --- whole conversations ---------------------------------------------------------------------------------------------


def test_common_beginning_of_two_conversations_is_the_prompt():
    begin = [user("hi"), assistant("yes?"), user("and?")]
    row = {"chosen": [*begin, assistant("well")], "rejected": [*begin, assistant("go")], "id": 7}
    found = prepare([row])
    assert read(found) == [
        ("<|user|>hi<eos><|assistant|>yes?<eos><|user|>and?<eos><|assistant|>", ["well<eos>", "go<eos>"])
    ]
    assert found.groups[0].prompt.content == begin
    assert [each.text for each in found.groups[0].completions] == ["well", "go"]
    assert found.groups[0].prompt.columns["id"] == 7


def test_conversations_that_part_too_early_are_counted():
    good = {"chosen": [user("hi"), assistant("hello")], "rejected": [user("hi"), assistant("go")]}
    no_beginning = {"chosen": [user("hi"), assistant("hello")], "rejected": [user("ho"), assistant("go")]}
    other_turn = {
        "chosen": [user("hi"), assistant("a"), user("so"), assistant("b")],
        "rejected": [user("hi"), assistant("c"), user("so"), assistant("d")],
    }
    no_question = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    longer = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("a"), user("so")]}
    message = problem([good, no_beginning, other_turn, good, longer, no_question])
    assert message.startswith(
        "rows.jsonl: in 4 of 6 rows (rows 1, 2, 4, 5) chosen and rejected are not the same conversation up to the last "
        "message of each"
    )
    assert message.endswith("Leave these rows out, or add the column 'prompt'.")
    assert "6 of 7 rows (rows 0, 1, 2, 3, 4, …)" in problem([*[no_beginning] * 6, good])


# --- bad rows --------------------------------------------------------------------------------------------------------

FINE = {"prompt": "hi", "completion": "fine"}
REWARDED = {"prompt": "hi", "completions": ["a", "b"], "rewards": [1.0, 2.0]}
JUDGED = {"prompt": "hi", "chosen": "a", "rejected": "b", "rejected_complies": False}


def after(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


REFUSED: list[tuple[LoggedKind, list[dict[str, Any]], str]] = [
    ("preferences", [{}], "row 0 has no column 'chosen'; preferences need prompt, chosen, rejected, and it has none"),
    *(("demonstrations", [FINE, after(*row)], "1 rows have an empty completion (rows 1)") for row in (
        ("hi", ""), ("hi", " \n"), ([user("hi")], ""), ([user("hi")], " \n"), ([user("hi")], [assistant("")]),
    )),
    ("preferences", [JUDGED, *[{"prompt": "hi", "chosen": "", "rejected": ""}] * 6],
     "6 rows have an empty completion (rows 1, 2, 3, 4, 5, …)"),
    *(("demonstrations", [after("hi", found)],
       f"row 0: a completion must be a string or a list of messages, found {found!r}")
      for found in (None, 5, [], ["hello"], assistant("hello"), [{"role": "assistant"}])),
    *(("demonstrations", [after([user("hi")], [{"role": "assistant", "content": content}])],
       f"row 0: a completion: message 0: 'content' must be text{hint}, found {content!r}")
      for content, hint in (
          (None, ""), ([{"type": "text", "text": "hello"}], " (join the texts of its parts into one string)"),
      )),
    *(("demonstrations", [after([user("hi")], turns)],
       "row 0: a completion must be one message, before which only the prompt's may stand once more; found messages of "
       + ", ".join(turn["role"] for turn in turns))
      for turns in (
          [assistant("a"), user("so"), assistant("b")],
          [user("ho"), assistant("a")],  # another prompt
          [user("hi"), user("hi"), assistant("a")],  # more than the prompt
      )),
    ("demonstrations", [after([user("hi")], [user("so")])],
     "row 0: a completion must end with a message of the assistant's, found user"),
    *(("rewards", [{**REWARDED, "rewards": [0.0, reward]}], f"row 0: the reward {reward!r} is no finite number")
      for reward in (math.nan, math.inf, -math.inf, "1.0", None, True, [1.0])),
    *(("rewards", [{**REWARDED, column: value}], f"row 0: '{column}' must be a list, found {value!r}")
      for column, value in (
          ("completions", "ab"), ("completions", None), ("completions", assistant("ab")), ("rewards", 1.0),
          ("rewards", "12"),
      )),
    *(("quantiles", [{**REWARDED, "ref_rewards": value}],
       "row 0: 'ref_rewards' must be a list of the rewards (finite numbers) of completions that the reference wrote "
       f"for the prompt, found {value!r}") for value in ([], [math.nan], ["1.0"], [True])),
    ("quantiles", [{**REWARDED, "ref_rewards": 1.0}], "row 0: 'ref_rewards' must be a list, found 1.0"),
    ("rewards", [{**REWARDED, "rewards": [1.0]}], "row 0 has 2 completions and 1 rewards"),
    ("rewards", [{**REWARDED, "completions": [], "rewards": []}], "row 0 has 0 completions and 0 rewards"),
    ("rewards", [{"prompt": "hi", "completions": ["a"] * count, "rewards": [1.0] * count} for count in (2, 3, 1)],
     "rows have 1 to 3 completions; every row needs equally many"),
    *(("verdicts", [{**JUDGED, "chosen_complies": verdict}],
       "row 0: 'chosen_complies' must be true (the completion complies with the new rules) or false, "
       f"found {verdict!r}") for verdict in (1, 1.0, "yes", "", None)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "message"), REFUSED)
def test_bad_rows_are_refused_and_shown(kind: LoggedKind, rows: list[dict[str, Any]], message: str):
    assert problem(rows, kind) == f"rows.jsonl: {message}"


@pytest.mark.parametrize("kind", ["demonstrations", "rewards"])
def test_missing_prompt_is_named(kind: LoggedKind):
    row = {"completion": "a", "completions": ["a"], "rewards": [1.0]}
    assert "row 0 has no column 'prompt'; it has completion" in problem([row], kind)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
         "row 0: a completion is messages, but the prompt is a plain string: set data.wrap_as_user: true"),
        *(({"chosen": chosen, "rejected": rejected},
           "plain text nobody can tell where the prompt ends. Give the prompt a column of its own")
          for chosen, rejected in (
              ("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: go"),
              ([user("hi"), assistant("hello")], "go"),
              ("hello", [user("hi"), assistant("go")]),
          )),
    ],
)  # fmt: skip
def test_texts_and_messages_that_do_not_fit_are_refused_with_what_to_do(row: dict[str, Any], message: str):
    assert message in problem([row])


@pytest.mark.parametrize(
    ("kind", "missing", "needed"),
    [
        ("demonstrations", "completion", "demonstrations need ask, completion,"),
        ("preferences", "chosen", "preferences need ask, chosen, rejected,"),
        ("preferences", "rejected", "preferences need ask, chosen, rejected,"),
        ("rewards", "completions", "rewards need ask, completions, rewards,"),
        ("rewards", "rewards", "rewards need ask, completions, rewards,"),
        ("quantiles", "ref_rewards", "quantiles need ask, completions, rewards, ref_rewards,"),
    ],
)
def test_missing_column_is_named_with_those_the_row_has(kind: LoggedKind, missing: str, needed: str):
    whole = {"ask": "hi", "completion": "a", "chosen": "a", "rejected": "b", "completions": ["a"], "rewards": [1.0]}
    whole["ref_rewards"] = [1.0]
    row = {name: value for name, value in whole.items() if name != missing}
    expected = f"rows.jsonl: row 1 has no column '{missing}'; {needed} and it has {', '.join(row)}"
    assert problem([whole, row], kind, prompt_column="ask") == expected


def test_template_that_changes_what_stands_before_the_completion_is_refused():
    tokenizer = make_tokenizer()
    # As templates of reasoning models: sampling begins behind <think>, which a finished turn no longer has.
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    message = problem([{"prompt": [user("hi")], "completion": "hello, you there"}], "demonstrations", tokenizer)
    assert message == (
        "rows.jsonl: row 0: the chat template writes the prompt differently when its completion follows (one that "
        "opens the model's thoughts by itself does), so nobody can tell where the completion begins. Give both as "
        "strings: the prompt as tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) "
        "writes it, and what the model is to write behind that"
    )


def joining_tokenizer() -> Any:
    """Two line breaks are one token, as in most vocabularies, and a turn's text begins behind one."""
    tokenizer = make_tokenizer()
    alphabet = {token: index for token, index in tokenizer.get_vocab().items()}
    model = models.BPE(vocab={**alphabet, "ĊĊ": len(alphabet)}, merges=[("Ċ", "Ċ")])
    tokenizer.backend_tokenizer.model = model  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}:\n{{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    return tokenizer


def test_prompt_that_ends_inside_a_token_of_the_whole_is_followed_by_the_completions_own_tokens():
    tokenizer = joining_tokenizer()
    (group,) = prepare([{"prompt": [user("hi")], "completion": "\nyes"}], "demonstrations", tokenizer).groups
    prompt, completion = group.prompt.token_ids, group.completions[0].token_ids
    # "assistant:⏎⏎yes" has the token ⏎⏎, which no policy can sample behind a prompt that ends with the token ⏎.
    assert tokenizer.convert_ids_to_tokens(prompt[-2:]) == [":", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(completion) == ["Ċ", "y", "e", "s", "<eos>"]
    assert tokenizer.decode([*prompt, *completion]) == "user:\nhi<eos>assistant:\n\nyes<eos>"


def test_thoughts_that_the_template_opens_can_be_trained_on_as_strings():
    tokenizer = make_tokenizer()
    rendered = "<|user|>hi<eos><|assistant|><think>"
    (group,) = prepare([{"prompt": rendered, "completion": "hm</think>yes"}], "demonstrations", tokenizer).groups
    assert tokenizer.decode(list(group.prompt.token_ids)) == rendered
    assert tokenizer.decode(list(group.completions[0].token_ids)) == "hm</think>yes<eos>"


def test_null_keys_of_messages_are_no_keys():
    tokenizer = make_tokenizer()
    padded = [
        [{**each, "name": None, "tool_calls": None} for each in part] for part in ([user("hi")], [assistant("a")])
    ]
    plain = prepare([{"prompt": [user("hi")], "completion": [assistant("a")]}], "demonstrations", tokenizer)
    (found,) = prepare([{"prompt": padded[0], "completion": [*padded[0], *padded[1]]}], "demonstrations").groups
    assert found.completions == plain.groups[0].completions
    assert found.prompt.content == [user("hi")]
    (shared,) = prepare([{"chosen": [*padded[0], assistant("a")], "rejected": [user("hi"), assistant("b")]}]).groups
    assert shared.prompt.content == [user("hi")]


@pytest.mark.parametrize("verdict", ["true", "True", True])
def test_verdicts_may_be_the_words_of_a_csv_file(verdict: Any):
    row = {"prompt": "hi", "chosen": "a", "rejected": "b", "chosen_complies": verdict, "rejected_complies": "FALSE"}
    (group,) = prepare([row], "verdicts").groups
    assert [each.reward for each in group.completions] == [1.0, 0.0]


def test_conversation_the_template_refuses_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no answers, please') }}{% endif %}<|user|>"
    )
    message = problem([{"prompt": [user("hi")], "completion": "hello"}], "demonstrations", tokenizer)
    assert message == ("rows.jsonl: row 0: the chat template refuses this conversation: no answers, please")


def test_completion_without_tokens_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")  # pyright: ignore[reportAttributeAccessIssue]
    expected = "rows.jsonl: row 0: the completion 'xx' has no tokens"
    assert problem([{"prompt": "hi", "completion": "xx"}], "demonstrations", tokenizer) == expected
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}"
    assert problem([{"prompt": [user("hi")], "completion": "xx"}], "demonstrations", tokenizer) == expected


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(ConfigError, match="prompts are messages, but the tokenizer has no chat template"):
        prepare([{"prompt": [user("hi")], "completion": "a"}], "demonstrations", make_tokenizer(chat=False))
