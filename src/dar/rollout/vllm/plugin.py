"""What a vLLM server loads of this library, in its own environment: the draw, and a way for weights to come in.

--logits-processors dar.rollout.vllm.plugin:Draws --logprobs-mode processed_logits
--weight-transfer-config '{"backend": "dar"}'
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

_NOT_FINITE = 1.0
"""Stands for a log-probability that is not finite: no true one is above 0, and NaN is no JSON."""


def _row(params: Any, tokens: list[int]) -> tuple[Any, Tensor, list[int]] | None:
    """How a completion is sampled, its seeds by position, and its tokens so far (vLLM's own list); None of a request
    that is none of ours. Raises ValueError where it is another version's."""
    asked = (params.extra_args or {}).get("dar")
    if asked is None:
        return None
    if asked["version"] != __version__:
        raise ValueError(f"this server draws tokens with dar {__version__}")
    how, (prompt, number) = (
        (asked["temperature"], DecodingSpec(**asked["decoding"]), tuple(asked["eos"])),
        asked["place"],
    )
    return how, SamplingKey(*asked["key"]).seeds(prompt, number, params.max_tokens), tokens


class Draws(LogitsProcessor):
    """Draws each token as the in-process engine does, by the key of its completion, and leaves vLLM no other choice: −∞
    for every other token, and as its logit the log-probability that it was drawn with."""

    @classmethod
    def validate_params(cls, params: Any) -> None:
        _row(params, [])

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, Any] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, update: Any) -> None:
        if update is None:
            return
        for index in update.removed:
            self.rows[index] = None
        for index, params, _, tokens in update.added:
            self.rows[index] = _row(params, tokens)
        for here, there, how in update.moved:
            kept = self.rows.get(there) if how == MoveDirectionality.SWAP else None
            self.rows[there], self.rows[here] = self.rows.get(here), kept

    def apply(self, logits: Tensor) -> Tensor:
        rows = {index: row for index, row in self.rows.items() if row is not None}
        for how in {how for how, _, _ in rows.values()}:
            at = [index for index, row in rows.items() if row[0] == how]
            # A row at its end may be computed once more, its result unused.
            positions = [min(len(rows[index][2]), len(rows[index][1]) - 1) for index in at]
            seeds = torch.stack([rows[index][1][position] for index, position in zip(at, positions, strict=True)])
            where = torch.tensor(positions, device=logits.device)
            tokens, logprobs = draw_constrained(logits[at], seeds.to(logits.device), where, *how)
            logits[at] = float("-inf")
            logits[at, tokens] = torch.where(logprobs.isfinite(), logprobs, _NOT_FINITE)
        return logits


@dataclass
class _Nothing(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class _File(WeightTransferUpdateInfo):
    path: str


class Files(WeightTransferEngine):
    """Weights from a safetensors file that both sides see, named as in a model's folder. vLLM's own ways need GPUs."""

    init_info_cls, update_info_cls = _Nothing, _File

    def init_transfer_engine(self, init_info: _Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _File) -> None:
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
