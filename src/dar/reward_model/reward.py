"""A reward model's scores as a reward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from dar.batch import Message
from dar.errors import RewardError
from dar.policies.precision import Precision
from dar.policies.text.rendering import render
from dar.reward_model.score_model import Row, ScoreModel


class ModelReward:
    """Scores completions with a sequence classifier, under its own tokenizer and chat template.

        r = (score − shift) / scale

    Args:
        module: the classifier, frozen.
        tokenizer: its own.
        precision: device and compute precision.
        max_tokens: of one forward pass.
        max_length: longest conversation in tokens, or None for no limit.
        too_long: what happens to a longer one.
    """

    def __init__(
        self,
        module: ScoreModel,
        tokenizer: Any,
        precision: Precision,
        *,
        max_tokens: int,
        max_length: int | None,
        too_long: Literal["refuse", "keep_end"],
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.precision = precision
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.too_long = too_long
        self.shift, self.scale = 0.0, 1.0

    def __call__(
        self, prompts: Sequence[str | list[Message]], completions: Sequence[str | list[Message]]
    ) -> list[float]:
        """One score per completion. Completions of one prompt that stand together share its computation.

        Raises:
            RewardError: a conversation is too long for the model.
            ConfigError: prompts are messages, and the model has no chat template.
        """
        rows = [self._row(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        pairs = zip(prompts, rows, strict=True)
        units = [[row for _, row in unit] for _, unit in itertools.groupby(pairs, key=lambda pair: pair[0])]
        found = self.module.score(units, self.precision, max_tokens=self.max_tokens)
        return [(score - self.shift) / self.scale for scores in found for score in scores]

    def calibrate(self, scores: Sequence[float], *, with_scale: bool) -> None:
        """Takes the mean of these scores for 0, and (`with_scale`) their sample standard deviation for 1.

        Raises:
            RewardError: they are all the same, so there is no scale to be had.
        """
        mean = sum(scores) / len(scores)
        self.shift, self.scale = mean, 1.0
        if with_scale:
            spread = (sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)) ** 0.5
            if not spread > 0:
                raise RewardError(
                    f"the reward model gives all {len(scores)} completions of the initial policy the same score, so "
                    "there is nothing to scale by: set calibrate.scale: false, or take more prompts"
                )
            self.scale = spread

    def _row(self, prompt: str | list[Message], completion: str | list[Message]) -> Row:
        row = render(self.tokenizer, prompt, completion)
        if self.max_length is None or len(row) <= self.max_length:
            return row
        if self.too_long == "refuse":
            raise RewardError(
                f"a conversation has {len(row)} tokens for the reward model, which reads at most {self.max_length}: "
                "lower data.max_prompt_length or sampling.max_completion_length, or set the reward's too_long: "
                "keep_end to read the end only"
            )
        return row[-self.max_length :]
