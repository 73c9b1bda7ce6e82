"""What a vLLM server loads of this library, in an environment of its own: the draw, and a way for weights to come in.

    --logits-processors dar.rollout.vllm.plugin:Draws --logprobs-mode processed_logits
    --weight-transfer-config '{"backend": "dar"}'

Nothing else of the library runs there, so that environment needs no more than `pip install --no-deps dar-rlhf`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from dar import __version__
from dar.config.data import DecodingSpec
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import draw_constrained

NOT_FINITE = 1.0
"""Stands for the log-probability of a token whose logits are not finite: no true one is above 0, and NaN is no JSON."""


@dataclass(frozen=True)
class _Row:
    """A completion that is being sampled: how, its seeds by position, and its tokens so far (vLLM's own list)."""

    how: tuple[float, DecodingSpec, tuple[int, ...]]
    seeds: Tensor
    tokens: list[int]

    @classmethod
    def asked(cls, params: Any, tokens: list[int]) -> _Row | None:
        """What a request asks for, if it is one of ours. Raises ValueError where this is another version's."""
        asked = (params.extra_args or {}).get("dar")
        if asked is None:
            return None
        if asked.get("version") != __version__:
            raise ValueError(f"this server draws tokens with dar {__version__}")
        seeds = SamplingKey(*asked["key"]).seeds(*asked["place"], params.max_tokens)
        return cls((asked["temperature"], DecodingSpec(**asked["decoding"]), tuple(asked["eos"])), seeds, tokens)


class Draws(LogitsProcessor):
    """Draws each token as the in-process engine does, with the numbers of its key, and leaves no other choice: −∞ for
    every other token, and as its logit the log-probability that it was drawn with."""

    @classmethod
    def validate_params(cls, params: Any) -> None:
        _Row.asked(params, [])

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, update: Any) -> None:
        if update is None:
            return
        for index in update.removed:
            self._put(index, None)
        for index, params, _, tokens in update.added:
            self._put(index, _Row.asked(params, tokens))
        for here, there, how in update.moved:
            moved, other = self.rows.pop(here, None), self.rows.get(there)
            self._put(there, moved)
            if how == MoveDirectionality.SWAP:
                self._put(here, other)

    def _put(self, index: int, row: _Row | None) -> None:
        self.rows.pop(index, None)
        if row is not None:
            self.rows[index] = row

    def apply(self, logits: Tensor) -> Tensor:
        for how in {row.how for row in self.rows.values()}:
            mine = [(index, row, len(row.tokens)) for index, row in self.rows.items() if row.how == how]
            at = torch.tensor([index for index, _, _ in mine], device=logits.device)
            positions = torch.tensor([position for _, _, position in mine])
            # A row at its end may be computed once more, its result unused.
            seeds = torch.stack([row.seeds[min(position, len(row.seeds) - 1)] for _, row, position in mine])
            seeds, positions = seeds.to(logits.device), positions.to(logits.device)
            tokens, logprobs = draw_constrained(logits[at], seeds, positions, *how)
            logits[at] = float("-inf")
            logits[at, tokens] = torch.where(logprobs.isfinite(), logprobs, NOT_FINITE)
        return logits


@dataclass
class _Init(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class _Update(WeightTransferUpdateInfo):
    """path: a safetensors file with names as in the model's folder."""

    path: str


class Files(WeightTransferEngine):
    """Weights from a file that both sides see, in memory best (/dev/shm). vLLM's own ways need GPUs."""

    init_info_cls, update_info_cls = _Init, _Update

    def init_transfer_engine(self, init_info: _Init) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _Update) -> None:
        with safe_open(update_info.path, "pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no mapping

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            # A head that is tied to the embedding is not loaded itself, and on CPUs has a copy laid out for products.
            if hasattr(layer, "tie_weights") and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        pass


if "dar" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("dar", Files)
