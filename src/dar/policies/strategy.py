"""How ranks hold the weights of one policy: each its own copy, or each a part of every tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from dar.collective import num_ranks, own_rank, whole_tensor
from dar.policies.text.frozen import is_linear

Module = TypeVar("Module", bound=nn.Module)


class Strategy(Protocol):
    """What trainer, policy and sampler ask of the way in which ranks hold weights.

    Checkpoints ask nothing: a weight that is held in parts is a `DTensor`, which says which part it is.
    """

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as this rank runs it, from now on; its backward pass leaves gradients averaged over ranks."""
        ...

    def rounds(self, own: int) -> int:
        """How many passes through a module every rank makes, when this one has `own` to make."""
        ...

    def whole(
        self, module: Module, dtype: torch.dtype | None = None, *, on: Literal["all", "main"] = "all"
    ) -> AbstractContextManager[Module]:
        """Gives the trained module with whole weights to read, outside of its forward pass; entered by all ranks.

        Args:
            module: what was given to `wrap`.
            dtype: in which linear layers may come, as they will be multiplied in it; None keeps everything as it is.
            on: the ranks that read it; the others get no weights.
        """
        ...


class Replicated:
    """Every rank has all weights (DDP); with one process, plainly the module."""

    def wrap(self, module: nn.Module) -> nn.Module:
        is_alone = num_ranks() == 1 or not any(parameter.requires_grad for parameter in module.parameters())
        return module if is_alone else DistributedDataParallel(module)

    def rounds(self, own: int) -> int:
        return own

    def whole(
        self, module: Module, dtype: torch.dtype | None = None, *, on: Literal["all", "main"] = "all"
    ) -> AbstractContextManager[Module]:
        return nullcontext(module)


class Sharded:
    """Every rank has a part of each weight, of its gradient and of its moments (FSDP2).

    A decoder layer's weights are whole while it computes, those of embedding, head and critic while the module does.
    """

    _replica: nn.Module

    def __init__(self, device: torch.device) -> None:
        self.mesh = init_device_mesh(device.type, (num_ranks(),))

    def wrap(self, module: nn.Module) -> nn.Module:
        if any(parameter.requires_grad for parameter in module.parameters()):
            empty = {id(each): nn.Parameter(each.detach().new_empty(0), False) for each in module.parameters()}
            self._replica = copy.deepcopy(module, dict[int, Any](empty))
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=self.mesh)
                layer.register_forward_hook(lambda *_: torch.clear_autocast_cache())  # else kept, whole, to the end
        fully_shard(module, mesh=self.mesh)
        module.register_forward_hook(_let_go)
        return module

    def rounds(self, own: int) -> int:
        most = torch.tensor(own, device=self.mesh.device_type)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    @contextmanager
    def whole(
        self, module: Module, dtype: torch.dtype | None = None, *, on: Literal["all", "main"] = "all"
    ) -> Iterator[Module]:
        replica: Any = self._replica
        is_product = set() if dtype is None else _weights_of_products(replica)
        try:
            with torch.no_grad():
                for part, full in zip(module.parameters(), replica.parameters(), strict=True):
                    tensor = whole_tensor(part.to(dtype) if id(full) in is_product else part)
                    if on == "all" or own_rank() == 0:
                        full.data = tensor
                    del tensor
            yield replica
        finally:
            for full in replica.parameters():
                full.data = full.data.new_empty(0)


def make_strategy(sharding: Literal["none", "full"], device: torch.device) -> Strategy:
    """How the ranks that there are hold weights."""
    return Sharded(device) if sharding == "full" and num_ranks() > 1 else Replicated()


def _let_go(module: nn.Module, *_: Any) -> None:
    """After a pass without gradient nothing more is read; after one with it, the backward pass lets go."""
    assert isinstance(module, FSDPModule)
    if not torch.is_grad_enabled():
        module.reshard()


def _weights_of_products(model: nn.Module) -> set[int]:
    """Weights and biases of which nothing is read but products: not those that an adapter is merged into first, or that
    are looked up, too."""
    others = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding | BaseTunerLayer)
              for parameter in module.parameters()}  # fmt: skip
    own = {id(parameter) for module in model.modules() if is_linear(module)
           for parameter in module.parameters()}  # fmt: skip
    return own - others
