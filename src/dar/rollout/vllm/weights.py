"""A policy's weights as files that a vLLM server reads."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dar.errors import ConfigError, RolloutError
from dar.policies.text.logprobs import unwrapped
from dar.policies.text.policy import Policy
from dar.rollout.completions import Completions

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True, eq=False)
class Weights:
    """A policy at one moment, and what it samples with. Its folder is gone when nobody needs it any more.

    name: no other weights have it. version: as the engine was given it.
    folder: a model's, or an adapter's. base: of the adapter, the model's, else the same.
    max_rank: that there must be room for in an adapter; 0 of a model.
    """

    name: str
    version: int
    folder: Path
    base: Path
    max_rank: int
    dtype: str
    completions: Completions
    eos_token_ids: tuple[int, ...]
    temperature: float


def taken(policy: Policy, version: int, name: str, folder: Path, base: Path | None) -> Weights:
    """The policy's present weights, in a folder of that name in `folder`; called by all ranks. `base` has that of an
    adapter, where it is written already.

    Raises:
        ConfigError: vLLM cannot sample with such weights.
        RolloutError: there is no room for them.
    """
    own, dtype, max_rank = folder / name, policy.precision.dtype, 0
    try:
        with policy.sampler() as module:
            if policy.is_lora:
                config = module.model.active_peft_config
                rank = max([getattr(config, "r", 0), *getattr(config, "rank_pattern", {}).values()])
                max_rank = next((room for room in _RANKS if 0 < rank <= room), 0)
                if not max_rank:
                    raise ConfigError(f"vLLM samples with LoRA adapters of a rank up to {_RANKS[-1]}: use in_process")
                module.model.save_pretrained(own, save_embedding_layers=False)
            base = (
                base
                if base and max_rank
                else _write(unwrapped(module.model), folder / "base" if max_rank else own, dtype)
            )
    except OSError as error:
        shutil.rmtree(own, ignore_errors=True)
        raise RolloutError(
            f"the weights cannot be handed to the vLLM server through {folder}: {error}. Name a folder with room for "
            "two copies of them: engine.folder"
        ) from error
    found = Weights(name, version, own, base, max_rank, str(dtype).removeprefix("torch."),
                    Completions(policy.tokenizer), policy.eos_token_ids, policy.module.temperature)  # fmt: skip
    weakref.finalize(found, shutil.rmtree, own, ignore_errors=True)
    return found


def _write(model: Any, folder: Path, dtype: torch.dtype) -> Path:
    """A transformers model as it saves itself, in the precision it samples in, without the adapters in it."""
    state: dict[str, torch.Tensor] = {}
    same: dict[int, torch.Tensor] = {}  # tied weights stay one
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            raise ConfigError(f"vLLM is given weights that are plain numbers, and {name} is packed: use in_process")
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = same.setdefault(tensor.data_ptr(), tensor.to(dtype))
    model.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
    return folder
