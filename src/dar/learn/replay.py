"""Earlier batches that are trained on again, and how they are kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dar.batch import TokenGroups, Weighted


class ReplayBuffer:
    """The newest `size` weighted batches, oldest first, as they were when they were new.

    Their `old_logprobs` stay those of the policy that sampled them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[Weighted] = []

    def add(self, batch: Weighted) -> None:
        """Keeps a batch, and forgets the oldest where there are too many."""
        self.batches = [*self.batches, batch][-self.size :] if self.size else []

    def state(self) -> dict[str, Tensor]:
        """All batches as tensors by name."""
        return {
            f"{index}.{name}": tensor
            for index, batch in enumerate(self.batches)
            for name, tensor in _tensors(batch).items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        count = 1 + max((int(name.partition(".")[0]) for name in state), default=-1)
        self.batches = [
            _batch({name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{index}.")})
            for index in range(count)
        ]


def _tensors(batch: Weighted) -> dict[str, Tensor]:
    groups = batch.groups
    found = {
        **vars(batch),
        "prompt_ids": torch.tensor([token for ids in groups.prompt_ids for token in ids]),
        "prompt_lengths": torch.tensor([len(ids) for ids in groups.prompt_ids]),
        "group_sizes": torch.tensor(groups.group_sizes),
        "denominator": torch.tensor(batch.denominator, dtype=torch.float64),
        **{f"groups.{name}": value for name, value in vars(groups).items()},
        **{f"labels.{name}": value for name, value in batch.labels.items()},
        **{f"tokens.{name}": value for name, value in batch.tokens.items()},
    }
    # Copies: a quantity may be the very tensor another field holds, which safetensors refuses to write.
    return {name: value.contiguous().clone() for name, value in found.items() if isinstance(value, Tensor)}


def _batch(tensors: Mapping[str, Tensor]) -> Weighted:
    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    own: dict[str, Any] = {"ref_logprobs": None} | {name: each for name, each in tensors.items() if "." not in name}
    prompts = own.pop("prompt_ids").split(own.pop("prompt_lengths").tolist())
    groups = TokenGroups(
        prompt_ids=tuple(tuple(ids.tolist()) for ids in prompts),
        group_sizes=tuple(own.pop("group_sizes").tolist()),
        **part("groups."),
    )
    denominator = float(own.pop("denominator"))
    return Weighted(**own, groups=groups, denominator=denominator, labels=part("labels."), tokens=part("tokens."))
