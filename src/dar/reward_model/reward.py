"""A reward model's scores as a reward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dar.batch import Message
from dar.config.model_reward import CalibrationSpec, ModelRewardSpec
from dar.config.rewards import AnyReward
from dar.config.run import ComputeSpec
from dar.errors import RewardError
from dar.policies.precision import Precision, resolve_precision
from dar.policies.text.loading import context_length, load_tokenizer
from dar.policies.text.rendering import render
from dar.reward_model.classifier import freeze_in, load_classifier, load_classifier_config
from dar.reward_model.score_model import ScoreModel, TokenRow
from dar.rewards import Reward


class Calibrated:
    """Scores with another zero and another unit.

    r = (score − shift) / scale
    """

    shift, scale = 0.0, 1.0

    def calibrate(self, scores: Sequence[float], *, with_scale: bool) -> None:
        """Takes the mean of these scores for 0, and (`with_scale`) their sample standard deviation for 1.

        Raises:
            RewardError: they are all the same, so there is no scale to be had.
        """
        self.shift, self.scale = fmean(scores), 1.0
        if with_scale:
            self.scale = stdev(scores) if len(scores) > 1 else 0.0
            if not self.scale > 0:
                raise RewardError(
                    f"the reward model gives all {len(scores)} completions of the initial policy the same score, so "
                    "there is nothing to scale by: set calibrate.scale: false, or take more prompts"
                )

    def calibrated(self, score: float) -> float:
        return (score - self.shift) / self.scale


class ModelReward(Calibrated):
    """Scores completions with a sequence classifier, under its own tokenizer and chat template.

    Args:
        module: the classifier, frozen.
        tokenizer: its own.
        precision: device and compute precision.
        spec: of the reward.
        context: most tokens the model reads, or None where it does not say.
    """

    def __init__(
        self, module: ScoreModel, tokenizer: Any, precision: Precision, spec: ModelRewardSpec, context: int | None
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.precision = precision
        self.spec = spec
        self.max_length = min(filter(None, (spec.max_length, context)), default=None)

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
        found = self.module.score(units, self.precision, max_tokens=self.spec.max_tokens_per_batch)
        return [self.calibrated(score) for scores in found for score in scores]

    def _row(self, prompt: str | list[Message], completion: str | list[Message]) -> TokenRow:
        row = render(self.tokenizer, prompt, completion)
        if self.max_length is None or len(row) <= self.max_length:
            return row
        if self.spec.too_long == "refuse":
            raise RewardError(
                f"a conversation has {len(row)} tokens for the reward model, which reads at most {self.max_length}: "
                "lower data.max_prompt_length or sampling.max_completion_length, or set the reward's too_long: "
                "keep_end to read the end only"
            )
        return row[-self.max_length :]


def check_model_reward(spec: ModelRewardSpec, runtime: ComputeSpec) -> None:
    """Raises as `build_model_reward`, without loading any weights."""
    _precision(spec, runtime)
    load_classifier_config(spec.model)
    load_tokenizer(spec.model)


class Classifier(NamedTuple):
    """A sequence classifier given as an object, and its tokenizer, or None for the one it came with."""

    model: Any
    tokenizer: Any | None


def build_model_reward(spec: ModelRewardSpec, runtime: ComputeSpec, given: Classifier | None = None) -> ModelReward:
    """The reward model, loaded and frozen.

    Args:
        spec: the reward.
        runtime: the policy's, where the spec says nothing else.
        given: an object to use instead of loading; it is moved to the device and frozen itself.

    Raises:
        ConfigError: it cannot be loaded, is no classifier with one output, or the device does not exist.
    """
    precision = _precision(spec, runtime)
    context = context_length(load_classifier_config(spec.model) if given is None else given.model.config)
    tokenizer = (given and given.tokenizer) or load_tokenizer(spec.model)
    model = load_classifier(spec.model) if given is None else given.model.float().requires_grad_(False)
    module = ScoreModel(model)  # it looks at how the model makes its scores, before layers are of two precisions
    freeze_in(model, precision)
    return ModelReward(module, tokenizer, precision, spec, context)


def calibrated(
    specs: Sequence[AnyReward], rewards: Sequence[Reward], *, prefix: str = ""
) -> dict[str, tuple[Any, CalibrationSpec]]:
    """The reward models among some rewards that are to be calibrated, by name."""
    return {
        f"{prefix}{reward.name}": (reward.function, spec.calibrate)
        for spec, reward in zip(specs, rewards, strict=True)
        if isinstance(spec, ModelRewardSpec) and spec.calibrate and isinstance(reward.function, Calibrated)
    }


def _precision(spec: ModelRewardSpec, runtime: ComputeSpec) -> Precision:
    return resolve_precision(ComputeSpec(device=spec.device or runtime.device, precision=spec.precision))
