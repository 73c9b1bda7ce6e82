"""What a run of a flow-matching model is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dar.algorithms.base import Algorithm
from dar.assembly.engine import build_engine
from dar.config.engine import InProcessSpec
from dar.config.flow import FlowModelSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.policies.flow.loading import Labels, image_shape, load_flow, num_classes
from dar.policies.flow.policy import FlowPolicy
from dar.policies.flow.sde import build_sde
from dar.policies.precision import Precision
from dar.rollout.flow import FlowEngine
from dar.rollout.protocol import Engine


class FlowParts:
    """As `dar.assembly.text.TextParts`. Raises ConfigError where the model cannot be loaded."""

    offered = ("images",)
    context = None

    def __init__(self, spec: RunSpec, model: FlowModelSpec) -> None:
        self.spec, self.source = spec, model
        self.bare = load_flow(model)
        self.vocabulary = num_classes(self.bare)
        self.tokenizer: Any = Labels(self.vocabulary)
        self.read = self.tokenizer.read
        self.max_completion_length = model.sde.steps

    def require(self, algorithm: Algorithm) -> None:
        if algorithm.needs_logits or algorithm.needs_values or algorithm.needs_probabilities:
            read = "logits, probabilities or a critic"
            raise ConfigError(f"{self.spec.algorithm.type} reads {read}, which no flow-matching policy has")

    def engine(self, say: Callable[[str], None]) -> Engine:
        if isinstance(self.spec.engine, InProcessSpec):
            return FlowEngine(max_rows=self.spec.runtime.max_tokens_per_microbatch)
        return build_engine(self.spec.engine, say=say)

    def build(self, precision: Precision, *, with_reference: bool) -> FlowPolicy:
        reference = load_flow(self.spec.reference) if self.spec.reference and with_reference else None
        shapes = [(image_shape(each), num_classes(each)) for each in (reference or self.bare, self.bare)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"the reference has images and classes {shapes[0]}, and the policy {shapes[1]}")
        sde = build_sde(self.source.sde, precision.device)
        return FlowPolicy(self.bare, sde, precision, self.source.sde.logprob, reference, with_reference=with_reference)

    def ranks(self) -> None:
        """It has no adapters."""

    def constraint(self) -> None:
        """There is none."""
