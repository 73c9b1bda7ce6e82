"""Rewards of digits as scikit-learn has them (8×8, 1,797 handwritten ones): two to train on, of which one can be gamed,
and one to measure with, a classifier that has seen other digits and looks at them in another way.

Functions to be named in a recipe (`dar.rewards.digits:legibility`), whose prompts are "0" to "9".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dar.errors import RewardError, require_package

Array = NDArray[np.float64]


def legibility(prompts: Sequence[str], images: Tensor) -> list[float]:
    """The probability of the label under a logistic regression on the pixels of every other digit of the data."""
    return _probabilities("pixels", prompts, images)


def held_out_legibility(prompts: Sequence[str], images: Tensor) -> list[float]:
    """The probability of the label under a random forest that has seen the other half, as strokes: slopes of the image
    and sums over its rows and columns, each image scaled to the same ink."""
    return _probabilities("strokes", prompts, images)


def ink(images: Tensor) -> list[float]:
    """The mean brightness of the pixels, in [0, 1]. No digit is better for it."""
    return (_pixels(images).mean(1) / 16).tolist()


def _probabilities(kind: Literal["pixels", "strokes"], prompts: Sequence[str], images: Tensor) -> list[float]:
    found = _classifier(kind).predict_proba(_seen(kind, _pixels(images)))
    return found[np.arange(len(found)), [int(prompt) for prompt in prompts]].tolist()


def _pixels(images: Tensor) -> Array:
    """[B, 64] in [0, 16], as in the data. Raises RewardError where they are no digits."""
    if images.shape[1:] != (1, 8, 8):
        shape = "×".join(map(str, images.shape[1:]))
        raise RewardError(f"the rewards of digits read images of 1×8×8, and these are of {shape}")
    return (images.flatten(1).double().numpy() * 8 + 8).clip(0, 16)


def _seen(kind: str, pixels: Array) -> Array:
    """What a classifier looks at."""
    if kind == "pixels":
        return pixels
    grid = (pixels / np.maximum(pixels.mean(1, keepdims=True), 0.5)).reshape(-1, 8, 8)
    parts = (np.diff(grid, axis=1), np.diff(grid, axis=2), grid.sum(1), grid.sum(2))
    return np.concatenate([part.reshape(len(grid), -1) for part in parts], 1)


@cache
def _classifier(kind: Literal["pixels", "strokes"]) -> Any:
    require_package("sklearn", "the rewards of digits")
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra
    from sklearn.ensemble import RandomForestClassifier  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    data: Any = load_digits()
    first = int(kind == "strokes")
    model = RandomForestClassifier(300, random_state=1) if first else LogisticRegression(max_iter=1000)
    return make_pipeline(StandardScaler(), model).fit(_seen(kind, data.data[first::2]), data.target[first::2])
