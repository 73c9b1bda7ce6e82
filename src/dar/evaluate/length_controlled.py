"""The length-controlled win rate of AlpacaEval 2: what a judge would say if both completions were of one length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from dar.errors import DataError
from dar.evaluate.judgements import JudgedPair
from dar.record.intervals import Interval, bootstrap
from dar.run.difficulty import Array, Difficulty, GamedRows

STRENGTHS = np.logspace(-4, 4, 10)
"""Inverse regularization strengths tried, as scikit-learn and so AlpacaEval choose them; the first of equals wins."""
NUM_FOLDS = 5
GAMED_WEIGHT = 0.1
"""Weight of a row of a gamed baseline: AlpacaEval's λ = 0.2, shared by its two gamed baselines."""
_SMALLEST = 1e-9
"""The solver drops rows of weight 0, and stumbles where that leaves one class alone."""


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate, in percent.

    bootstrap, standard_error: judged pairs resampled, the regression fitted again with the same `strength`.
    lc_standard_error: AlpacaEval's column of that name, the spread of the predictions over instructions / √N: 0 without
        difficulties, and no measure of how sure the win rate is.
    theta, phi, psi: coefficients of the model, of length (of tanh of baseline less model, so negative where longer
        wins) and of difficulty; None where the term was left out.
    strength: inverse regularization strength C, chosen by cross-validation.
    has_gamed_rows: judgements of gamed baselines were part of the fit.
    """

    win_rate: float
    bootstrap: Interval
    standard_error: float
    lc_standard_error: float
    theta: float
    phi: float | None
    psi: float | None
    strength: float
    has_gamed_rows: bool


def length_controlled(
    pairs: Sequence[JudgedPair], difficulty: Difficulty | None, *, resamples: int, seed: int
) -> LengthControlled:
    """AlpacaEval 2's length-controlled win rate.

        q(model ≻ baseline | x) = σ(θ + φ · tanh(Δ/s) + ψ · γ_x),   LC = 100 · mean_x σ(θ + ψ · γ_x)

    Δ is the baseline's length less the model's in characters, s its standard deviation over all pairs (with N − 1). The
    fit is logistic regression on preferences as probabilities without an intercept and with an L1 penalty, the strength
    chosen among ten by log-loss over five folds. Without difficulties the last term is left out, which is AlpacaEval's
    `length_controlled_minimal`; where Δ is the same for all pairs, so is the length term. The mean is over all pairs,
    those whose judgement failed included.

    Args:
        pairs: of one model and one baseline.
        difficulty: of the instructions, or None.
        resamples, seed: of the bootstrap.

    Raises:
        DataError: fewer than five pairs were judged, or an instruction has no difficulty.

    Dubois et al. 2024, arXiv:2404.04475, §3; standardization, penalty, folds and weights as in `glm_winrate.py` of
    alpaca_eval 0.6.6.
    """
    design = _Design.of(pairs, difficulty)
    judged = design.take(np.flatnonzero(~np.isnan(design.preferences)))
    if len(judged.preferences) < NUM_FOLDS:
        raise DataError(
            f"a length-controlled win rate needs at least {NUM_FOLDS} judged pairs, found {len(judged.preferences)}"
        )
    rows = judged.training_rows()
    strength = _best_strength(rows)
    coefficients = _fit(rows, strength)
    predicted = design.predictions(coefficients)

    def again(drawn: NDArray[np.intp]) -> float:
        sample = judged.take(drawn)
        return float(sample.predictions(_fit(sample.training_rows(), strength)).mean())

    interval, error = bootstrap(again, len(judged.preferences), resamples=resamples, seed=seed)
    return LengthControlled(
        win_rate=100 * float(predicted.mean()),
        bootstrap=interval.scaled(100),
        standard_error=100 * error,
        lc_standard_error=100 * float(predicted.std(ddof=1)) / math.sqrt(len(predicted)),
        theta=float(coefficients[-1]),
        phi=float(coefficients[0]) if design.scaled.any() else None,
        psi=None if judged.difficulties is None else float(coefficients[1]),
        strength=strength,
        has_gamed_rows=judged.gamed is not None,
    )


class _Rows(NamedTuple):
    """features [R, F], preferences [R] in [0, 1], weights [R] of a regression."""

    features: Array
    preferences: Array
    weights: Array

    def take(self, chosen: NDArray[np.intp]) -> _Rows:
        return _Rows(*(part[chosen] for part in self))


@dataclass(frozen=True)
class _Design:
    """What the regression knows of N pairs.

    scaled: [N] length differences, baseline less model, over their standard deviation; 0 where all are equal, as their
        effect cannot be told from the model's then.
    preferences: [N], NaN where the judgement failed.
    difficulties: [N] or None.
    gamed: rows of gamed baselines, or None.
    """

    scaled: Array
    preferences: Array
    difficulties: Array | None
    gamed: GamedRows | None

    @classmethod
    def of(cls, pairs: Sequence[JudgedPair], difficulty: Difficulty | None) -> _Design:
        differences = np.array([pair.one.baseline_length - pair.one.model_length for pair in pairs], dtype=np.float64)
        return cls(
            scaled=differences / differences.std(ddof=1) if np.ptp(differences) > 0 else np.zeros(len(pairs)),
            preferences=np.array([math.nan if pair.preference is None else pair.preference for pair in pairs]),
            difficulties=None if difficulty is None else difficulty.of([pair.one.pair for pair in pairs]),
            gamed=None if difficulty is None else difficulty.gamed,
        )

    def take(self, rows: NDArray[np.intp]) -> _Design:
        difficulties = None if self.difficulties is None else self.difficulties[rows]
        return _Design(self.scaled[rows], self.preferences[rows], difficulties, self.gamed)

    def training_rows(self) -> _Rows:
        number = len(self.scaled)
        own = _Rows(_features(self.scaled, self.difficulties, np.ones(number)), self.preferences, np.ones(number))
        if self.gamed is None:
            return own
        number = len(self.gamed.preferences)
        features = _features(self.gamed.standardized_differences, self.gamed.difficulties, np.zeros(number))
        gamed = _Rows(features, self.gamed.preferences, np.full(number, GAMED_WEIGHT))
        return _Rows(*(np.concatenate(parts) for parts in zip(gamed, own, strict=True)))

    def predictions(self, coefficients: Array) -> Array:
        """[N] σ at no difference in length."""
        number = len(self.scaled)
        return expit(_features(np.zeros(number), self.difficulties, np.ones(number)) @ coefficients)


def _features(scaled: Array, difficulties: Array | None, model: Array) -> Array:
    return np.stack([np.tanh(scaled), *([] if difficulties is None else [difficulties]), model], axis=1)


def _best_strength(rows: _Rows) -> float:
    """The strength with the least log-loss, averaged over folds of whole rows."""
    number = len(rows.preferences)
    folds = list(GroupKFold(NUM_FOLDS).split(rows.features, groups=np.arange(number)))
    losses = [
        np.mean([_log_loss(rows.take(test), _fit(rows.take(train), strength)) for train, test in folds])
        for strength in STRENGTHS
    ]
    return float(STRENGTHS[int(np.argmin(losses))])


def _fit(rows: _Rows, strength: float) -> Array:
    """[F] coefficients: min Σ_i w_i · crossentropy(p_i, σ(x_i·c)) + ‖c‖₁ / C.

    A row with preference p is given as a win of weight p and a loss of weight 1 − p, which is the same.
    """
    number = len(rows.preferences)
    preferences = np.clip(rows.preferences, _SMALLEST, 1 - _SMALLEST)
    model = LogisticRegression(
        l1_ratio=1.0, C=strength, solver="liblinear", fit_intercept=False, random_state=123, max_iter=10_000, tol=1e-7
    )
    model.fit(
        np.concatenate([rows.features, rows.features]),
        np.repeat([1, 0], number),
        sample_weight=np.concatenate([rows.weights * preferences, rows.weights * (1 - preferences)]),
    )
    return model.coef_[0]


def _log_loss(rows: _Rows, coefficients: Array) -> float:
    predicted = np.clip(expit(rows.features @ coefficients), 1e-15, 1 - 1e-15)
    entropies = rows.preferences * np.log(predicted) + (1 - rows.preferences) * np.log(1 - predicted)
    return -float(np.mean(rows.weights * entropies))
