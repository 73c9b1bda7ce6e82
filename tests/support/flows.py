"""A flow-matching model of 4×4 images and three classes, and what a run of it says in place of a text model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.flow import FlowGRPOSpec

FLOW_METHODS = [name for name, spec in ALGORITHM_SPECS.items() if issubclass(spec, FlowGRPOSpec)]
ROWS = [{"prompt": str(label)} for label in (0, 1, 2, 1, 0)]


def make_flow(**changes: Any) -> Any:
    """The model, whose last layer is not 0 as diffusers begins with, so that classes and times matter."""
    torch.manual_seed(0)
    shape = {"in_channels": 1, "out_channels": 1, "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 3}
    size = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 1}
    model = DiTTransformer2DModel(**{**shape, **size, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def brightness(images: Tensor) -> list[float]:
    return images.flatten(1).mean(1).tolist()


def flow_recipe(folder: Path, **sde: Any) -> dict[str, Any]:
    """The keys that differ from a text model's run."""
    make_flow().save_pretrained(folder)
    model = {"type": "flow", "path": str(folder), "sde": {"steps": 3, **sde}}
    return {"model": model, "rewards": ["support.flows:brightness"], "sampling": {}}
