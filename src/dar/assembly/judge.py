"""A judge from its spec."""

from __future__ import annotations

import os

from dar.config.judge import JudgeEndpointSpec
from dar.config.rewards import JudgeRewardSpec
from dar.errors import ConfigError, require_package
from dar.files.paths import cache_root, expanded
from dar.judge import (
    Budget,
    Client,
    Counts,
    Endpoint,
    Judge,
    Price,
    ReplyCache,
    Scale,
    ScoreReward,
    WinsReward,
    load_template,
)

_MIN_SCORE_MASS = 0.1


def build_judge(spec: JudgeRewardSpec) -> Judge:
    """The judge of a reward, or of an evaluation; nothing is sent yet.

    Raises:
        ConfigError: the key's environment variable is not set, the template cannot be used, or the cache's folder
            cannot be made.
    """
    require_package("httpx2", "a judge")
    low, high = spec.scale or (1, 10)
    price = None if spec.price is None else Price(spec.price.prompt, spec.price.completion)
    client = Client(
        build_endpoint(spec.endpoint),
        Budget(max_requests=spec.budget.requests, max_tokens=spec.budget.tokens),
        Counts(price),
    )
    return Judge(
        client,
        load_template(spec.template, spec.mode),
        cache=None if spec.cache is None else ReplyCache(cache_root() / expanded(spec.cache)),
        scale=Scale(low, high),
        min_mass=_MIN_SCORE_MASS if spec.min_score_mass is None else spec.min_score_mass,
    )


def build_judge_reward(spec: JudgeRewardSpec) -> ScoreReward | WinsReward:
    """The reward function of a `judge` reward.

    Raises:
        ConfigError: as `build_judge`.
    """
    judge = build_judge(spec)
    if spec.mode == "pointwise":
        return ScoreReward(judge, spec.rubric_column)
    return WinsReward(judge, spec.opponents or "all", spec.rubric_column)


def build_endpoint(spec: JudgeEndpointSpec) -> Endpoint:
    """The endpoint with the key that the environment holds.

    Raises:
        ConfigError: it holds none under that name.
    """
    key = None
    if spec.api_key_env is not None and not (key := os.environ.get(spec.api_key_env)):
        raise ConfigError(
            f"the judge's key is to come from the environment variable {spec.api_key_env}, which is not set: export "
            "it, or remove api_key_env for a server that wants no key"
        )
    settings = spec.model_dump(exclude={"api_key_env"})
    return Endpoint(api_key=key, **settings)
