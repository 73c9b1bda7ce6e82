"""A policy's weights as files that a vLLM server reads."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dar.errors import ConfigError
from dar.policies.text.logprobs import unwrapped
from dar.policies.text.policy import Policy
from dar.rollout.completions import Completions

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True, eq=False)
class Weights:
    """A policy's weights at one moment, in a folder of which no other has the name, gone when nobody needs it any more.

    version: as the engine was given it. folder: a model's, or an adapter's. base: of the adapter, the model's folder,
    else the same. max_rank: of an adapter, 0 of a model. completions: makes records of what is sampled.
    """

    policy: Policy
    version: int
    folder: Path
    base: Path
    max_rank: int
    completions: Completions

    @property
    def name(self) -> str:
        return self.folder.name


def taken(policy: Policy, version: int, folder: Path) -> Weights:
    """The policy's present weights; called by all ranks.

    Raises:
        ConfigError: vLLM cannot sample with such weights.
        OSError: there is no room for them.
    """
    max_rank, base = 0, folder
    with policy.sampler() as module:
        if policy.is_lora:
            config, base = module.model.active_peft_config, folder.with_name("base")
            rank = max([getattr(config, "r", 0), *getattr(config, "rank_pattern", {}).values()])
            if not (max_rank := next((room for room in _RANKS if 0 < rank <= room), 0)):
                raise ConfigError(f"vLLM samples with LoRA adapters of a rank up to {_RANKS[-1]}: use in_process")
            module.model.save_pretrained(folder, save_embedding_layers=False)
        if not base.exists():
            _write(unwrapped(module.model), base, policy.precision.dtype)
    found = Weights(policy, version, folder, base, max_rank, Completions(policy.tokenizer))
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


def _write(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """A transformers model as it saves itself, in the precision it samples in, without the adapters in it."""
    state: dict[str, torch.Tensor] = {}
    same: dict[int, torch.Tensor] = {}  # tied weights stay one
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            raise ConfigError(f"vLLM is given weights that are plain numbers, and {name} is packed: use in_process")
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = same.setdefault(tensor.data_ptr(), tensor.to(dtype))
    model.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
