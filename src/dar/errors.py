"""One root for every error `dar` raises on purpose.

Each kind is also the standard-library kind a caller would have caught without knowing `dar`, so `except ValueError`
keeps working around a bad configuration. The command line prints these as one paragraph and exits with code 2.
"""

from __future__ import annotations

import importlib.util

from dar.shown import visible

EXTRAS = {
    **dict.fromkeys(("httpx2", "sklearn"), "judge"),
    "diffusers": "flow",
    **dict.fromkeys(("matplotlib", "plotly"), "report"),
    **dict.fromkeys(("math_verify", "langdetect", "jsonschema"), "verify"),
    **dict.fromkeys(("stable_baselines3", "gymnasium", "mujoco"), "control"),
    "reasoning_gym": "reasoning-gym",
    "vaderSentiment": "sentiment",
    "gguf": "gguf",
    "bitsandbytes": "bitsandbytes",
    "ray": "ray",
    "trl": "trl",
    "verl": "verl",
    "lm_eval": "lm-eval",
}
"""Packages that not everybody needs, with the extra that brings them."""

_LONGEST = 8_000
"""Characters of a message: it may quote files and answers of any size."""


class DarError(Exception):
    """Root of the errors `dar` raises on purpose: the message says what, where, and what to do.

    Whatever a message quotes is made harmless here, so that no place that raises has to.
    """

    is_elsewhere: bool | None = None
    """Whether another rank shows this error, or this one shows it for all; None where every rank may have met it."""

    def __init__(self, message: object = "") -> None:
        text = visible(str(message))
        super().__init__(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


class ConfigError(DarError, ValueError):
    """A recipe, an argument or a model reference that cannot be run as written."""


class DataError(DarError, ValueError):
    """A data file or row that cannot be used."""


class RewardError(DarError, RuntimeError):
    """A reward function raised, or returned something that is not one finite number per completion."""


class BudgetError(RewardError):
    """What may be spent on a reward is spent."""


class RolloutError(DarError, RuntimeError):
    """Sampling failed, or the sampler's log-probabilities disagree with the trainer's."""


class NonFiniteError(DarError, ArithmeticError):
    """A loss, a gradient or a statistic is NaN or infinite."""


class RankError(DarError, RuntimeError):
    """Another rank of the run has ended, or not answered in time."""


class ClusterError(DarError, RuntimeError):
    """Processes of a run on a cluster have died, and none is there in their place."""


class CheckpointError(DarError, OSError):
    """A run folder or checkpoint cannot be written, read or continued."""


def require_package(name: str, what: str) -> None:
    """Raises ConfigError with the command that installs it where a package of an extra is missing.

    Args:
        name: of the package, as it is imported.
        what: needs it, for the message.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{what} needs the package {name}: pip install 'dar-rlhf[{EXTRAS[name]}]'")
