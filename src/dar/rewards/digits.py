"""Rewards of digits as scikit-learn has them (8×8, 1,797 handwritten ones), for recipes whose prompts are "0" to "9":
two to train on, of which one can be gamed, and one to measure with, which has seen other digits in another way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from dar.errors import RewardError, require_package


def legibility(prompts: Sequence[str], images: Tensor, *, is_held_out: bool = False) -> list[float]:
    """The probability of the label under a logistic regression on the pixels of every other digit of the data."""
    found = _classifier(is_held_out).predict_proba(_pixels(images))
    return found[np.arange(len(found)), [int(prompt) for prompt in prompts]].tolist()


def held_out_legibility(prompts: Sequence[str], images: Tensor) -> list[float]:
    """The same under a random forest on the other half's slopes and sums over rows and columns, at equal ink."""
    return legibility(prompts, images, is_held_out=True)


def ink(images: Tensor) -> list[float]:
    """The mean brightness of the pixels, in [0, 1]. No digit is better for it."""
    return (_pixels(images).mean(1) / 16).tolist()


def _pixels(images: Tensor) -> Any:
    """[B, 64] in [0, 16], as in the data. Raises RewardError where they are no digits."""
    if images.shape[1:] != (1, 8, 8):
        raise RewardError(f"the rewards of digits read images [B, 1, 8, 8], and these are {list(images.shape)}")
    return (images.flatten(1).double().numpy() * 8 + 8).clip(0, 16)


def _strokes(pixels: Any) -> Any:
    grid = (pixels / np.maximum(pixels.mean(1, keepdims=True), 0.5)).reshape(-1, 8, 8)
    parts = (np.diff(grid, axis=1), np.diff(grid, axis=2), grid.sum(1), grid.sum(2))
    return np.concatenate([part.reshape(len(grid), -1) for part in parts], 1)


@cache
def _classifier(is_held_out: bool) -> Any:
    require_package("sklearn", "the rewards of digits")
    from sklearn import datasets, ensemble, linear_model, pipeline, preprocessing  # noqa: PLC0415 - an extra

    data: Any = datasets.load_digits()
    forest = (preprocessing.FunctionTransformer(_strokes), ensemble.RandomForestClassifier(300, random_state=1))
    logistic = (preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000))
    model = pipeline.make_pipeline(*(forest if is_held_out else logistic))
    return model.fit(data.data[int(is_held_out) :: 2], data.target[int(is_held_out) :: 2])
