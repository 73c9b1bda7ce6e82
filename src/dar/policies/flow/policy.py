"""A flow-matching policy with its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dar.batch import TokenGroups, TokenOutputs
from dar.policies.base import ModelPolicy
from dar.policies.flow.logprobs import FlowLogprobs
from dar.policies.flow.sde import SDE
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.saving import save_model


class FlowPolicy(ModelPolicy[FlowLogprobs]):
    """The trainable velocity model and its π₀. There is no critic, and no logits."""

    def __init__(
        self,
        model: Any,
        sde: SDE,
        precision: Precision,
        *,
        reduction: Literal["mean", "sum"],
        reference: Any | None = None,
        with_reference: bool = True,
    ) -> None:
        module = FlowLogprobs(model.to(precision.device).eval(), sde, reduction=reduction)
        super().__init__(module, precision, reference=reference, with_reference=with_reference)

    def _frozen(self, model: Any) -> FlowLogprobs:
        model = model.to(self.precision.device).requires_grad_(False).eval()
        return FlowLogprobs(model, self.module.sde, reduction=self.module.reduction)

    @contextlib.contextmanager
    def training(self, *, compiled: bool = False) -> Iterator[None]:
        # Stays in eval(): diffusers' label embeddings drop labels at random while training, and a log-probability
        # under another label than the sample's would be no ratio.
        yield

    def outputs(self, groups: TokenGroups, wants: Wants) -> TokenOutputs:
        with self.precision.compute():
            return self.trained(groups)

    def values(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        raise ValueError("a flow policy has no critic")

    def write(self, module: FlowLogprobs, folder: Path, *, card: str, notes: Mapping[str, str] | None) -> None:
        save_model(module.model, None, folder, card=card, notes=notes)
