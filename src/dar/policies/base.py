"""What policies of every kind share: a module that gives log-probabilities, and the π₀ it is held against."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from dar.batch import TokenGroups
from dar.collective import failing_together, own_rank
from dar.policies.precision import Precision
from dar.policies.strategy import Replicated, Strategy, make_strategy

Module = TypeVar("Module", bound=nn.Module)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the weights; of a model with an adapter, of those that stay."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not (hasattr(model, "disable_adapter") and parameter.requires_grad):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ModelPolicy(ABC, Generic[Module]):
    """A trained module around a `model`, and its π₀: a model given explicitly, the policy's own base (LoRA), or a
    frozen copy. The methods are those of `dar.policies.protocol.Policy`."""

    is_lora: bool = False

    def __init__(self, module: Module, precision: Precision, *, reference: Any | None, with_reference: bool) -> None:
        self.module, self.precision = module, precision
        self.trained: nn.Module = module
        self.strategy: Strategy = Replicated()
        self.reference_fingerprint = fingerprint(self.model if reference is None else reference)
        self.has_own_reference, self.has_reference = reference is None, with_reference
        self._reference: Module | None = None
        if with_reference and (reference is not None or not self.is_lora):
            self._reference = self._frozen(copy.deepcopy(self.model) if reference is None else reference)

    @abstractmethod
    def _frozen(self, model: Any) -> Module:
        """A module around a π₀ of its own."""

    @abstractmethod
    def write(self, module: Module, folder: Path, *, card: str, notes: Mapping[str, str] | None) -> None:
        """Writes a module whose weights are whole. Raises as `save`."""

    @property
    def model(self) -> Any:
        """What is trained, as its library made it."""
        return self.module.model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def share(self, sharding: Literal["none", "full"]) -> None:
        self.strategy = make_strategy(sharding, self.precision.device)
        if self._reference is not None:
            self.strategy.wrap(self._reference)
        self.trained = self.strategy.wrap(self.module)

    def sampler(self) -> contextlib.AbstractContextManager[Module]:
        """The module to sample from, its weights whole; entered by all ranks."""
        return self.strategy.whole(self.module, self.precision.dtype)

    @torch.no_grad()
    def logprobs(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        return self._in_parts(self.module, groups, max_tokens)

    @torch.no_grad()
    def ref_logprobs(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        module = self._reference_module()
        with self._as_reference():
            return self._in_parts(module, groups, max_tokens)

    def _reference_module(self) -> Any:
        if not self.has_reference:
            raise ValueError("this policy was built without a reference model")
        return self._reference or self.module

    def _as_reference(self) -> contextlib.AbstractContextManager[None]:
        """Where π₀ is the policy's own base, the adapter is off inside."""
        return contextlib.nullcontext() if self._reference is not None else self.model.disable_adapter()

    def _in_parts(
        self, module: Module, groups: TokenGroups, max_tokens: int, what: str = "logprobs", **wanted: bool
    ) -> Tensor:
        result = torch.zeros(groups.mask.shape, dtype=torch.float32)
        portions = groups.split(max_tokens)
        for index in range(self.strategy.rounds(len(portions))):
            # A rank that is done goes through its last portion again with the others.
            rows = portions[min(index, len(portions) - 1)]
            part = groups.select(rows)
            with self.precision.compute():
                result[rows, : part.mask.shape[1]] = getattr(module(part, **wanted), what).cpu()
        return result

    @torch.no_grad()
    def sync_reference(self, mix: float) -> None:
        for ours, theirs in zip(self._reference_module().model.parameters(), self.model.parameters(), strict=True):
            ours.lerp_(theirs.to(ours.dtype), mix)

    def reference_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._reference_module().model.named_parameters()}

    @torch.no_grad()
    def restore_reference(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._reference_module().model.named_parameters():
            parameter.copy_(state[name])

    def save(self, folder: Path, *, card: str, notes: Mapping[str, str] | None = None) -> None:
        with self.strategy.whole(self.module, on="main") as module, failing_together():
            if own_rank() == 0:
                self.write(module, folder, card=card, notes=notes)
