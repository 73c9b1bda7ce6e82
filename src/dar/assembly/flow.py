"""What a run of a flow-matching model is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dar.algorithms.base import Algorithm
from dar.assembly.engine import build_engine
from dar.config.engine import InProcessSpec
from dar.config.flow import FlowModelSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.policies.flow.labels import Labels
from dar.policies.flow.loading import image_shape, load_flow, num_classes
from dar.policies.flow.policy import FlowPolicy
from dar.policies.flow.sde import build_sde
from dar.policies.precision import Precision
from dar.rollout.flow.engine import FlowEngine
from dar.rollout.protocol import Engine


class FlowParts:
    """As `dar.assembly.text.TextParts`. Raises ConfigError where the model cannot be loaded."""

    offered = ("images",)
    context = None

    def __init__(self, spec: RunSpec, model: FlowModelSpec) -> None:
        self.spec, self.source = spec, model
        if model.pretrain and not Path(model.path).expanduser().exists():
            raise ConfigError(f"there is no {model.path} yet: dar flow-pretrain with this recipe makes it")
        self.bare = load_flow(model)
        self.vocabulary = num_classes(self.bare.config)
        self.tokenizer: Any = Labels(self.vocabulary)
        self.read = self.tokenizer.read
        self.max_completion_length = model.sde.steps

    def require(self, algorithm: Algorithm) -> None:
        if algorithm.needs_logits or algorithm.needs_values:
            what = "logits of tokens" if algorithm.needs_logits else "a critic"
            raise ConfigError(f"{self.spec.algorithm.type} reads {what}, and a flow-matching policy has none")

    def engine(self) -> Engine:
        asked = self.spec.engine
        if not isinstance(asked, InProcessSpec):
            return build_engine(asked)
        return FlowEngine(max_rows=self.spec.runtime.max_tokens_per_microbatch)

    def build(self, precision: Precision, *, with_reference: bool) -> FlowPolicy:
        reference = load_flow(self.spec.reference) if self.spec.reference and with_reference else None
        shapes = [(image_shape(each.config), num_classes(each.config)) for each in (reference, self.bare) if each]
        if len(set(shapes)) > 1:
            raise ConfigError(f"the reference has images and classes {shapes[0]}, and the policy {shapes[1]}")
        return FlowPolicy(
            self.bare,
            build_sde(self.source.sde, precision.device),
            precision,
            reduction=self.source.sde.logprob,
            reference=reference,
            with_reference=with_reference,
        )

    def constraint(self) -> None:
        """There is none."""
