"""The specs of all algorithms, told apart by `type`, and what stands for a method of one's own."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Discriminator, Field, Tag

from dar.config.actor_critic import AnyActorCritic
from dar.config.algorithm import AlgorithmSpec
from dar.config.base import OwnSpec, by_type
from dar.config.flow import AnyFlow
from dar.config.logits import AnyLogits
from dar.config.policy_gradient import AnyPolicyGradient
from dar.config.preference import AnyPreference
from dar.config.realignment import AnyRealignment
from dar.config.regression import AnyRegression
from dar.config.squared import AnySquared


class OwnAlgorithmSpec(AlgorithmSpec, OwnSpec):
    """A method of your own: a subclass of `dar.Algorithm` by its import path. It learns from the policy's own samples.

    Every other key is a setting of the class's own `Spec`, which checks it.
    """


_OnRewards = AnyRegression | AnyPolicyGradient | AnySquared | AnyFlow | AnyActorCritic | AnyLogits
Known = _OnRewards | AnyPreference | AnyRealignment


def _whose(value: Any) -> str:
    """Which of the two a method is, by its type: an import path has a colon."""
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "own" if isinstance(name, str) and ":" in name else "known"


AnyAlgorithm = Annotated[
    Annotated[Annotated[Known, Field(discriminator="type")], Tag("known")] | Annotated[OwnAlgorithmSpec, Tag("own")],
    Discriminator(_whose),
    by_type("dar"),
]
ALGORITHM_SPECS: dict[str, type[AlgorithmSpec]] = {spec.model_fields["type"].default: spec for spec in get_args(Known)}
