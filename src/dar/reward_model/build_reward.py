"""A reward model from its spec."""

from __future__ import annotations

from collections.abc import Sequence

from dar.config.model_reward import CalibrationSpec, ModelRewardSpec
from dar.config.rewards import AnyReward
from dar.config.run import ComputeSpec
from dar.policies.precision import Precision, resolve_precision
from dar.policies.text.loading import context_length, load_tokenizer
from dar.reward_model.classifier import freeze_in, load_classifier, load_classifier_config
from dar.reward_model.reward import ModelReward
from dar.reward_model.score_model import ScoreModel
from dar.rewards import Reward


def check_model_reward(spec: ModelRewardSpec, runtime: ComputeSpec) -> None:
    """Raises as `build_model_reward`, without loading any weights."""
    _precision(spec, runtime)
    load_classifier_config(spec.model)
    load_tokenizer(spec.model)


def build_model_reward(spec: ModelRewardSpec, runtime: ComputeSpec) -> ModelReward:
    """The reward model, loaded and frozen.

    Args:
        spec: the reward.
        runtime: the policy's, where the spec says nothing else.

    Raises:
        ConfigError: it cannot be loaded, is no classifier with one output, or the device does not exist.
    """
    precision = _precision(spec, runtime)
    context = context_length(load_classifier_config(spec.model))
    tokenizer = load_tokenizer(spec.model)
    module = ScoreModel(load_classifier(spec.model))
    freeze_in(module.model, precision)
    return ModelReward(
        module,
        tokenizer,
        precision,
        max_tokens=spec.max_tokens_per_batch,
        max_length=min(filter(None, (spec.max_length, context)), default=None),
        too_long=spec.too_long,
    )


def calibrated(
    specs: Sequence[AnyReward], rewards: Sequence[Reward], *, prefix: str = ""
) -> dict[str, tuple[ModelReward, CalibrationSpec]]:
    """The reward models among some rewards that are to be calibrated, by name."""
    return {
        f"{prefix}{reward.name}": (reward.function, spec.calibrate)
        for spec, reward in zip(specs, rewards, strict=True)
        if isinstance(spec, ModelRewardSpec) and spec.calibrate and isinstance(reward.function, ModelReward)
    }


def _precision(spec: ModelRewardSpec, runtime: ComputeSpec) -> Precision:
    return resolve_precision(ComputeSpec(device=spec.device or runtime.device, precision=spec.precision))
