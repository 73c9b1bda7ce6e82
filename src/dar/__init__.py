"""dar: align a language model online, and know what the run did.

The faces: `DARTrainer` and `Trainer` (Python), `dar train` (command line). The maths: `dar.advantages`,
`dar.objectives`, `dar.ops`.
"""

from typing import TYPE_CHECKING, Any

from dar.config.actor_critic import DualPPOSpec, PPOSpec
from dar.config.flow import FlowGRPOSpec, GRPOGuardSpec
from dar.config.logits import LCOSpec
from dar.config.policy_gradient import (
    BAPOSpec,
    BNPOSpec,
    CISPOSpec,
    DAOSpec,
    DAPOSpec,
    DistillSpec,
    DPPOSpec,
    DrGRPOSpec,
    GRPOSpec,
    GSPOSpec,
    MaxRLSpec,
    R2VPOSpec,
    RLOOSpec,
)
from dar.config.preference import ChiPOSpec, DPOSpec, IPOSpec, OnlineDPOSpec, OnlineIPOSpec, OnlineSLiCSpec, SLiCSpec
from dar.config.realignment import TRACESpec
from dar.config.regression import AWRSpec, BestOfNSpec, DARSpec, SFTSpec, TargetESSSpec, TargetKLSpec, TPOSpec, VARSpec
from dar.config.run import RunSpec
from dar.config.squared import AStarPOSpec, PMDMeanSpec, QRPOSpec
from dar.errors import (
    CheckpointError,
    ConfigError,
    DarError,
    DataError,
    NonFiniteError,
    RewardError,
    RolloutError,
)
from dar.reward_config import RewardConfig
from dar.training_config import DARConfig, TrainingConfig

if TYPE_CHECKING:
    from dar.algorithms.base import Algorithm
    from dar.reward_trainer import RewardTrainer
    from dar.run.recorder import Callback
    from dar.trainer import DARTrainer, Trainer

__version__ = "0.7.0"

__all__ = [
    "AStarPOSpec",
    "AWRSpec",
    "Algorithm",
    "BAPOSpec",
    "BNPOSpec",
    "BestOfNSpec",
    "CISPOSpec",
    "Callback",
    "CheckpointError",
    "ChiPOSpec",
    "ConfigError",
    "DAOSpec",
    "DAPOSpec",
    "DARConfig",
    "DARSpec",
    "DARTrainer",
    "DPOSpec",
    "DPPOSpec",
    "DarError",
    "DataError",
    "DistillSpec",
    "DrGRPOSpec",
    "DualPPOSpec",
    "FlowGRPOSpec",
    "GRPOGuardSpec",
    "GRPOSpec",
    "GSPOSpec",
    "IPOSpec",
    "LCOSpec",
    "MaxRLSpec",
    "NonFiniteError",
    "OnlineDPOSpec",
    "OnlineIPOSpec",
    "OnlineSLiCSpec",
    "PMDMeanSpec",
    "PPOSpec",
    "QRPOSpec",
    "R2VPOSpec",
    "RLOOSpec",
    "RewardConfig",
    "RewardError",
    "RewardTrainer",
    "RolloutError",
    "RunSpec",
    "SFTSpec",
    "SLiCSpec",
    "TPOSpec",
    "TRACESpec",
    "TargetESSSpec",
    "TargetKLSpec",
    "Trainer",
    "TrainingConfig",
    "VARSpec",
]


def __getattr__(name: str) -> Any:
    """The trainers on first use: importing torch takes seconds, which `dar --help` need not wait for."""
    if name in ("Algorithm", "Callback", "DARTrainer", "RewardTrainer", "Trainer"):
        from dar import reward_trainer, trainer

        return getattr(reward_trainer if name == "RewardTrainer" else trainer, name)
    raise AttributeError(f"module 'dar' has no attribute '{name}'")
