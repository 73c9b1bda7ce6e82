"""Which class an algorithm's spec stands for, and whether the rest of the recipe fits it."""

from __future__ import annotations

from dar.algorithms import (
    BAPO,
    BNPO,
    DAO,
    DAPO,
    DAR,
    GRPO,
    GSPO,
    LCO,
    PPO,
    R2VPO,
    RLOO,
    SFT,
    TRACE,
    VAR,
    Algorithm,
    BestOfN,
    DrGRPO,
    DualPPO,
    awr,
    offline_preference,
    online_preference,
)
from dar.config import (
    AnyAlgorithm,
    AWRSpec,
    BAPOSpec,
    BestOfNSpec,
    BNPOSpec,
    ChiPOSpec,
    DAOSpec,
    DAPOSpec,
    DARSpec,
    DPOSpec,
    DrGRPOSpec,
    DualPPOSpec,
    GRPOSpec,
    GSPOSpec,
    IPOSpec,
    KLAlertSpec,
    LCOSpec,
    OnlineDPOSpec,
    OnlineIPOSpec,
    OnlineSLiCSpec,
    PPOSpec,
    R2VPOSpec,
    RLOOSpec,
    RunSpec,
    SFTSpec,
    SLiCSpec,
    TRACESpec,
    VARSpec,
)
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


def require_reference_is_read(spec: RunSpec, algorithm: Algorithm, *, has_heldout: bool) -> None:
    """Raises ConfigError where the recipe moves or watches a reference that nothing reads."""
    if algorithm.needs_reference:
        return
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
