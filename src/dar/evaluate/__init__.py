"""Evaluation: what held-out prompts say about a policy."""

from dar.evaluate.heldout import HeldoutEvaluation, HeldoutResult

__all__ = ["HeldoutEvaluation", "HeldoutResult"]
