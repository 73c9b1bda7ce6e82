"""Which function a reward's spec stands for."""

from __future__ import annotations

from dar.config.model_reward import ModelRewardSpec
from dar.config.rewards import (
    AnyReward,
    DiversityRewardSpec,
    FunctionRewardSpec,
    JudgeRewardSpec,
    LengthPenaltySpec,
    LengthRewardSpec,
    MissingEosPenaltySpec,
    PatternCountRewardSpec,
    RegexRewardSpec,
    SentimentRewardSpec,
    TokenCostSpec,
    reward_name,
)
from dar.config.run import ComputeSpec
from dar.config.verifiable import (
    FormatRewardSpec,
    IFEvalRewardSpec,
    JsonSchemaRewardSpec,
    MathRewardSpec,
    ReasoningGymRewardSpec,
    SandboxedRewardSpec,
    SandboxSpec,
)
from dar.judge import build_judge_reward
from dar.reward_model.build_reward import build_model_reward, check_model_reward
from dar.rewards import Reward, RewardFunction, builtin, load_function, verifiable
from dar.rewards.group import diversity
from dar.sandbox.sandbox import Limits


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
    match spec:
        case FunctionRewardSpec():
            function = functions[name] if name in functions else load_function(spec.function)
        case SentimentRewardSpec():
            function = builtin.sentiment()
        case LengthRewardSpec():
            function = builtin.length(spec.target)
        case PatternCountRewardSpec():
            function = builtin.pattern_count(spec.pattern)
        case RegexRewardSpec():
            function = builtin.regex(spec.pattern)
        case MissingEosPenaltySpec():
            function = builtin.missing_eos_penalty(spec.penalty)
        case JudgeRewardSpec():
            function = build_judge_reward(spec)
        case ModelRewardSpec():
            function = build_model_reward(spec, runtime)
        case LengthPenaltySpec():
            function = builtin.length_penalty(spec.max_length, spec.buffer)
        case TokenCostSpec():
            function = builtin.token_cost(spec.cost)
        case DiversityRewardSpec():
            function = diversity(spec.ngram)
        case FormatRewardSpec():
            function = verifiable.tag_format(spec.tags)
        case JsonSchemaRewardSpec():
            function = verifiable.json_schema(spec.path)
        case IFEvalRewardSpec():
            function = verifiable.ifeval(strictness=spec.strictness, credit=spec.credit)
        case MathRewardSpec():
            function = verifiable.math(spec.column, num_workers=spec.workers, limits=_limits(spec))
        case ReasoningGymRewardSpec():
            function = verifiable.reasoning_gym(num_workers=spec.workers, limits=_limits(spec))
        case SandboxedRewardSpec():
            function = verifiable.sandboxed(spec.function, num_workers=spec.workers, limits=_limits(spec))
    return Reward(
        name,
        function,
        spec.weight,
        spec.on_failure,
        spec.max_failed_share,
        clip=None if spec.clip is None else (spec.clip[0], spec.clip[1]),
        threshold=spec.threshold,
        standardize=spec.standardize,
    )


def _limits(spec: SandboxSpec) -> Limits:
    return Limits(timeout_seconds=spec.timeout_seconds, memory_gb=spec.memory_gb, max_processes=spec.max_processes)
