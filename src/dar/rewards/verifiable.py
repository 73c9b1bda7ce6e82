"""Rewards for what can be checked: mathematics, instructions, structure, and one's own code in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from dar.config.recipe import read_yaml
from dar.config.verifiable import (
    FormatRewardSpec,
    IFEvalRewardSpec,
    JsonSchemaRewardSpec,
    MathRewardSpec,
    ReasoningGymRewardSpec,
    SandboxedRewardSpec,
    VerifiableReward,
)
from dar.errors import ConfigError, RewardError, require_package
from dar.rewards.builtin import completion_text, in_time
from dar.rewards.function import RewardFunction, RewardValue
from dar.sandbox.sandbox import Sandbox
from dar.verifiable.ifeval import check_instructions
from dar.verifiable.puzzles import COLUMN


def build(spec: VerifiableReward) -> RewardFunction:
    """The function of a spec.

    Raises:
        ConfigError: it cannot be loaded, or a package or file it needs cannot be.
    """
    match spec:
        case SandboxedRewardSpec():
            return sandboxed(spec)
        case MathRewardSpec():
            return math(spec)
        case ReasoningGymRewardSpec():
            return reasoning_gym(spec)
        case IFEvalRewardSpec():
            return ifeval(strictness=spec.strictness, credit=spec.credit)
        case JsonSchemaRewardSpec():
            return json_schema(spec.path)
        case FormatRewardSpec():
            return tag_format(spec.tags)


def sandboxed(spec: SandboxedRewardSpec) -> RewardFunction:
    """The spec's `package.module:function` in processes of its own, called with one completion at a time.

    Raises:
        ConfigError: the function cannot be loaded.
    """
    pool = Sandbox(spec.function, spec)
    pool.start()

    def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[RewardValue]:
        given = {"completions": completions, **columns}
        rows = range(len(completions))
        return list(pool.map([{name: [values[row]] for name, values in given.items()} for row in rows]))

    return score


def math(spec: MathRewardSpec) -> RewardFunction:
    """1 where the completion's final answer equals the row's gold answer, 0 where not; None without a gold answer.

    Raises:
        ConfigError: math-verify cannot be loaded.
    """
    require_package("math_verify", "the math reward")
    pool = Sandbox("dar.verifiable.maths_in_sandbox:score", spec, is_trusted=True)
    return _checked_in_sandbox(pool, spec.column, "golds")


def reasoning_gym(spec: ReasoningGymRewardSpec) -> RewardFunction:
    """What the task a row comes from gives the completion, in [0, 1]; None for a row that comes from none.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    require_package("reasoning_gym", "the reasoning_gym reward")
    # Not trusted: some tasks have sympy evaluate the completion's text, which is Python.
    pool = Sandbox("dar.verifiable.puzzles_in_sandbox:score", spec)
    return _checked_in_sandbox(pool, COLUMN, COLUMN)


def _checked_in_sandbox(pool: Sandbox, column: str, argument: str) -> RewardFunction:
    """A function of a completion's text and one column, in a sandbox; None where the column holds none."""
    pool.start()

    def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[RewardValue]:
        known = required_column(columns, column)
        rows = [row for row, value in enumerate(known) if value is not None]
        found = pool.map([{"completions": [completion_text(completions[row])], argument: [known[row]]} for row in rows])
        scores: list[RewardValue] = [None] * len(completions)
        for row, value in zip(rows, found, strict=True):
            scores[row] = value
        return scores

    return score


def ifeval(*, strictness: Literal["strict", "loose"], credit: Literal["share", "all"]) -> RewardFunction:
    """The share of the row's IFEval instructions that are followed, or 1 only where all are; None without any.

    Reads the columns `instruction_id_list` and `kwargs` of the published data.
    """

    require_package("langdetect", "the ifeval reward")

    def one(text: str, ids: Any, arguments: Any) -> float | None:
        if not ids:
            return None
        followed = check_instructions(text, ids, arguments, loose=strictness == "loose")
        return float(all(followed)) if credit == "all" else sum(followed) / len(followed)

    def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[RewardValue]:
        ids, arguments = required_column(columns, "instruction_id_list"), required_column(columns, "kwargs")
        return [one(completion_text(text), *row) for text, *row in zip(completions, ids, arguments, strict=True)]

    return score


def json_schema(path: str) -> RewardFunction:
    """1 where the completion is JSON (in a code fence or not) that a schema allows, 0 elsewhere.

    Args:
        path: a JSON or YAML file with the schema; references stay inside of it.

    Raises:
        ConfigError: it cannot be read, or is no JSON schema.
    """
    require_package("jsonschema", "the json_schema reward")
    import jsonschema  # noqa: PLC0415 - an extra
    import referencing  # noqa: PLC0415
    from jsonschema.validators import validator_for  # noqa: PLC0415

    try:
        schema = read_yaml(path)
        if not isinstance(schema, dict) or not isinstance(schema.get("$schema", ""), str):
            raise ConfigError(f"{path} is not a JSON schema: expected a mapping, found {schema!r:.100}")
        kind = validator_for(schema)
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{path} is not a JSON schema: {error.message}") from error
    # An empty registry: without it, a reference to an address would be fetched.
    validator = kind(schema, registry=referencing.Registry())

    def is_valid(text: str) -> float:
        fenced = re.fullmatch(r"```(?:json)?[^\S\n]*+\n(.*)```", text.strip(), re.DOTALL | re.IGNORECASE)
        try:
            return float(validator.is_valid(json.loads(fenced[1] if fenced else text)))
        except (ValueError, RecursionError):
            return 0.0

    return in_time(is_valid, f"the JSON schema {path}")


def tag_format(tags: Sequence[str]) -> RewardFunction:
    """The share of the tags that are in their place: `<tag>…</tag>` opened once, closed once, not empty, in order.

    A tag is in order if it opens after the one before it, among those in their place, has closed.
    """

    def one(text: str) -> float:
        end, placed = 0, 0
        for tag in tags:
            is_single = text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1
            start, close = text.find(f"<{tag}>"), text.find(f"</{tag}>")
            if is_single and start >= end and text[start + len(tag) + 2 : close].strip():
                end = close
                placed += 1
        return placed / len(tags)

    def score(completions: Sequence[Any]) -> list[float]:
        return [one(completion_text(completion)) for completion in completions]

    return score


def required_column(columns: dict[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """A column of the data.

    Raises:
        RewardError: there is none of this name.
    """
    if name not in columns:
        others = ", ".join(sorted(columns.keys() - {"prompts", "completion_ids", "finish_reasons", "group_ids"}))
        raise RewardError(f"the data has no column '{name}', which this reward reads; it has: {others or 'none'}")
    return columns[name]
