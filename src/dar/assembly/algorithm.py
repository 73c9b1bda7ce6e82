"""Which class an algorithm's spec stands for, and whether the rest of the recipe fits it."""

from __future__ import annotations

from dar.algorithms.actor_critic import PPO, DualPPO
from dar.algorithms.base import Algorithm
from dar.algorithms.logits import LCO
from dar.algorithms.policy_gradient import BAPO, BNPO, DAO, DAPO, GRPO, GSPO, R2VPO, RLOO, DrGRPO
from dar.algorithms.preference import offline_preference, online_preference
from dar.algorithms.realignment import TRACE
from dar.algorithms.regression import DAR, SFT, VAR, BestOfN, awr
from dar.assembly.before import Before
from dar.assembly.realignment import Realignment
from dar.config.actor_critic import DualPPOSpec, PPOSpec
from dar.config.alerts import KLAlertSpec
from dar.config.algorithms import AnyAlgorithm
from dar.config.policy_gradient import (
    BAPOSpec,
    BNPOSpec,
    DAOSpec,
    DAPOSpec,
    DrGRPOSpec,
    GRPOSpec,
    GSPOSpec,
    LCOSpec,
    R2VPOSpec,
    RLOOSpec,
)
from dar.config.preference import ChiPOSpec, DPOSpec, IPOSpec, OnlineDPOSpec, OnlineIPOSpec, OnlineSLiCSpec, SLiCSpec
from dar.config.realignment import TRACESpec
from dar.config.regression import AWRSpec, BestOfNSpec, DARSpec, SFTSpec, VARSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError


def build_algorithm(spec: AnyAlgorithm, *, max_completion_length: int) -> Algorithm:
    """The method a recipe names."""
    match spec:
        case DARSpec():
            return DAR(spec)
        case AWRSpec():
            return awr(spec)
        case BestOfNSpec():
            return BestOfN(spec)
        case DAOSpec():
            return DAO(spec)
        case PPOSpec():
            return PPO(spec)
        case DualPPOSpec():
            return DualPPO(spec)
        case RLOOSpec():
            return RLOO(spec)
        case GRPOSpec():
            return GRPO(spec)
        case BNPOSpec():
            return BNPO(spec)
        case DAPOSpec():
            return DAPO(spec, max_completion_length=max_completion_length)
        case DrGRPOSpec():
            return DrGRPO(spec, max_completion_length=max_completion_length)
        case GSPOSpec():
            return GSPO(spec)
        case BAPOSpec():
            return BAPO(spec)
        case R2VPOSpec():
            return R2VPO(spec)
        case LCOSpec():
            return LCO(spec)
        case OnlineDPOSpec() | OnlineIPOSpec() | OnlineSLiCSpec():
            return online_preference(spec)
        case SFTSpec():
            return SFT()
        case DPOSpec() | IPOSpec() | SLiCSpec() | ChiPOSpec():
            return offline_preference(spec)
        case VARSpec():
            return VAR(spec)
        case TRACESpec():
            return TRACE(spec)


def build_before(spec: RunSpec) -> Before:
    """What the method does before its first step. Raises ConfigError where a function cannot be imported."""
    method = spec.algorithm
    return Realignment(spec, method) if isinstance(method, TRACESpec) else Before()


def reads_reference(spec: RunSpec, algorithm: Algorithm, *, has_heldout: bool) -> bool:
    """Whether anything reads π₀. Raises ConfigError where the recipe moves or watches one that nothing reads."""
    if algorithm.needs_reference:
        return True
    if spec.reference_sync is not None and not has_heldout:
        raise ConfigError(
            f"reference_sync moves π₀, but {spec.algorithm.type} as it is set does not read it, and no held-out "
            "evaluation does: remove reference_sync"
        )
    if any(isinstance(alert, KLAlertSpec) and alert.samples == "train" for alert in spec.alerts):
        raise ConfigError(
            f"the kl alert watches the training steps, but {spec.algorithm.type} as it is set does not read π₀ there: "
            "use samples: heldout"
        )
    return has_heldout
