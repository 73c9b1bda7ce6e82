"""What all ranks do at once. Whatever one of them skips, the others wait for; with one process nothing happens.

A `DarError` is raised by every rank or by none (`failing_together`), so that after one all can still save together. Any
other exception is its rank's own: it ends that process, and the launcher ends the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dar.errors import DarError

Value = TypeVar("Value")


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Which of them this is, from 0, the main one."""
    return dist.get_rank() if num_ranks() > 1 else 0


def gathered(value: Value) -> list[Value]:
    """Everybody's value, in rank order; it is pickled on the way."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def failing_together() -> Iterator[None]:
    """Raises on every rank the error that one of them met, so that none waits for what will not come.

    Raises:
        DarError: the first by rank, on that rank; on the others the same, `is_elsewhere`.
    """
    own: DarError | None = None
    try:
        yield
    except DarError as error:
        own = error
    found = gathered(None if own is None or num_ranks() == 1 else type(own)(str(own)))
    first = next((rank for rank, error in enumerate(found) if error is not None), own_rank())
    if own is not None and first == own_rank():
        own.is_elsewhere = False
        raise own
    if (error := found[first]) is not None:
        error.is_elsewhere = True
        raise error from own


def from_main(make: Callable[[], Value]) -> Value:
    """What the main rank makes, on every rank. Raises its DarError on every rank."""
    found = None
    with failing_together():
        if own_rank() == 0:
            found = make()
    return gathered(found)[0]  # pyright: ignore[reportReturnType] - the main one's is made


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks may hold in parts; every rank asks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor is in this rank's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
