"""Prompts and logged completions of a recipe, read, tokenised and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dar.assembly.objects import Objects
from dar.assembly.rows import check_rows
from dar.batch import Prompt
from dar.config.algorithm import LoggedKind
from dar.config.data import SourceSpec
from dar.config.realignment import TRACESpec
from dar.config.run import RunSpec
from dar.config.squared import AStarPOSpec
from dar.data.logged import COLUMNS, LoggedCompletion, LoggedSet, prepare_logged, ref_rewards
from dar.data.prompts import PromptSet, prepare_prompts
from dar.data.sources import fingerprint, load_rows
from dar.errors import ConfigError
from dar.policies.text.loading import eos_token_ids, load_generation_config

if TYPE_CHECKING:
    from dar.assembly.flow import FlowParts
    from dar.assembly.text import TextParts


@dataclass(frozen=True)
class RunData:
    """All that a run reads from files.

    train: the prompts it learns from.
    logged: their completions, where the method is an offline one.
    heldout: the prompts it samples from to be evaluated, if there are any and rewards.
    known: completions that come with the held-out rows, where the method is an offline one that has them.
    gold: the pairs of `algorithm.gold`, if any.
    """

    train: PromptSet
    logged: LoggedSet | None
    heldout: PromptSet | None
    known: LoggedSet | None
    gold: LoggedSet | None

    def fingerprints(self) -> dict[str, str]:
        """Of all that a run's numbers depend on, for a resumed run to compare."""
        found: dict[str, str] = {}
        heldout = self.known or self.heldout
        tables = {"data.train": self.logged or self.train, "data.heldout": heldout, "algorithm.gold": self.gold}
        for name, table in tables.items():
            prompts, texts = _texts(table)
            found[f"{name} (its rows)"] = fingerprint((each.position, each.content, each.columns) for each in prompts)
            tokens = fingerprint(each.token_ids for each in texts)
            found[f"{name} (its tokens; a chat template may write today's date)"] = tokens
        return found


def build_data(spec: RunSpec, objects: Objects, reader: TextParts | FlowParts) -> RunData:
    """Reads and checks all data of a run.

    Args:
        spec: the recipe.
        objects: rows and model given instead of files.
        reader: how the policy reads it.

    Raises:
        DataError: a file or row cannot be used or scored, or prompts are too long.
        ConfigError: no room for a prompt is left, or a token has no embedding.
    """

    def prompts(source: SourceSpec, rows: Iterable[Any] | None) -> PromptSet:
        return build_prompts(spec, source, rows, reader)

    def completions(source: SourceSpec, rows: Iterable[Any] | None, kind: LoggedKind) -> LoggedSet:
        model = objects.model
        generation_config = load_generation_config(spec.model) if model is None else model.generation_config
        return prepare_logged(
            load_rows(source, rows),
            reader.tokenizer,
            spec.data,
            kind=kind,
            eos_token_ids=eos_token_ids(generation_config, reader.tokenizer),
            max_prompt_length=longest_prompt(spec, reader.context),
            max_completion_length=spec.sampling.max_completion_length,
            where=source.path,
        )

    kind, source = spec.algorithm.logged, spec.data.heldout
    if isinstance(spec.algorithm, TRACESpec) and spec.algorithm.oracle is not None:
        kind = "preferences"
    pairs = spec.algorithm.gold if isinstance(spec.algorithm, TRACESpec) else None
    logged = None if kind is None else completions(spec.data.train, objects.train_rows, kind)
    train = prompts(spec.data.train, objects.train_rows) if logged is None else logged.prompts
    for prompt in train.prompts if isinstance(spec.algorithm, AStarPOSpec) else ():
        ref_rewards(prompt, spec.data.train.path)
    heldout, known = None, None
    if source is not None:
        rows = None if objects.heldout_rows is None else list(objects.heldout_rows)
        # Verdicts say what becomes of a pair in training; what is to be preferred in the end is what `chosen` says.
        has = None if kind is None else "preferences" if kind == "verdicts" else kind
        # Where nothing is scored there is nothing else to measure, and rows without them are refused.
        if has and (not spec.rewards or any(name in row for row in load_rows(source, rows) for name in COLUMNS[has])):
            known = completions(source, rows, has)
        if spec.rewards:
            heldout = known.prompts if known is not None else prompts(source, rows)
    gold = None if pairs is None else completions(pairs, None, "preferences")
    _require_vocabulary(reader.vocabulary, logged or train, known or heldout)
    if logged is None:
        check_rows(spec.rewards, [(each.position, each.columns) for each in train.prompts], spec.data.train.path)
    if heldout is not None and source is not None:
        rows = [(each.position, each.columns) for each in heldout.prompts]
        check_rows([*spec.rewards, *spec.evaluation.rewards], rows, source.path)
    _require_vocabulary(reader.vocabulary, gold)
    return RunData(train, logged, heldout, known, gold)


def build_prompts(
    spec: RunSpec, source: SourceSpec, rows: Iterable[Any] | None, reader: TextParts | FlowParts
) -> PromptSet:
    """Prompts read and tokenised.

    Raises:
        DataError: a file or row cannot be used, or prompts are too long.
        ConfigError: no room for a prompt is left, or messages meet a tokenizer without a chat template.
    """
    longest, found = longest_prompt(spec, reader.context), load_rows(source, rows)
    return prepare_prompts(found, reader.read, spec.data, max_prompt_length=longest, where=source.path)


def longest_prompt(spec: RunSpec, context: int | None) -> int | None:
    """Most tokens a prompt may have, so that a completion still fits the model.

    Raises:
        ConfigError: no room for a prompt is left.
    """
    longest = spec.data.max_prompt_length
    if context is None:
        return longest
    room = context - spec.sampling.max_completion_length
    if room < 1:
        raise ConfigError(
            f"sampling.max_completion_length is {spec.sampling.max_completion_length}, but the model reads at most "
            f"{context} tokens: no room is left for a prompt"
        )
    return min(room, longest or room)


def _texts(
    table: PromptSet | LoggedSet | None,
) -> tuple[Sequence[Prompt], tuple[Prompt | LoggedCompletion, ...]]:
    """A table's prompts, and these with the completions that come with them."""
    if isinstance(table, LoggedSet):
        prompts = [group.prompt for group in table.groups]
        return prompts, (*prompts, *(each for group in table.groups for each in group.completions))
    prompts = () if table is None else table.prompts
    return prompts, prompts


def _require_vocabulary(size: int, *tables: PromptSet | LoggedSet | None) -> None:
    """Raises ConfigError where the data has a token without an embedding: the tokenizer is another model's."""
    largest = max((max(each.token_ids) for table in tables for each in _texts(table)[1]), default=0)
    if largest >= size:
        raise ConfigError(
            f"the tokenizer gives the token id {largest}, but the model knows {size} tokens: it is not this model's "
            "tokenizer, or the model's embeddings were not resized for the tokens added to it"
        )
