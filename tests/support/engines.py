"""Engines with weights."""

from __future__ import annotations

from dar.policies.text.policy import Policy
from dar.rollout.in_process.engine import InProcessEngine


def engine_of(policy: Policy, *, max_tokens: int) -> InProcessEngine:
    """Samples with the policy's weights."""
    engine = InProcessEngine(max_tokens=max_tokens)
    engine.sync(policy, 0)
    return engine
