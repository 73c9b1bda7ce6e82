"""Rewards: functions that turn completions into numbers, and the set of them a run maximises.

A reward function is called by keyword with `prompts`, `completions`, `completion_ids`, `finish_reasons` and every other
column of the data — as many of these as its signature names, or all of them if it takes `**kwargs` — and returns one
number per completion, `None` where it does not apply, or `Failed(reason)` where there is no score to be had. It may be
`async`, and then runs while the reference log-probabilities are computed.
"""

from dar.rewards.combine import Reward, RewardSet, Scoring
from dar.rewards.function import RewardFunction, RewardValue, check_signature, load_function
from dar.rewards.group import group_reward
from dar.rewards.oracle import Oracle, ask_oracle
from dar.rewards.table import RewardTable, join_tables
from dar.sandbox.score import Failed

__all__ = [
    "Failed",
    "Oracle",
    "Reward",
    "RewardFunction",
    "RewardSet",
    "RewardTable",
    "RewardValue",
    "Scoring",
    "ask_oracle",
    "check_signature",
    "group_reward",
    "join_tables",
    "load_function",
]
