"""Rollouts: sampling completions from the current policy."""

from dar.rollout.engine import Engine, InProcessEngine, SamplingKey

__all__ = ["Engine", "InProcessEngine", "SamplingKey"]
