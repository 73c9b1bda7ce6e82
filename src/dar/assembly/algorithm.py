"""Which method an algorithm's spec stands for, and whether the rest of the recipe fits it."""

from __future__ import annotations

from dar.algorithms import actor_critic, flow, logits, policy_gradient, preference, realignment, regression, squared
from dar.algorithms.base import Algorithm
from dar.assembly.before import Before
from dar.assembly.realignment import Realignment
from dar.config.actor_critic import AnyActorCritic
from dar.config.alerts import KLAlertSpec
from dar.config.algorithms import AnyAlgorithm, OwnAlgorithmSpec
from dar.config.flow import AnyFlow
from dar.config.logits import AnyLogits
from dar.config.policy_gradient import AnyPolicyGradient
from dar.config.preference import AnyPreference
from dar.config.realignment import TRACESpec
from dar.config.recipe import build_spec
from dar.config.regression import AnyRegression
from dar.config.run import RunSpec
from dar.config.squared import AnySquared
from dar.errors import ConfigError
from dar.rewards import load_function
from dar.rewards.foreign import ForeignCode


def build_algorithm(spec: AnyAlgorithm, *, max_completion_length: int) -> Algorithm:
    """The method a recipe names.

    Raises:
        ConfigError: a method of one's own cannot be imported, is none, or refuses its settings.
    """
    if isinstance(spec, OwnAlgorithmSpec):
        return _own(spec)
    if isinstance(spec, AnyFlow):  # whose specs are policy gradients', too
        return flow.FlowGRPO(spec)
    if isinstance(spec, AnyRegression):
        return regression.build(spec)
    if isinstance(spec, AnyPolicyGradient):
        return policy_gradient.build(spec, max_completion_length=max_completion_length)
    if isinstance(spec, AnySquared):
        return squared.SquaredRegression(spec)
    if isinstance(spec, AnyActorCritic):
        return actor_critic.build(spec)
    if isinstance(spec, AnyLogits):
        return logits.LCO(spec)
    if isinstance(spec, AnyPreference):
        return preference.build(spec)
    return realignment.TRACE(spec)


def _own(spec: OwnAlgorithmSpec) -> Algorithm:
    where = f"algorithm {spec.type}"
    found = load_function(spec.type, what="algorithm")
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(f"{where} is no subclass of dar.Algorithm")
    settings = build_spec(spec.settings, where=where, kind=found.Spec)
    with ForeignCode(lambda kind, said: ConfigError(f"{where} raised {kind} when it was made: {said}")):
        return found(settings)  # pyright: ignore[reportCallIssue] - made from a value of its Spec, as its base says


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
