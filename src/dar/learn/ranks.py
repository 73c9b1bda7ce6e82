"""What ranks share: every rank samples and scores its own prompts, then all see the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dar.batch import Experience, Rollouts, TokenGroups
from dar.errors import DarError
from dar.rewards import RewardTable, join_tables


@dataclass(frozen=True)
class Scored:
    """Rollouts with rewards, reference log-probabilities and a critic's values, of one rank or of all."""

    rollouts: Rollouts
    rewards: RewardTable
    ref_logprobs: Tensor | None
    values: Tensor | None = None

    @property
    def experience(self) -> Experience:
        return Experience(
            groups=self.rollouts.groups,
            old_logprobs=self.rollouts.logprobs,
            ref_logprobs=self.ref_logprobs,
            rewards=self.rewards.total,
            has_eos=self.rollouts.has_eos,
            values=self.values,
            labels=self.rewards.parts,
        )


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Raises on every rank the error that one of them met, so that none waits for what will not come.

    Raises:
        DarError: its own of each rank that has one, on the others the first of them by rank.
    """
    own: DarError | None = None
    try:
        yield
    except DarError as error:
        own = error
    if accelerator.num_processes > 1:
        found: list[DarError | None] = gather_object([None if own is None else type(own)(str(own))])
        own = own or next((error for error in found if error is not None), None)
    if own is not None:
        raise own


def gather_scored(accelerator: Accelerator, own: Scored) -> Scored:
    """The global batch, on every rank, in rank order. One process: the batch itself."""
    if accelerator.num_processes == 1:
        return own
    return concatenate(gather_object([own]))


def concatenate(parts: Sequence[Scored]) -> Scored:
    """Several batches as one, padded to the longest completion."""
    width = max(part.rollouts.groups.mask.shape[1] for part in parts)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    rollouts = [part.rollouts for part in parts]
    groups = TokenGroups(
        prompt_ids=tuple(ids for rollout in rollouts for ids in rollout.groups.prompt_ids),
        group_sizes=tuple(size for rollout in rollouts for size in rollout.groups.group_sizes),
        completion_ids=joined([rollout.groups.completion_ids for rollout in rollouts]),
        mask=joined([rollout.groups.mask for rollout in rollouts]),
    )
    values = [part.values for part in parts if part.values is not None]
    references = [part.ref_logprobs for part in parts if part.ref_logprobs is not None]
    return Scored(
        rollouts=Rollouts(
            prompts=tuple(prompt for rollout in rollouts for prompt in rollout.prompts),
            groups=groups,
            texts=tuple(text for rollout in rollouts for text in rollout.texts),
            logprobs=joined([rollout.logprobs for rollout in rollouts]),
            finish_reasons=tuple(reason for rollout in rollouts for reason in rollout.finish_reasons),
            versions=tuple(version for rollout in rollouts for version in rollout.versions),
        ),
        rewards=join_tables([part.rewards for part in parts]),
        ref_logprobs=joined(references) if references else None,
        values=joined(values) if values else None,
    )


def own_groups(num_groups: int, accelerator: Accelerator) -> tuple[int, int]:
    """(start, stop) of this rank's groups in the global batch; every rank has equally many."""
    share = num_groups // accelerator.num_processes
    return accelerator.process_index * share, (accelerator.process_index + 1) * share
