"""Earlier batches that are trained on again, and how they are kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

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
        "prompt_ids": torch.tensor([token for ids in groups.prompt_ids for token in ids]),
        "prompt_lengths": torch.tensor([len(ids) for ids in groups.prompt_ids]),
        "group_sizes": torch.tensor(groups.group_sizes),
        "completion_ids": groups.completion_ids.contiguous(),
        "mask": groups.mask.contiguous(),
        "old_logprobs": batch.old_logprobs.contiguous(),
        "advantages": batch.advantages.contiguous(),
        "weights": batch.weights.contiguous(),
        "denominator": torch.tensor(batch.denominator, dtype=torch.float64),
    }
    if batch.ref_logprobs is not None:
        found["ref_logprobs"] = batch.ref_logprobs.contiguous()
    # A copy: a quantity may be the very tensor another field holds, which safetensors refuses to write.
    return found | {f"tokens.{name}": values.contiguous().clone() for name, values in batch.tokens.items()}


def _batch(tensors: Mapping[str, Tensor]) -> Weighted:
    prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
    return Weighted(
        groups=TokenGroups(
            prompt_ids=tuple(tuple(ids.tolist()) for ids in prompts),
            group_sizes=tuple(tensors["group_sizes"].tolist()),
            completion_ids=tensors["completion_ids"],
            mask=tensors["mask"],
        ),
        old_logprobs=tensors["old_logprobs"],
        ref_logprobs=tensors.get("ref_logprobs"),
        advantages=tensors["advantages"],
        weights=tensors["weights"],
        denominator=float(tensors["denominator"]),
        tokens={name.removeprefix("tokens."): values for name, values in tensors.items() if name.startswith("tokens.")},
    )
