"""A flow-matching policy with its reference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dar.batch import TokenGroups, TokenOutputs
from dar.policies.fingerprint import fingerprint
from dar.policies.flow.loading import save_flow
from dar.policies.flow.logprobs import FlowLogprobs
from dar.policies.flow.sde import SDE
from dar.policies.flow.trajectories import Trajectories
from dar.policies.precision import Precision
from dar.policies.protocol import Wants


class FlowPolicy:
    """The trainable velocity model and π₀, a frozen copy of it or a model of its own.

    The methods are those of `dar.policies.protocol.Policy`. There is no critic.
    """

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
        self.precision = precision
        self.module = FlowLogprobs(model.to(precision.device).eval(), sde, reduction=reduction)
        self.trained: nn.Module = self.module
        self.reference_fingerprint = fingerprint(model if reference is None else reference)
        self.has_own_reference = reference is None
        self.has_reference = with_reference
        self._reference: FlowLogprobs | None = None
        if with_reference:
            frozen = copy.deepcopy(model) if reference is None else reference.to(precision.device)
            self._reference = FlowLogprobs(frozen.requires_grad_(False).eval(), sde, reduction=reduction)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def training(self, *, compiled: bool = False) -> Iterator[None]:
        # Stays in eval(): diffusers' label embeddings drop labels at random while training, and a log-probability
        # under another label than the sample's would be no ratio.
        yield

    def outputs(self, groups: TokenGroups, wants: Wants) -> TokenOutputs:
        with self.precision.compute():
            return self.trained(groups)

    @torch.no_grad()
    def logprobs(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        return self._in_parts(self.module, groups, max_tokens)

    @torch.no_grad()
    def ref_logprobs(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        if self._reference is None:
            raise ValueError("this policy was built without a reference model")
        return self._in_parts(self._reference, groups, max_tokens)

    def values(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        raise ValueError("a flow policy has no critic")

    def _in_parts(self, module: FlowLogprobs, groups: TokenGroups, max_tokens: int) -> Tensor:
        assert isinstance(groups, Trajectories)
        result = torch.zeros(groups.mask.shape, dtype=torch.float32)
        for rows in groups.split(max_tokens):
            with self.precision.compute():
                result[rows] = module(groups.select(rows)).logprobs.cpu()
        return result

    @torch.no_grad()
    def sync_reference(self, mix: float) -> None:
        assert self._reference is not None
        for ours, theirs in zip(self._reference.parameters(), self.module.parameters(), strict=True):
            ours.lerp_(theirs, mix)

    def reference_state(self) -> dict[str, Tensor]:
        assert self._reference is not None
        return {name: parameter.detach() for name, parameter in self._reference.model.named_parameters()}

    @torch.no_grad()
    def restore_reference(self, state: Mapping[str, Tensor]) -> None:
        assert self._reference is not None
        for name, parameter in self._reference.model.named_parameters():
            parameter.copy_(state[name])

    def save(self, folder: Path, *, card: str, notes: Mapping[str, str] | None = None) -> None:
        save_flow(self.module.model, folder, card=card, notes=notes)
