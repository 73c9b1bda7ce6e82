"""Rewards that come with the library: sentiment, length, pattern, missing end, diversity."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dar.config.rewards import (
    BuiltinReward,
    DiversityRewardSpec,
    LengthPenaltySpec,
    LengthRewardSpec,
    MissingEosPenaltySpec,
    PatternCountRewardSpec,
    RegexRewardSpec,
    SentimentRewardSpec,
    TokenCostSpec,
)
from dar.errors import require_package
from dar.rewards.function import RewardFunction, RewardValue
from dar.rewards.group import group_reward
from dar.sandbox.score import Failed

_MAX_SECONDS = 2.0


def build(spec: BuiltinReward) -> RewardFunction:
    """The function of a spec. Raises ConfigError where a package that it needs is missing."""
    match spec:
        case SentimentRewardSpec():
            return sentiment()
        case LengthRewardSpec():
            return length(spec.target)
        case RegexRewardSpec():
            return regex(spec.pattern)
        case PatternCountRewardSpec():
            return pattern_count(spec.pattern)
        case MissingEosPenaltySpec():
            return missing_eos_penalty(spec.penalty)
        case LengthPenaltySpec():
            return length_penalty(spec.max_length, spec.buffer)
        case TokenCostSpec():
            return token_cost(spec.cost)
        case DiversityRewardSpec():
            return diversity(spec.ngram)


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: the string itself, or its messages' contents joined."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def in_time(check: Callable[[str], float], what: str) -> RewardFunction:
    """A reward that asks a user's own check about each completion's text, and has failed where that takes too long.

    The time is this process's, so that a busy machine changes nothing. Only the main thread of a POSIX system keeps it.
    """

    def stop(*_: object) -> None:
        raise TimeoutError

    def one(text: str) -> RewardValue:
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            return check(text)
        before = signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_SECONDS)
        try:
            return check(text)
        except TimeoutError:
            return Failed(f"{what} took longer than {_MAX_SECONDS:g} s of processor time")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)

    def score(completions: Sequence[Any]) -> list[RewardValue]:
        return [one(completion_text(completion)) for completion in completions]

    return score


def sentiment() -> RewardFunction:
    """VADER's compound score in [−1, 1], a rule-based measure of how positive a text sounds.

    Raises:
        ConfigError: the package vaderSentiment is not installed.

    Hutto & Gilbert 2014. The compound score is a squashed *sum* of word valences, so it grows with the number of
    positive words: a proxy that can be gamed, which is what makes it a good first task.
    """
    require_package("vaderSentiment", "the sentiment reward")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 - an extra

    analyzer = SentimentIntensityAnalyzer()
    return in_time(lambda text: analyzer.polarity_scores(text)["compound"], "VADER")


def length(target: int) -> RewardFunction:
    """−|tokens − target| / target; EOS counts as a token."""
    return _by_length(lambda length: -abs(length - target) / target)


def regex(pattern: str) -> RewardFunction:
    """1 where the pattern is found anywhere in the completion, 0 elsewhere; the dot matches newlines."""
    compiled = re.compile(pattern, re.DOTALL)
    return in_time(lambda text: float(compiled.search(text) is not None), f"the pattern {pattern}")


def pattern_count(pattern: str) -> RewardFunction:
    """How often the pattern is found, without overlap (a lookahead `(?=…)` counts overlapping places too)."""
    compiled = re.compile(pattern, re.DOTALL)
    return in_time(lambda text: float(sum(1 for _ in compiled.finditer(text))), f"the pattern {pattern}")


def missing_eos_penalty(penalty: float) -> RewardFunction:
    """−penalty for a completion that ran out of room, 0 for one that ended by itself."""

    def score(finish_reasons: Sequence[str]) -> list[float]:
        return [0.0 if reason == "eos" else -penalty for reason in finish_reasons]

    return score


def length_penalty(max_length: int, buffer: int) -> RewardFunction:
    """Soft overlong punishment: 0 up to max_length − buffer tokens, from there linearly down to −1 at max_length.

        min(0, max(−1, (max_length − buffer − |y|) / buffer)),  |y| in tokens, EOS included

    Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    return _by_length(lambda length: min(0.0, max(-1.0, (max_length - buffer - length) / buffer)))


def token_cost(cost: float) -> RewardFunction:
    """−cost for every token, EOS included."""
    return _by_length(lambda length: -cost * length)


def _by_length(value: Callable[[int], float]) -> RewardFunction:
    """A reward of a completion's number of tokens."""

    def score(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [value(len(ids)) for ids in completion_ids]

    return score


def diversity(ngram: int) -> RewardFunction:
    """The share of a completion's different word n-grams that no other completion of its prompt has, in [0, 1].

        d_k = |G_k \\ ∪_{j≠k} G_j| / |G_k|

    0 for a completion with fewer than n words.
    """

    @group_reward
    def score(completions: Sequence[Any]) -> list[float]:
        found = [_ngrams(completion_text(completion), ngram) for completion in completions]
        return [
            len(own.difference(*found[:index], *found[index + 1 :])) / len(own) if own else 0.0
            for index, own in enumerate(found)
        ]

    return score


def _ngrams(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
