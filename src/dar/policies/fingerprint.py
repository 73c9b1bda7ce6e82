"""What weights are these: a digest that a resumed run compares."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the weights; of a model with an adapter, of those that stay."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not (hasattr(model, "disable_adapter") and parameter.requires_grad):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
