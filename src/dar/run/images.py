"""Statistics of sampled images."""

from __future__ import annotations

from dar.batch import Rollouts


def image_metrics(rollouts: Rollouts) -> dict[str, float]:
    """How bright images are and how far those of a prompt are from each other: near 0 they have become one.

    `images/group_distance` is the root mean square difference of a pixel between two images of a prompt, left out
    where each has one.
    """
    assert rollouts.images is not None
    groups = rollouts.images.double().flatten(1).unflatten(0, (-1, rollouts.num_generations))
    metrics = {"images/brightness": float(groups.mean())}
    if rollouts.num_generations > 1:
        # Of two values drawn without replacement the squared difference is on average twice the variance.
        metrics["images/group_distance"] = float((2 * groups.var(1)).mean().sqrt())
    return metrics
