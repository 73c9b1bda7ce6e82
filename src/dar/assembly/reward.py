"""Which family a reward's spec is of."""

from __future__ import annotations

from dar.config.model_reward import ModelRewardSpec
from dar.config.rewards import AnyReward, FunctionRewardSpec, JudgeRewardSpec, reward_name
from dar.config.run import ComputeSpec
from dar.config.verifiable import VerifiableReward
from dar.judge import build_judge_reward
from dar.reward_model.reward import build_model_reward, check_model_reward
from dar.rewards import Reward, RewardFunction, builtin, load_function, verifiable


def check_reward(spec: AnyReward, runtime: ComputeSpec) -> None:
    """Raises as `build_reward`, without loading the weights of a reward model."""
    if isinstance(spec, ModelRewardSpec):
        check_model_reward(spec, runtime)
    else:
        build_reward(spec, {}, runtime)


def build_reward(spec: AnyReward, functions: dict[str, RewardFunction], runtime: ComputeSpec) -> Reward:
    """A reward of a recipe; a function given as an object is found by its reward's name.

    Args:
        spec: the reward.
        functions: given as objects.
        runtime: the policy's, where a reward model says nothing else.

    Raises:
        ConfigError: the function cannot be imported, a package it needs is missing, or a reward model cannot be used.
    """
    name = reward_name(spec)
    if isinstance(spec, FunctionRewardSpec):
        function = functions[name] if name in functions else load_function(spec.function)
    elif isinstance(spec, VerifiableReward):
        function = verifiable.build(spec)
    elif isinstance(spec, JudgeRewardSpec):
        function = build_judge_reward(spec)
    elif isinstance(spec, ModelRewardSpec):
        function = build_model_reward(spec, runtime)
    else:
        function = builtin.build(spec)
    return Reward(name, function, spec)
