"""Decoder layers compiled by torch's compiler: what lies between two matrix products becomes one loop.

Normalisation, rotary embeddings, gates, residuals and casts are a dozen operators a layer, each of which reads and
writes all tokens' states. Compiled, they are one pass, and what the backward pass needs of them is computed again
instead of kept. All layers of a class share the code, whatever the number of tokens. Attention over the packed layout
stays as it is (`dar.policies.text.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dar.errors import ConfigError


@contextmanager
def compiled_layers(module: nn.Module) -> Iterator[None]:
    """Inside, forward and backward passes of the transformers layers in a module run compiled.

    The first pass compiles: most of a minute, then kept on disk by torch for the next process.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            # An instance attribute hides the class's method until it is deleted again.
            setattr(layer, "forward", MethodType(_compiled(type(layer)), layer))  # noqa: B010 - pyright knows a method
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@cache
def _compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    """One compiled forward for all layers of a class."""
    return torch.compile(kind.forward, dynamic=True)


def require_compiler(device: torch.device) -> None:
    """Compiles a sum, so that a machine that cannot compile says so before anything is loaded.

    Raises:
        ConfigError: it could not be compiled for this device.
    """

    def add(left: Tensor, right: Tensor) -> Tensor:
        return left + right

    try:
        torch.compile(add, dynamic=True)(torch.ones(3, device=device), torch.ones(3, device=device))
    except Exception as error:  # each backend of torch's compiler has exceptions of its own, without a common root
        message = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"runtime.compile_layers: torch.compile does not work here ({type(error).__name__}: {message}). On a CPU "
            "it needs a C++ compiler: install g++, or name one in the environment variable CXX; or leave "
            "runtime.compile_layers out."
        ) from error
