"""Policies: where models come from, how their log-probabilities are computed, how they are saved."""

from dar.policy.logprobs import LogprobModel
from dar.policy.policy import Policy

__all__ = ["LogprobModel", "Policy"]
