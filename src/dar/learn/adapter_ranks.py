"""LoRA adapters whose ranks shrink while they are trained: AdaRL's rule and truncation, on the product BA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dar.algorithms.base import Metrics
from dar.collective import from_main
from dar.config.model import RankScheduleSpec
from dar.errors import ConfigError
from dar.low_rank import energy_rank, factored_svd

_NAME = "default"  # of a model's one adapter, in peft


class AdapterRanks:
    """Every so many steps, each adapter is cut to the rank that AdaRL's rule finds in it; none grows.

    Args:
        spec: the rank at first, when to look, and how much to keep.
        model: peft's, with such adapters.

    Raises:
        ConfigError: a layer can have no rank as high as the first, or its adapter is no product of two matrices.
    """

    def __init__(self, spec: RankScheduleSpec, model: Any) -> None:
        self.spec, self.model = spec, model
        self.cut_at = 0
        """The step after which ranks were cut last; 0 before."""
        modules = model.get_base_model().named_modules()
        self.layers: dict[str, Any] = {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}
        for name, layer in self.layers.items():
            if _NAME not in layer.lora_A or not isinstance(layer.lora_A[_NAME], nn.Linear):
                raise ConfigError(f"model.lora.rank is a mapping, which is for linear layers, and {name} is none")
            if spec.start > (most := min(layer.in_features, layer.out_features)):
                raise ConfigError(f"model.lora.rank.start is {spec.start}, but {name} has no rank above {most}")

    def after(self, step: int) -> Metrics:
        """Cuts the adapters if that is due after a step; their ranks, and how much is trained."""
        # One process decides: the others have the same weights, but perhaps another processor.
        num_cut = 0 if step % self.spec.every else self._cut(from_main(self.needed))
        self.cut_at = step if num_cut else self.cut_at
        ranks = list(self.ranks().values())
        found = {"rank_mean": sum(ranks) / len(ranks), "rank_min": min(ranks), "rank_max": max(ranks), "cut": num_cut}
        found["parameters"] = sum(each.numel() for each in self.model.parameters() if each.requires_grad)
        return {f"lora/{name}": value for name, value in found.items()}

    def ranks(self) -> dict[str, int]:
        """Each layer's."""
        return {name: layer.r[_NAME] for name, layer in self.layers.items()}

    def needed(self) -> dict[str, int]:
        """What the rule finds; of an adapter that is exactly 0, which says nothing yet, its present rank."""
        spectra = {name: factored_svd(*_factors(layer))[1] for name, layer in self.layers.items()}
        return {name: energy_rank(s, self.spec.energy) if s.any() else len(s) for name, s in spectra.items()}

    def _cut(self, ranks: Mapping[str, int]) -> int:
        """Truncates adapters of a higher rank, and counts them; their factors are new parameters.

        Their scaling alpha / r stays, or BA would count for more: alpha is another, as the saved adapter says, too.
        """
        cut = [name for name, rank in self.ranks().items() if ranks.get(name, rank) < rank]
        for name in cut:
            rank, layer, config = ranks[name], self.layers[name], self.model.active_peft_config
            up, down = layer.lora_B[_NAME], layer.lora_A[_NAME]
            u, values, v = factored_svd(*_factors(layer))
            # A keeps its size, for which the learning rate is made: with √Σ in both, a young adapter hardly moves on.
            size = down.weight.norm().item() / layer.r[_NAME] ** 0.5
            for part, factor in (up, u[:, :rank] * values[:rank] / size), (down, size * v[:rank]):
                part.weight = nn.Parameter(factor.to(part.weight).contiguous())
            up.in_features = down.out_features = layer.r[_NAME] = rank
            layer.lora_alpha[_NAME] = layer.scaling[_NAME] * rank
            # peft takes the first pattern that the end of a name matches; ^ has it match this name alone.
            config.rank_pattern[f"^{name}"], config.alpha_pattern[f"^{name}"] = rank, layer.lora_alpha[_NAME]
        return len(cut)

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"cut_at": self.cut_at, "ranks": self.ranks()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave: the factors' shapes, before their numbers are read."""
        self.cut_at = state.get("cut_at", 0)
        self._cut(state.get("ranks", {}))


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """B and A, on the CPU: they are small, and not every device has fp64."""
    return layer.lora_B[_NAME].weight.detach().cpu(), layer.lora_A[_NAME].weight.detach().cpu()
