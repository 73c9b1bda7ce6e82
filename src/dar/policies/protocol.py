"""What the rooms above may know of a policy, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

from dar.batch import TokenGroups, TokenOutputs
from dar.policies.precision import Precision
from dar.policies.strategy import Strategy


@dataclass(frozen=True)
class Wants:
    """What a pass is to say of sampled tokens beside their log-probabilities.

    logits: the tokens' own logits.
    values: the critic's values, where there is a critic.
    held: [B] bool, rows of which KL(π₀‖π_θ) of whole distributions is wanted, at least one; or None.
    """

    logits: bool = False
    values: bool = True
    held: Tensor | None = None


class Policy(Protocol):
    """A model that is trained, with what it is held against.

    With several ranks, every one of them makes every pass, saves and samples, or the others wait for it.

    trained: what computes with gradient, as the strategy has wrapped it.
    strategy: how ranks hold the weights.
    precision: of its passes.
    has_reference: there is a π₀ to ask. has_own_reference: it is the policy as it was before training.
    reference_fingerprint: SHA-256 of π₀'s weights, the identity a resumed run must find again.
    """

    trained: nn.Module
    strategy: Strategy
    precision: Precision
    has_reference: bool
    has_own_reference: bool
    reference_fingerprint: str

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, each shared tensor once."""
        ...

    def share(self, sharding: Literal["none", "full"]) -> None:
        """Has ranks hold the policy's and the reference's weights in this way, before an optimizer reads them; again
        where parameters were replaced, which only `none` allows."""
        ...

    def training(self, *, compiled: bool = False) -> AbstractContextManager[None]:
        """Inside, `outputs` are to be trained on; with `compiled`, by compiled layers."""
        ...

    def outputs(self, groups: TokenGroups, wants: Wants) -> TokenOutputs:
        """One pass with gradient over a micro-batch, on the policy's device."""
        ...

    def logprobs(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        """[B, T] fp32 nats under the current policy, on the CPU, without gradient."""
        ...

    def ref_logprobs(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        """[B, T] fp32 nats under π₀, on the CPU. Raises ValueError without one."""
        ...

    def values(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        """[B, T] fp32, the critic's V(s_t), on the CPU, without gradient. Raises ValueError without a critic."""
        ...

    def sync_reference(self, mix: float) -> None:
        """π₀ ← mix · π_θ + (1 − mix) · π₀, weight by weight."""
        ...

    def reference_state(self) -> dict[str, Tensor]:
        """The weights of a π₀ that moves, for a checkpoint."""
        ...

    def restore_reference(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `reference_state` gave."""
        ...

    def save(self, folder: Path, *, card: str, notes: Mapping[str, str] | None = None) -> None:
        """Writes the policy as a folder of its own, replaced if it exists; every rank calls, the main one writes.

        Raises:
            CheckpointError: the disk is full or not writable.
            NonFiniteError: a weight is NaN or infinite; a folder that is there stays.
        """
        ...
