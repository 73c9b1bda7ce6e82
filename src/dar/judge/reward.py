"""The rewards made of a judge: its score of each completion, or each completion's share of wins within its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, groupby
from typing import Any, Literal

from dar.config.rewards import JudgeRewardSpec
from dar.errors import RewardError
from dar.judge.judge import Judge, PairItem, ScoreItem
from dar.judge.verdicts import Preference
from dar.rewards import Failed
from dar.rewards.builtin import completion_text

Opponents = Literal["all", "first"]

_NOT_DATA = ("completion_ids", "finish_reasons", "group_ids")
"""Arguments of reward functions that are no columns of the data."""


def build_judge_reward(spec: JudgeRewardSpec) -> ScoreReward | WinsReward:
    """The reward function of a `judge` reward. Raises as `Judge`."""
    judge = Judge(spec)
    return ScoreReward(judge) if spec.mode == "pointwise" else WinsReward(judge)


class _JudgeReward:
    """What both have in common: the judge, its counts as metrics, and its budget in checkpoints."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def metrics(self) -> dict[str, float]:
        """What the judge's requests came to since the last call."""
        return self.judge.client.counts.drain()

    def state(self) -> dict[str, float]:
        """What of the budget is spent."""
        budget = self.judge.client.budget
        return {"requests": budget.requests, "tokens": budget.tokens}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on spending where `state` was; a judge that a changed recipe has added has spent nothing."""
        budget = self.judge.client.budget
        budget.requests, budget.tokens = int(state.get("requests", 0)), int(state.get("tokens", 0))

    def _about(self, columns: Mapping[str, Sequence[Any]], row: int) -> tuple[str | None, dict[str, Any]]:
        """The row's rubric, None where it has none, and what the data say of it.

        Raises:
            RewardError: there is no column of rubrics.
        """
        data = {name: values[row] for name, values in columns.items() if name not in _NOT_DATA}
        column = self.judge.spec.rubric_column
        if column is not None and column not in data:
            raise RewardError(
                f"the data have no column '{column}', which rubric_column names; there are: "
                f"{', '.join(sorted(data)) or 'none beside the prompt'}"
            )
        rubric = None if column is None else data[column]
        return None if rubric is None else str(rubric), data


class ScoreReward(_JudgeReward):
    """The judge's score of each completion."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge)
        self._masses: list[float] = []

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | Failed]:
        items = [
            ScoreItem(prompt, completion_text(completion), *self._about(columns, row))
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        scores = await self.judge.score_async(items)
        self._masses += [score.mass for score in scores if not isinstance(score, Failed) and score.mass is not None]
        return [score if isinstance(score, Failed) else score.value for score in scores]

    def metrics(self) -> dict[str, float]:
        """Those of the requests, and `score_mass`: the mean probability of scores that was seen."""
        found = super().metrics()
        if self._masses:
            found["score_mass"] = sum(self._masses) / len(self._masses)
        self._masses = []
        return found


class WinsReward(_JudgeReward):
    """Each completion's share of wins against others of its prompt, in [0, 1]; a tie is half a win.

    The spec's `opponents`: `all` compares every two completions of a group, K·(K − 1)/2 pairs; `first` compares each
    with the group's first, K − 1 pairs.

    With K = 2 the rewards are 1 and 0 where one is preferred, and ½ and ½ where the judge is of two minds: a method on
    pairs then has exactly the judge's pair, or none.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge)
        self._preferences: list[Preference] = []

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], group_ids: Sequence[int], **columns: Sequence[Any]
    ) -> list[float | Failed]:
        texts = [completion_text(completion) for completion in completions]
        opponents = self.judge.spec.opponents or "all"
        # Not by the prompts: two groups may have the same one.
        groups = [list(rows) for _, rows in groupby(range(len(texts)), key=group_ids.__getitem__)]
        pairs = [pair for group in groups for pair in group_pairs(group, opponents)]
        # Two equal completions are a tie without asking.
        asked = [(a, b) for a, b in pairs if texts[a] != texts[b]]
        items = [PairItem(prompts[a], texts[a], texts[b], *self._about(columns, a)) for a, b in asked]
        preferences = dict(zip(asked, await self.judge.compare_async(items), strict=True))
        self._preferences += [found for found in preferences.values() if not isinstance(found, Failed)]
        scores: list[list[float]] = [[] for _ in texts]
        reasons: dict[int, Failed] = {}
        for a, b in pairs:
            preference = preferences.get((a, b))
            if isinstance(preference, Failed):
                reasons |= {a: preference, b: preference}
                continue
            score = 0.5 if preference is None else preference.score
            scores[a].append(score)
            scores[b].append(1.0 - score)
        # The mean over the comparisons that gave a verdict. A row whose comparisons all failed has no score, and one
        # without an opponent cannot win.
        alone = Failed("there is no other completion of its prompt to compare it with")
        return [sum(own) / len(own) if own else reasons.get(row, alone) for row, own in enumerate(scores)]

    def metrics(self) -> dict[str, float]:
        """Those of the requests, and of the comparisons: `tied_fraction`, `disagreement`, `first_shown_wins`."""
        found = super().metrics()
        preferences, self._preferences = self._preferences, []
        if preferences:
            verdicts = [verdict for pair in preferences for verdict in (pair.forward, pair.backward)]
            decided = [verdict.choice for verdict in verdicts if verdict.choice != "tie"]
            found["tied_fraction"] = sum(pair.winner == "tie" for pair in preferences) / len(preferences)
            found["disagreement"] = sum(not pair.agrees for pair in preferences) / len(preferences)
            if decided:
                found["first_shown_wins"] = decided.count("first") / len(decided)
        return found


def group_pairs(group: Sequence[int], opponents: Opponents) -> list[tuple[int, int]]:
    """The pairs of rows that are compared within a group."""
    if opponents == "first":
        return [(group[0], row) for row in group[1:]]
    return list(combinations(group, 2))
