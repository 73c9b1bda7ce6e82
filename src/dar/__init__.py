"""dar: align a language model online, and know what the run did.

The faces: `DARTrainer` and `Trainer` (Python), `dar train` (command line). The maths: `dar.advantages`,
`dar.objectives`, `dar.ops`.
"""

from typing import TYPE_CHECKING, Any

from dar.config import DARSpec, GRPOSpec, RLOOSpec, RunSpec
from dar.errors import (
    CheckpointError,
    ConfigError,
    DarError,
    DataError,
    NonFiniteError,
    RewardError,
    RolloutError,
)

if TYPE_CHECKING:
    from dar.train.recorder import Callback
    from dar.trainer import DARConfig, DARTrainer, Trainer, TrainingConfig

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "DARConfig",
    "DARSpec",
    "DARTrainer",
    "DarError",
    "DataError",
    "GRPOSpec",
    "NonFiniteError",
    "RLOOSpec",
    "RewardError",
    "RolloutError",
    "RunSpec",
    "Trainer",
    "TrainingConfig",
]


def __getattr__(name: str) -> Any:
    """The trainers on first use: importing torch takes seconds, which `dar --help` need not wait for."""
    if name in ("Callback", "DARConfig", "DARTrainer", "Trainer", "TrainingConfig"):
        from dar import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'dar' has no attribute '{name}'")
