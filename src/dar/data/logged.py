"""Completions that come with the data: demonstrations, preference pairs, and reward-labelled completions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dar.batch import FinishReason, Message, Prompt, TokenGroups, pad_rows
from dar.config.algorithm import LoggedKind
from dar.config.data import DataSpec
from dar.data.messages import read_conversation
from dar.data.prompts import PromptSet, prepare_prompts, some_rows
from dar.errors import DataError
from dar.files.intake import is_number
from dar.files.tables import Row, typed
from dar.policies.text.rendering import chat_text, prompt_ids, text_ids

log = logging.getLogger(__name__)

COLUMNS: dict[LoggedKind, tuple[str, ...]] = {
    "demonstrations": ("completion",),
    "preferences": ("chosen", "rejected"),
    "verdicts": ("chosen", "rejected", "chosen_complies", "rejected_complies"),
    "rewards": ("completions", "rewards"),
    "quantiles": ("completions", "rewards", "ref_rewards"),
}


@dataclass(frozen=True)
class LoggedCompletion:
    """token_ids: EOS included, unless it was cut. text: for people. reward: 1 and 0 for chosen and rejected, 1 for a
    demonstration, the verdict as 1 and 0, or the quantile. finish_reason: `length` when it was cut. labels: what else
    is known of it, by name; the same names for every completion of a data set."""

    token_ids: tuple[int, ...]
    text: str
    reward: float
    finish_reason: FinishReason
    labels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoggedGroup:
    """A prompt and its completions (as many for every prompt of a data set)."""

    prompt: Prompt
    completions: tuple[LoggedCompletion, ...]


@dataclass(frozen=True)
class LoggedSet:
    """groups: in the order of the data. prompts: theirs, for a `PromptStream`."""

    groups: tuple[LoggedGroup, ...]
    prompts: PromptSet


def prepare_logged(
    rows: Sequence[Row],
    tokenizer: Any,
    spec: DataSpec,
    *,
    kind: LoggedKind,
    eos_token_ids: Sequence[int],
    max_prompt_length: int | None,
    max_completion_length: int,
    where: str,
) -> LoggedSet:
    """Tokenises prompts and completions.

    A completion is a string or one message of the assistant's; the prompt's messages may stand before it once more. A
    string after a string prompt is tokenised by itself, anything else goes through the chat template behind its prompt.
    Each completion ends at its first EOS, which is added where there is none.

    Args:
        rows: mappings with the prompt column and those of `kind`.
        tokenizer: of the policy.
        spec: prompt column, wrapping, system prompt, and what happens to long prompts.
        kind: what the rows hold.
        eos_token_ids: each ends a completion; the first is put behind one that has none.
        max_prompt_length: longest prompt in tokens, or None.
        max_completion_length: longer completions are cut off there, without an EOS, and counted in a warning.
        where: of the rows, for messages.

    Raises:
        DataError: a row lacks a column, a completion is empty or not what it should be, a reward is no finite number,
            the rows' numbers of completions differ, or the chat template does not keep the prompt's tokens.
        ConfigError: as `prepare_prompts`.
    """
    rows = readable(rows, spec.prompt_column, kind, where)
    read = partial(prompt_ids, tokenizer)
    prompts = prepare_prompts(rows, read, spec, max_prompt_length=max_prompt_length, where=where)
    groups: list[LoggedGroup] = []
    empty: list[int] = []
    for prompt in prompts.prompts:
        found: list[LoggedCompletion] = []
        for completion, reward in _labelled(prompt, kind, where):
            message = answer(completion, prompt.content, f"{where}: row {prompt.position}")
            if not message["content"].strip():
                empty.append(prompt.position)
                continue
            ids = _tokenize(message, prompt, tokenizer, eos_token_ids, where)
            kept = ids[:max_completion_length]
            reason: FinishReason = "length" if len(kept) < len(ids) else "eos"
            found.append(LoggedCompletion(kept, message["content"], reward, reason))
        groups.append(LoggedGroup(prompt, tuple(found)))
    if empty:
        rows_empty = list(dict.fromkeys(empty))
        raise DataError(f"{where}: {len(rows_empty)} rows have an empty completion (rows {some_rows(rows_empty)})")
    counts = sorted({len(group.completions) for group in groups})
    if len(counts) > 1:
        raise DataError(f"{where}: rows have {counts[0]} to {counts[-1]} completions; every row needs equally many")
    reasons = [completion.finish_reason for group in groups for completion in group.completions]
    if num_cut := reasons.count("length"):
        log.warning(
            "%s: %d of %d completions are longer than %d tokens and were cut there (sampling.max_completion_length)",
            where,
            num_cut,
            len(reasons),
            max_completion_length,
        )
    return LoggedSet(tuple(groups), prompts)


def readable(rows: Sequence[Row], prompt_column: str, kind: LoggedKind, where: str) -> Sequence[Row]:
    """The rows, every one with the columns of its kind; of preferences without a prompt, with it.

    Raises:
        DataError: a row lacks a column, or its conversations have no common beginning.
    """
    for index, row in enumerate(rows):
        if missing := [name for name in COLUMNS[kind] if name not in row]:
            otherwise = " (or name a function that gives them: algorithm.oracle)" if kind == "verdicts" else ""
            raise DataError(
                f"{where}: row {index} has no column '{missing[0]}'; {kind} need "
                f"{', '.join([prompt_column, *COLUMNS[kind]])}{otherwise}, and it has "
                f"{', '.join(map(str, row)) or 'none'}"
            )
    return _with_prompts(rows, prompt_column, where) if kind in ("preferences", "verdicts") else rows


def _with_prompts(rows: Sequence[Row], column: str, where: str) -> list[Row]:
    """The rows, with the common beginning of `chosen` and `rejected` as the prompt of those that have none."""
    found: list[Row] = []
    apart: list[int] = []
    for index, row in enumerate(rows):
        if column in row:
            found.append(row)
            continue
        chosen, rejected = (
            read_conversation(row[name], f"{where}: row {index}: '{name}'") for name in COLUMNS["preferences"]
        )
        if chosen is None or rejected is None:
            raise DataError(
                f"{where}: row {index} has no column '{column}', so chosen and rejected must be lists of messages that "
                "begin alike: in plain text nobody can tell where the prompt ends. Give the prompt a column of its own "
                "(in text with turns, all up to the last answer), or the texts as messages."
            )
        # At least the last message of each is its completion, even where both are the same.
        most = min(len(chosen), len(rejected)) - 1
        shared = next((place for place in range(most) if chosen[place] != rejected[place]), most)
        if shared == 0 or max(len(chosen), len(rejected)) > shared + 1:
            apart.append(index)
        found.append({**row, column: chosen[:shared]})
    if apart:
        raise DataError(
            f"{where}: in {len(apart)} of {len(rows)} rows (rows {some_rows(apart)}) chosen and rejected are not the "
            f"same conversation up to the last message of each, so they have no common prompt. Leave these rows "
            f"out, or add the column '{column}'."
        )
    return found


def _labelled(prompt: Prompt, kind: LoggedKind, where: str) -> list[tuple[Any, float]]:
    """Completions with their rewards."""
    columns, index = prompt.columns, prompt.position
    match kind:
        case "demonstrations":
            return [(columns["completion"], 1.0)]
        case "preferences":
            return [(columns["chosen"], 1.0), (columns["rejected"], 0.0)]
        case "verdicts":
            verdicts = [typed(columns[name]) for name in COLUMNS[kind][2:]]
            for name, verdict in zip(COLUMNS[kind][2:], verdicts, strict=True):
                if not isinstance(verdict, bool):
                    raise DataError(
                        f"{where}: row {index}: '{name}' must be true (the completion complies with the new rules) or "
                        f"false, found {columns[name]!r:.120}"
                    )
            return [(columns["chosen"], float(verdicts[0])), (columns["rejected"], float(verdicts[1]))]
        case "rewards" | "quantiles":
            for name in COLUMNS[kind]:
                if isinstance(columns[name], str | Mapping) or not isinstance(columns[name], Iterable):
                    raise DataError(f"{where}: row {index}: '{name}' must be a list, found {columns[name]!r:.120}")
            completions, rewards = list(columns["completions"]), list(columns["rewards"])
            if len(completions) != len(rewards) or not completions:
                raise DataError(f"{where}: row {index} has {len(completions)} completions and {len(rewards)} rewards")
            for reward in rewards:
                if not is_number(reward):
                    raise DataError(f"{where}: row {index}: the reward {reward!r} is no finite number")
            if kind == "quantiles":
                reference = ref_rewards(prompt, where)
                rewards = [sum(each <= reward for each in reference) / len(reference) for reward in rewards]
            return [(each, float(reward)) for each, reward in zip(completions, rewards, strict=True)]


def ref_rewards(prompt: Prompt, where: str) -> list[float]:
    """The rewards of completions that π₀ wrote for a prompt, from the column `ref_rewards` of its row.

    Raises:
        DataError: there are none, or one is no finite number.
    """
    found = prompt.columns.get("ref_rewards")
    rewards = list(found) if isinstance(found, Iterable) and not isinstance(found, str | Mapping) else []
    if not rewards or not all(map(is_number, rewards)):
        raise DataError(
            f"{where}: row {prompt.position}: 'ref_rewards' must be a list of the rewards (finite numbers) of "
            f"completions that the reference wrote for the prompt, found {found!r:.120}"
        )
    return [float(each) for each in rewards]


def answer(completion: Any, prompt: str | list[Message], here: str) -> Message:
    """The completion of a prompt as one message.

    Raises:
        DataError: it is none.
    """
    if isinstance(completion, str):
        message: Message = {"role": "assistant", "content": completion}
    elif (messages := read_conversation(completion, f"{here}: a completion")) is not None:
        if isinstance(prompt, str):
            raise DataError(
                f"{here}: a completion is messages, but the prompt is a plain string: set data.wrap_as_user: true, or "
                "give the prompt as messages too"
            )
        *before, message = messages
        roles = ", ".join(each["role"] for each in messages)
        if before and prompt[-len(before) :] != before:
            raise DataError(
                f"{here}: a completion must be one message, before which only the prompt's may stand once more; found "
                f"messages of {roles}"
            )
        if message["role"] != "assistant":
            raise DataError(f"{here}: a completion must end with a message of the assistant's, found {roles}")
    else:
        raise DataError(f"{here}: a completion must be a string or a list of messages, found {completion!r:.120}")
    return message


def _tokenize(
    message: Message, prompt: Prompt, tokenizer: Any, eos_token_ids: Sequence[int], where: str
) -> tuple[int, ...]:
    here = f"{where}: row {prompt.position}"
    if isinstance(prompt.content, str):
        ids = text_ids(tokenizer, message["content"])
    else:
        whole, start = chat_text(tokenizer, [*prompt.content, message], here=here), len(prompt.token_ids)
        ids = text_ids(tokenizer, whole)
        if ids[:start] == prompt.token_ids:
            ids = ids[start:]
        else:
            # The prompt ends inside a token of the whole. Who is given its tokens goes on with others, and so do these.
            before = chat_text(tokenizer, prompt.content, here=here, is_prompt=True)
            if not whole.startswith(before):
                raise DataError(
                    f"{here}: the chat template writes the prompt differently when its completion follows (one that "
                    "opens the model's thoughts by itself does), so nobody can tell where the completion begins. Give "
                    "both as strings: the prompt as tokenizer.apply_chat_template(prompt, tokenize=False, "
                    "add_generation_prompt=True) writes it, and what the model is to write behind that"
                )
            ids = text_ids(tokenizer, whole[len(before) :])
    if not ids:
        raise DataError(f"{here}: the completion {message['content']!r:.120} has no tokens")
    # Templates put a newline or the like behind the turn; a sampled completion ends at EOS.
    end = next((place for place, token in enumerate(ids) if token in eos_token_ids), None)
    return (*ids, eos_token_ids[0]) if end is None else ids[: end + 1]


def token_groups(groups: Sequence[LoggedGroup]) -> TokenGroups:
    """Logged completions as a batch of tokens."""
    ids, mask = pad_rows([completion.token_ids for group in groups for completion in group.completions], pad_id=0)
    return TokenGroups(
        prompt_ids=tuple(group.prompt.token_ids for group in groups),
        group_sizes=tuple(len(group.completions) for group in groups),
        completion_ids=ids,
        mask=mask,
    )
