"""SAC's layers between hidden layers as products W = left · right, and their truncation (AdaRL, 2510.11899)."""

from __future__ import annotations

from collections.abc import Iterator

from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor, eye, nn
from torch.nn import functional as F

from dar.low_rank import energy_rank, factored_svd, truncated


class Factored(nn.Module):
    """x ↦ left · (right · x) + b, where left [N, R] · right [R, M] is a linear layer's W [N, M] cut to that rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        left, right = truncated(*factors(linear), rank)
        self.left, self.right, self.bias = nn.Parameter(left), nn.Parameter(right), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)


def factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """left and right of a layer, without gradient; of an ordinary one W and the identity."""
    if isinstance(layer, Factored):
        return layer.left.data, layer.right.data
    weight: Tensor = layer.weight.data  # pyright: ignore
    return weight, eye(weight.shape[1], device=weight.device)


def layers_between(policy: SACPolicy) -> Iterator[tuple[str, nn.Sequential, int]]:
    """(name, the sequence it is in, its place there) of the layers from one hidden layer to the next, targets' last.

    Layers that read observations or give actions and values are none of them: their rank is these spaces'.
    """
    for part in ("actor", "critic", "critic_target"):
        for name, net in getattr(policy, part).named_children():
            if isinstance(net, nn.Sequential):
                places = [place for place, layer in enumerate(net) if isinstance(layer, (nn.Linear, Factored))]
                for place in places[1 : len(places) - (part != "actor")]:  # an actor's heads stand elsewhere
                    yield f"{part}.{name}.{place}", net, place


def factor(policy: SACPolicy, rank: int | None) -> None:
    """Makes these layers products of a rank; of the full one, the same function, where it is None."""
    for _, net, place in layers_between(policy):
        net[place] = Factored(net[place], rank or min(factors(net[place])[0].shape))  # pyright: ignore
    _renew_optimizers(policy)


def merge(policy: SACPolicy) -> None:
    """Makes products ordinary layers again, the same functions up to rounding."""
    for _, net, place in layers_between(policy):
        if isinstance(layer := net[place], Factored):
            net[place] = linear = nn.Linear(layer.right.shape[1], layer.left.shape[0])
            linear.weight.data, linear.bias = layer.left.data @ layer.right.data, layer.bias
    _renew_optimizers(policy)


def truncate(policy: SACPolicy, energy: float) -> None:
    """Cuts every product to `energy_rank` of its singular values; what the optimizers remember is forgotten.

    A target critic's product becomes a copy of its critic's: averaged factor by factor with one that is decomposed
    otherwise, it would be a mixture of neither.
    """
    layers = {name: net[place] for name, net, place in layers_between(policy)}
    for name, layer in layers.items():
        left, right = factors(layers[name.replace("critic_target", "critic")])
        if "target" not in name:
            left, right = truncated(left, right, energy_rank(factored_svd(left, right)[1], energy))
        layer.left.data, layer.right.data = left.clone(), right.clone()  # pyright: ignore
    _renew_optimizers(policy)


def spectra(policy: SACPolicy) -> dict[str, list[float]]:
    """Singular values of each of these layers but the targets', the largest first, as many as its rank."""
    layers = {name: net[place] for name, net, place in layers_between(policy) if "target" not in name}
    return {name: factored_svd(*factors(layer))[1].tolist() for name, layer in layers.items()}


def _renew_optimizers(policy: SACPolicy) -> None:
    for network in (policy.actor, policy.critic):
        network.zero_grad(set_to_none=True)
        network.optimizer = policy.optimizer_class(network.parameters(), lr=1.0)  # pyright: ignore - SAC sets the rate
