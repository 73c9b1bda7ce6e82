"""The critic: V(s_t) of every sampled token, from the policy's own states or from a model of its own."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """A linear value head, starting at 0, and where it has its own the layers under it.

    Args:
        hidden_size: of the states.
        trunk: a causal language model whose decoder the critic trains for itself, or None to read the policy's states
            (the value loss then also reaches the policy's layers).
    """

    def __init__(self, hidden_size: int, trunk: Any | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[M, D] states → [M] fp32 values, in reward units."""
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)


def make_critic(model: Any, kind: Literal["head", "model"]) -> Critic:
    """A critic for a policy, before training: `model` copies the policy's layers (of an adapter, its base)."""
    hidden_size = model.config.get_text_config().hidden_size
    if kind == "head":
        return Critic(hidden_size, None)
    trunk = copy.deepcopy(model)
    if hasattr(trunk, "unload"):
        trunk = trunk.unload()
    trunk.float().requires_grad_(True)
    # The critic reads states, so the language-model head (where it is not the embedding itself) has nothing to learn.
    embedding, head = trunk.get_input_embeddings(), trunk.get_output_embeddings()
    if head.weight is not embedding.weight:
        head.requires_grad_(False)
    return Critic(hidden_size, trunk)
