"""The specs a recipe is made of: frozen, strict, and unable to say an impossible thing.

No torch in here: a recipe is checked in milliseconds, before anything is loaded. Every field's description is the
recipe reference (docs/recipes.md is generated from it).
"""

from dar.config.actor_critic import ActorCriticSpec, DualPPOSpec, PPOSpec
from dar.config.algorithm import AlgorithmSpec, ClipHigh, concrete_specs
from dar.config.algorithms import ALGORITHM_SPECS, AnyAlgorithm
from dar.config.base import Count, Fraction, NotNegative, Positive, Spec, unknown_key_message
from dar.config.data import DataSpec, SamplingSpec, SourceSpec
from dar.config.model import LoraSpec, ModelSourceSpec, ModelSpec, ReferenceSyncSpec
from dar.config.optim import AdafactorSpec, AdamWSpec, AnyOptim, NullSpaceSpec, OptimSpec
from dar.config.policy_gradient import (
    BAPOSpec,
    BNPOSpec,
    ClippedGroupSpec,
    DAOSpec,
    DAPOSpec,
    DrGRPOSpec,
    GRPOSpec,
    GSPOSpec,
    LCOSpec,
    R2VPOSpec,
    RLOOSpec,
)
from dar.config.preference import (
    ChiPOSpec,
    DPOSpec,
    IPOSpec,
    OnlineDPOSpec,
    OnlineIPOSpec,
    OnlineSLiCSpec,
    PairedSpec,
    SLiCSpec,
)
from dar.config.regression import AWRSpec, BestOfNSpec, Beta, DARSpec, SFTSpec, TargetESSSpec, TargetKLSpec, VARSpec
from dar.config.rewards import (
    AnyReward,
    FunctionRewardSpec,
    LengthRewardSpec,
    MissingEosPenaltySpec,
    PatternCountRewardSpec,
    PatternSpec,
    RegexRewardSpec,
    RewardSpec,
    SentimentRewardSpec,
    expand_reward,
    reward_name,
)
from dar.config.run import CheckpointSpec, EvaluationSpec, LoggingSpec, RunSpec, RuntimeSpec

__all__ = [
    "ALGORITHM_SPECS",
    "AWRSpec",
    "ActorCriticSpec",
    "AdafactorSpec",
    "AdamWSpec",
    "AlgorithmSpec",
    "AnyAlgorithm",
    "AnyOptim",
    "AnyReward",
    "BAPOSpec",
    "BNPOSpec",
    "BestOfNSpec",
    "Beta",
    "CheckpointSpec",
    "ChiPOSpec",
    "ClipHigh",
    "ClippedGroupSpec",
    "Count",
    "DAOSpec",
    "DAPOSpec",
    "DARSpec",
    "DPOSpec",
    "DataSpec",
    "DrGRPOSpec",
    "DualPPOSpec",
    "EvaluationSpec",
    "Fraction",
    "FunctionRewardSpec",
    "GRPOSpec",
    "GSPOSpec",
    "IPOSpec",
    "LCOSpec",
    "LengthRewardSpec",
    "LoggingSpec",
    "LoraSpec",
    "MissingEosPenaltySpec",
    "ModelSourceSpec",
    "ModelSpec",
    "NotNegative",
    "NullSpaceSpec",
    "OnlineDPOSpec",
    "OnlineIPOSpec",
    "OnlineSLiCSpec",
    "OptimSpec",
    "PPOSpec",
    "PairedSpec",
    "PatternCountRewardSpec",
    "PatternSpec",
    "Positive",
    "R2VPOSpec",
    "RLOOSpec",
    "ReferenceSyncSpec",
    "RegexRewardSpec",
    "RewardSpec",
    "RunSpec",
    "RuntimeSpec",
    "SFTSpec",
    "SLiCSpec",
    "SamplingSpec",
    "SentimentRewardSpec",
    "SourceSpec",
    "Spec",
    "TargetESSSpec",
    "TargetKLSpec",
    "VARSpec",
    "concrete_specs",
    "expand_reward",
    "reward_name",
    "unknown_key_message",
]
