"""Rewards: functions that turn completions into numbers, and the set of them a run maximises.

A reward function is called by keyword with `prompts`, `completions`, `completion_ids`, `finish_reasons` and every other
column of the data — as many of these as its signature names, or all of them if it takes `**kwargs` — and returns one
number per completion, or `None` where it does not apply. It may be `async`.
"""

from dar.rewards.combine import Reward, RewardSet, RewardTable
from dar.rewards.function import RewardFunction, load_function

__all__ = ["Reward", "RewardFunction", "RewardSet", "RewardTable", "load_function"]
