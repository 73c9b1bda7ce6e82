"""What is compared: each method with the settings that stay, the one that holds it back, and three values of that."""

from __future__ import annotations

from typing import Any

STRENGTHS: dict[str, tuple[dict[str, Any], str, tuple[Any, ...]]] = {
    "dar": ({"type": "dar"}, "beta", (0.2, 0.5, 1.0)),
    "dar_group": ({"type": "dar", "normalize_weights": "group"}, "beta", (0.2, 0.5, 1.0)),
    "dar_centered": ({"type": "dar", "center_weights": True}, "beta", (0.2, 0.5, 1.0)),
    "dao": ({"type": "dao"}, "beta", (0.02, 0.05, 0.2)),
    "dual_ppo": ({"type": "dual_ppo"}, "beta", (0.02, 0.05, 0.2)),
    "grpo": ({"type": "grpo", "updates": 2}, "beta", (0.0, 0.04, 0.2)),
    "rloo": ({"type": "rloo"}, "beta", (0.0, 0.05, 0.2)),
    "online_dpo": ({"type": "online_dpo"}, "beta", (0.05, 0.1, 0.5)),
    "best_of_n": ({"type": "best_of_n"}, "num_generations", (4, 8, 16)),
    "tpo": ({"type": "tpo"}, "temperature", (0.5, 1.0, 2.0)),
    "pmd_mean": ({"type": "pmd_mean"}, "beta", (0.2, 0.5, 1.0)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"alpha_{alpha:g}": {"alpha": alpha} for alpha in (0.0, 0.3, 1.0)},
    **{f"beta_{beta:g}": {"beta": beta} for beta in (0.05, 2.0)},
    **{f"clip_{clip:g}": {"w_clip": clip} for clip in (1.0, float("inf"))},
    "adaptive_kl": {"beta": {"target_kl": 0.5}},
}
"""Of `dar` at its tuned settings, one thing changed."""
