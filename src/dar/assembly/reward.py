"""Which family a reward's spec is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dar.config.model_reward import ModelRewardSpec
from dar.config.rewards import AnyReward, FunctionRewardSpec, JudgeRewardSpec, reward_name
from dar.config.run import ComputeSpec
from dar.config.verifiable import VerifiableReward
from dar.data.prompts import PromptSet
from dar.judge import build_judge_reward
from dar.reward_model.reward import Classifier, build_model_reward, check_model_reward
from dar.rewards import Reward, RewardFunction, builtin, check_signature, load_function, verifiable


def check_reward(spec: AnyReward, runtime: ComputeSpec) -> None:
    """Raises as `build_reward`, without loading the weights of a reward model."""
    if isinstance(spec, ModelRewardSpec):
        check_model_reward(spec, runtime)
    else:
        build_reward(spec, {}, runtime)


def check_calls(rewards: Sequence[Reward], prompts: PromptSet | None, offered: Sequence[str] = ()) -> None:
    """Raises ConfigError where a function needs what no batch has, no column of the prompts, and is not `offered`."""
    columns = {*offered, *(name for prompt in (prompts.prompts if prompts else ()) for name in prompt.columns)}
    for reward in rewards if prompts is not None else ():
        if isinstance(reward.spec, FunctionRewardSpec):
            check_signature(reward.function, reward.name, columns)


def build_reward(spec: AnyReward, given: Mapping[str, RewardFunction | Classifier], runtime: ComputeSpec) -> Reward:
    """A reward of a recipe; a function or classifier given as an object is found by its reward's name.

    Args:
        spec: the reward.
        given: as objects.
        runtime: the policy's, where a reward model says nothing else.

    Raises:
        ConfigError: the function cannot be imported, a package it needs is missing, or a reward model cannot be used.
    """
    name = reward_name(spec)
    function = given.get(name)
    if isinstance(function, Classifier):
        assert isinstance(spec, ModelRewardSpec)
        function = build_model_reward(spec, runtime, function)
    elif function is not None:
        pass
    elif isinstance(spec, FunctionRewardSpec):
        function = load_function(spec.function)
    elif isinstance(spec, VerifiableReward):
        function = verifiable.build(spec)
    elif isinstance(spec, JudgeRewardSpec):
        function = build_judge_reward(spec)
    elif isinstance(spec, ModelRewardSpec):
        function = build_model_reward(spec, runtime)
    else:
        function = builtin.build(spec)
    return Reward(name, function, spec)
