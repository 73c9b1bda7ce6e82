"""DAR's settings beside TRL's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ValidationError
from trl.trainer.grpo_config import GRPOConfig

from dar.config.problems import explain, in_one_message
from dar.config.regression import DARSpec
from dar.errors import ConfigError

_OURS = {"beta": "dar_beta", "updates": "num_iterations"}  # fields of `DARSpec` that have another name here

_NO_RATIO = "DAR's loss has no ratio to clip or mask; `w_clip` bounds its weights"
_OTHER_LOSS = "it belongs to another loss than DAR's"
_SCALED = "`normalize` and `baseline` say how DAR makes advantages"
_OTHER_SAMPLES = "DAR learns from the policy's own samples, and these would be of another distribution"
_TRUNCATING = ("top_p", "top_k", "min_p", "repetition_penalty")
_REFUSED = {
    "beta": "it is the coefficient of GRPO's KL penalty; DAR's total KL weight is `dar_beta`, and `alpha` the share of "
    "it that goes to the initial model",
    **dict.fromkeys(("loss_type", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"), _OTHER_LOSS),
    **dict.fromkeys(("scale_rewards", "multi_objective_aggregation"), _SCALED),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "importance_sampling_level"), _NO_RATIO),
    **dict.fromkeys(("off_policy_mask_threshold", "use_bias_correction_kl"), _NO_RATIO),
    **dict.fromkeys(_TRUNCATING, _OTHER_SAMPLES),
    "normalize_weights": "TRL may tear a prompt's completions apart, into micro-batches of their own",
    "disable_dropout": "under dropout the policy that sampled would be another one at every look",
}
"""Settings of TRL's with which the update would not be DAR's, each with the reason."""


@dataclass
class DARConfig(GRPOConfig):
    """TRL's `GRPOConfig` with DAR's settings, which are those of `DARSpec` and are checked by it.

    Settings with which the update would not be DAR's are refused where they are not at their default.

    alpha: share of the regularisation that goes to the initial model π₀, in [0, 1]; the rest goes to π_t, the policy
        that sampled. With 0 no π₀ is loaded.
    dar_beta: total KL weight, in reward units (batch standard deviations, when normalised) per nat, > 0; or
        `{"target_kl": nats}` or `{"target_ess": share}`, which has it chosen for each generation batch.
    w_clip: upper bound of the weights; `math.inf` turns clipping off.
    baseline: `group_mean` or `leave_one_out`.
    normalize: `batch` divides advantages by their standard deviation over the generation batch, `none` leaves them.
    weight_scale: `none`, `clip` or `mean`: what weights are divided by.
    center_weights: subtract the weights' mean over the generation batch; with one iteration only.

    `num_iterations` is what `DARSpec` calls `updates`, and `beta` is TRL's own and stays 0.

    Raises (when constructed):
        ConfigError: all that is impossible or would not be DAR, in one message.
    """

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "dar_beta"]

    alpha: float = DARSpec().alpha
    # A parser of command lines takes the type in the middle for that of the argument.
    dar_beta: dict[str, float] | float | str = 0.05
    w_clip: float = DARSpec().w_clip
    baseline: Literal["group_mean", "leave_one_out"] = DARSpec().baseline
    normalize: Literal["batch", "none"] = DARSpec().normalize
    weight_scale: Literal["none", "clip", "mean"] = DARSpec().weight_scale
    normalize_weights: Literal["none", "group"] = DARSpec().normalize_weights
    center_weights: bool = DARSpec().center_weights
    disable_dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}={getattr(self, name)!r}: leave it out; {reason}"
            for name, reason in _REFUSED.items()
            if getattr(self, name) != type(self).__dataclass_fields__[name].default
        ]
        if truncating := [name for name in _TRUNCATING if name in (self.generation_kwargs or {})]:
            problems.append(f"generation_kwargs: leave {', '.join(truncating)} out; {_OTHER_SAMPLES}")
        if self.baseline == "leave_one_out" and self.num_generations_eval == 1:
            problems.append("num_generations_eval=1: with baseline='leave_one_out' it must be at least 2")
        if self.center_weights and self.mask_truncated_completions:
            problems.append("mask_truncated_completions=True: center_weights would then push down endings as such")
        try:
            beta = self.spec.beta
            # What trackers and checkpoints write down is plain numbers and mappings.
            self.dar_beta = beta if isinstance(beta, float | int) else beta.model_dump()
        except ValidationError as error:
            lines = explain(error, self._settings())
            problems += [re.sub(r"^(beta|updates)\b", lambda name: _OURS[name[0]], line) for line in lines]
        if problems:
            raise ConfigError(in_one_message(type(self).__name__, problems))

    @property
    def spec(self) -> DARSpec:
        """The method that these settings describe."""
        return DARSpec.model_validate(self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, _OURS.get(name, name)) for name in DARSpec.model_fields if name != "type"}
