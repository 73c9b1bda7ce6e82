"""What is compared: methods, each with its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dar.errors import ConfigError

_RATE = "optim.learning_rate"


@dataclass(frozen=True)
class Arm:
    """One method with its own settings.

    name: in the table.
    method: the algorithm's `type`; the recipe's own keeps the settings it has there, another has its defaults.
    overrides: of the recipe.
    learning_rate: one of several at which the method is tried; None where there is but one.
    """

    name: str
    method: str
    overrides: tuple[str, ...] = ()
    learning_rate: float | None = None

    @property
    def label(self) -> str:
        """Of its folders: the name, and the rate where several are tried."""
        return self.name if self.learning_rate is None else f"{self.name}-lr{self.learning_rate:g}"

    @property
    def changes(self) -> tuple[str, ...]:
        """All its overrides."""
        rate = () if self.learning_rate is None else (f"{_RATE}={self.learning_rate!r}",)
        return (*self.overrides, *rate)


def parse_arm(text: str) -> Arm:
    """`grpo`, or `grpo,optim.learning_rate=1e-5` with overrides, or `name:dar,algorithm.beta=0.5` under its own name.

    Raises:
        ConfigError: an override has no `=`.
    """
    head, *overrides = text.split(",")
    name, _, method = head.rpartition(":")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ConfigError(f"'{wrong[0]}' in '{text}' is no override: write key.path=value")
    return Arm(name or method, method, tuple(overrides))


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Methods from the command line: comma-separated names (`dar,grpo`), or one with overrides each.

    Raises:
        ConfigError: two share a name, or there is none.
    """
    arms: list[Arm] = []
    for text in texts:
        arms += (
            [parse_arm(text)] if "=" in text or ":" in text else [parse_arm(name) for name in text.split(",") if name]
        )
    names = [arm.name for arm in arms]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two methods are called {repeated[0]}: name them apart, as in {repeated[0]}_2:{repeated[0]},…"
        )
    if not arms:
        raise ConfigError("no method is named: --algorithms dar,grpo")
    return arms


def at_learning_rates(arms: Sequence[Arm], text: str) -> list[Arm]:
    """Every method at each of the comma-separated rates; one that sets its own stays at that.

    Raises:
        ConfigError: what stands between two commas is not a number, or stands there twice.
    """
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--learning-rates {text}: write numbers with commas between them, as in 2e-5,4e-5") from None
    # Rates that print alike would share a folder.
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ConfigError(f"--learning-rates {text}: a rate is named twice")
    found: list[Arm] = []
    for arm in arms:
        is_set = any(override.startswith(f"{_RATE}=") for override in arm.overrides)
        found += [arm] if is_set else [replace(arm, learning_rate=rate) for rate in rates]
    return found
