"""Pairs judged by a reward: the completion with the higher one wins, or the one a judge prefers in both orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dar.evaluate.folder import Lines
from dar.evaluate.generate import CHUNK, Content, Note
from dar.evaluate.judgements import Judgement, judgement_of
from dar.judge import PairItem, WinsReward
from dar.rewards import Failed, Reward, RewardValue
from dar.rewards.combine import keyword_arguments
from dar.rewards.function import Call


@dataclass(frozen=True)
class PairToJudge:
    """A prompt with two completions; columns are those of its row, for rewards that read them."""

    key: str
    prompt: Content
    model: str
    baseline: str
    category: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def judge_pairs(pairs: Sequence[PairToJudge], reward: Reward, lines: Lines, note: Note) -> list[Judgement]:
    """Judges what the file does not have yet, and appends it.

    A pairwise judge is asked in both orders, and both verdicts are kept. Any other reward gets both completions of a
    pair one after the other, as a group of two of one prompt, so that one which compares the completions of a prompt
    compares these two. A pair for which it fails, or does not apply, has no preference.

    Args:
        lines: keyed by `pair` and `model_first`.

    Raises:
        RewardError: the reward raised.
        BudgetError: the judge's budget does not reach; what was judged is kept.
    """
    function = reward.function
    orders = (True, False) if isinstance(function, WinsReward) else (None,)
    missing = [pair for pair in pairs if any((pair.key, order) not in lines for order in orders)]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        found = compare_pairs(chunk, function) if isinstance(function, WinsReward) else score_pairs(chunk, reward)
        # After an interruption between the two lines of a pair, one of them is there already.
        lines.append(dataclasses.asdict(one) for one in found if (one.pair, one.model_first) not in lines)
        note(f"{lines.path.stem}: {len(pairs) - len(missing) + start + len(chunk)} of {len(pairs)}")
    return [judgement_of(lines.rows[pair.key, order], pair.key, str(lines.path)) for pair in pairs for order in orders]


def compare_pairs(pairs: Sequence[PairToJudge], reward: WinsReward) -> list[Judgement]:
    """Two judgements of each pair, the model's completion shown first and second."""
    rubric_column = reward.judge.spec.rubric_column
    items = [
        PairItem(
            pair.prompt,
            pair.model,
            pair.baseline,
            None if rubric_column is None else pair.columns.get(rubric_column),
            pair.columns,
        )
        for pair in pairs
    ]
    found: list[Judgement] = []
    for pair, preference in zip(pairs, reward.judge.compare(items), strict=True):
        if isinstance(preference, Failed):
            found += [_judgement(pair, None, preference.reason, order) for order in (True, False)]
            continue
        first = {"first": 1.0, "tie": 0.5, "second": 0.0}
        forward, backward = preference.forward, preference.backward
        found.append(_judgement(pair, first[forward.choice], forward.text, True))
        found.append(_judgement(pair, 1.0 - first[backward.choice], backward.text, False))
    return found


def score_pairs(pairs: Sequence[PairToJudge], reward: Reward) -> list[Judgement]:
    """One judgement of each pair, by the rewards of its two completions."""
    rows = [(pair, text) for pair in pairs for text in (pair.model, pair.baseline)]
    arguments = keyword_arguments(
        [pair.prompt for pair, _ in rows],
        [pair.columns for pair, _ in rows],
        [text for _, text in rows],
        group_ids=[index for index in range(len(pairs)) for _ in range(2)],
    )
    values = Call(reward.name, reward.function, arguments, where=f"pair {pairs[0].key}").result()
    return [
        _judgement(pair, *_preference(model, baseline), None)
        for pair, model, baseline in zip(pairs, values[::2], values[1::2], strict=True)
    ]


def _preference(model: RewardValue, baseline: RewardValue) -> tuple[float | None, str]:
    """The preference, and what it comes from."""
    match model, baseline:
        case (Failed(reason=reason), _) | (_, Failed(reason=reason)):
            return None, reason
        case float(), float():
            return (1.0 + (model > baseline) - (model < baseline)) / 2, f"{model:.6g} : {baseline:.6g}"
    return None, "the reward does not apply"


def _judgement(pair: PairToJudge, preference: float | None, verdict: str, model_first: bool | None) -> Judgement:
    return Judgement(
        pair=pair.key,
        preference=preference,
        model_length=len(pair.model),
        baseline_length=len(pair.baseline),
        model_first=model_first,
        category=pair.category,
        verdict=verdict,
    )
