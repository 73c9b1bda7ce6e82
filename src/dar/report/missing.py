"""What the page of another trainer's run cannot show, and why."""

from __future__ import annotations

from dar.report.kinds import RecordedRun

_NEEDS = {
    "Held-out figures": "eval/", "Intervals": "heldout", "Reward": "reward", "Drift from π₀": "kl/ref",
    "Size of each update": "kl/old_k3", "Length": "completions/mean_length", "Entropy": "entropy",
    "Proxy and gold": "eval/gold", "Weights": "weights/ess_fraction", "Time": "step_time", "Completions": "completions",
    "Drift per token": "tokens",
}  # fmt: skip
"""What each part of the page is made of: a metric, or what its reader calls it."""


def missing(run: RecordedRun) -> dict[str, str]:
    """By the part of the page that is not there: why, as far as the format says it."""
    had = {key for row in run.steps for key in row} | {f"eval/{key}" for row in run.evaluations for key in row}
    had |= {"eval/"} if run.evaluations else set()
    if run.completions:
        had |= {"completions", *run.completions[-1].read(["tokens"]).column_names}
    had |= {"heldout" for file in run.completions if file.is_heldout}
    lacking = {title: need for title, need in _NEEDS.items() if not {need, f"eval/{need}"} & had}
    return {title: run.reasons.get(title, f"Nothing of it was recorded ({need}).") for title, need in lacking.items()}
