"""Specs of the rewards, one per `type`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from dar.config.base import Count, Fraction, NotNegative, Positive
from dar.config.judge import JudgeBudgetSpec, JudgeEndpointSpec, JudgePriceSpec
from dar.config.model_reward import ModelRewardSpec
from dar.config.reward import RewardSpec
from dar.config.verifiable import FunctionPathSpec, VerifiableReward


class FunctionRewardSpec(FunctionPathSpec):
    """A Python function, by import path."""

    type: Literal["function"] = "function"


class SentimentRewardSpec(RewardSpec):
    """VADER compound score of the completion, in [−1, 1] (Hutto & Gilbert 2014)."""

    type: Literal["sentiment"] = "sentiment"


class LengthRewardSpec(RewardSpec):
    """−|tokens − target| / target: 0 at the target, −1 for an empty or a twice too long completion."""

    type: Literal["length"] = "length"
    target: Count
    """Wanted completion length in tokens, EOS included."""


class PatternSpec(RewardSpec):
    """What rewards that look for a pattern share."""

    pattern: str
    """Python regular expression, searched anywhere in the completion (dot matches newlines)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class RegexRewardSpec(PatternSpec):
    """1 where the pattern is found in the completion, 0 elsewhere."""

    type: Literal["regex"] = "regex"


class PatternCountRewardSpec(PatternSpec):
    """How often the pattern is found in the completion: a longer completion has room for more."""

    type: Literal["pattern_count"] = "pattern_count"


class MissingEosPenaltySpec(RewardSpec):
    """−penalty for a completion that was cut off before it ended by itself, 0 for the others."""

    type: Literal["missing_eos_penalty"] = "missing_eos_penalty"
    penalty: Positive = 1.0
    """What is subtracted, in reward units."""


class JudgeRewardSpec(RewardSpec):
    """AI feedback: a language model scores each completion, or compares the completions of a prompt."""

    type: Literal["judge"] = "judge"
    endpoint: JudgeEndpointSpec
    """Where the judge is and how it is asked."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """`pointwise`: the judge's score. `pairwise`: the share of wins against other completions of the prompt, asked in
    both orders; for the methods on pairs."""
    template: str = "helpful"
    """`helpful`, `harmless`, `tldr`, `free`, or the path of a YAML file with the keys `system` and `user`."""
    rubric_column: str | None = None
    """Column of the data that says what a row is judged by."""
    scale: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """Pointwise: lowest and highest score; by default [1, 10]."""
    min_score_mass: Fraction | None = None
    """Pointwise: probability that the scores among the candidates must have for their expectation to count, else the
    stated number does; by default 0.1."""
    opponents: Literal["all", "first"] | None = None
    """Pairwise: compare every two completions of a prompt, or each with its first; by default all."""
    cache: str | None = "judge.sqlite"
    """SQLite file of answers, in the cache folder (`$DAR_CACHE`) unless its path is absolute; `null` = none."""
    budget: JudgeBudgetSpec = Field(default_factory=JudgeBudgetSpec)
    """What it may cost."""
    price: JudgePriceSpec | None = None
    """What tokens cost."""

    @field_validator("scale")
    @classmethod
    def _ascends(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 100:
            raise ValueError(f"expected two whole numbers from 0 to 100, the lower one first, got {value}")
        return value

    @model_validator(mode="after")
    def _says_nothing_of_the_other_mode(self) -> JudgeRewardSpec:
        others = ("opponents",) if self.mode == "pointwise" else ("scale", "min_score_mass")
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"mode {self.mode} has no {name}: remove it")
        return self


class LengthPenaltySpec(RewardSpec):
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13): 0 up to `max_length` − `buffer` tokens, then linearly
    down to −1 at `max_length`."""

    type: Literal["length_penalty"] = "length_penalty"
    max_length: Count
    """Tokens, EOS included, at which the penalty is −1; as a rule `sampling.max_completion_length`."""
    buffer: Count
    """Tokens before that at which it begins."""

    @model_validator(mode="after")
    def _has_room(self) -> LengthPenaltySpec:
        if self.buffer > self.max_length:
            raise ValueError(f"buffer is {self.buffer}, more than max_length {self.max_length}")
        return self


class TokenCostSpec(RewardSpec):
    """−cost for every token of the completion, EOS included."""

    type: Literal["token_cost"] = "token_cost"
    cost: NotNegative
    """Reward units per token."""


class DiversityRewardSpec(RewardSpec):
    """The share of a completion's different word n-grams that no other completion of its prompt has, in [0, 1]."""

    type: Literal["diversity"] = "diversity"
    ngram: Count = 2
    """Words per n-gram."""


BuiltinReward = (
    DiversityRewardSpec
    | LengthPenaltySpec
    | TokenCostSpec
    | SentimentRewardSpec
    | LengthRewardSpec
    | RegexRewardSpec
    | PatternCountRewardSpec
    | MissingEosPenaltySpec
)
AnyReward = Annotated[
    FunctionRewardSpec | VerifiableReward | BuiltinReward | JudgeRewardSpec | ModelRewardSpec,
    Field(discriminator="type"),
]


def reward_name(spec: RewardSpec) -> str:
    """The reward's name in metrics: as given, or the function's name, or the type."""
    if spec.name:
        return spec.name
    if isinstance(spec, FunctionPathSpec):
        return spec.function.rpartition(":")[2]
    return spec.type  # pyright: ignore[reportAttributeAccessIssue] - every concrete spec has it


def _distinct(rewards: list[AnyReward]) -> list[AnyReward]:
    """The rewards. Raises ValueError where two would share their metrics."""
    names = [reward_name(reward) for reward in rewards]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"rewards share a name ({', '.join(repeated)}): give each its own with the key 'name'")
    return rewards


def expand_rewards(value: Any) -> Any:
    """A list of rewards with each one's shorthand expanded.

    Raises:
        ValueError: it is no list.
    """
    if not isinstance(value, list):
        raise ValueError("expected a list of rewards, for example [sentiment] or [my_package.my_module:my_function]")
    return [expand_reward(item) for item in value]


def expand_reward(item: Any) -> Any:
    """A reward given by name (`sentiment`), import path (`pkg.mod:fn`) or a reward model's folder or Hub id (with a
    `/`) as a mapping; others as they are."""
    if isinstance(item, str):
        if ":" not in item and "/" in item:
            return {"type": "model", "model": item}
        return {"type": "function", "function": item} if ":" in item else {"type": item}
    if isinstance(item, dict) and "type" not in item and "function" in item:
        return {"type": "function", **item}
    return item


AnyRewards = Annotated[list[AnyReward], BeforeValidator(expand_rewards), AfterValidator(_distinct)]
