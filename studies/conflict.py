"""Do PPO's two constraints pull against each other? Measured inside GRPO, whose trust region is the same clip.

    dar compare studies/toy.yaml -a 'conflict:studies.conflict:Watched' …

Each optimizer step logs, of the gradients in the model's parameters and of the tokens of the batch,

    conflict/cosine     between the clipped surrogate's and the KL term's (k3 to π₀) gradient
    conflict/outside    share of tokens whose π₀/π_t lies outside [1 − ε, 1 + ε]: the trust region excludes π₀
    conflict/blocked    share of tokens whose ratio left the region on the side on which the KL term wants it further
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dar import advantages as adv
from dar.algorithms.base import Algorithm, Metrics, Terms
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.base import Spec
from dar.objectives.policy_gradient import clipped_surrogate
from dar.ops import Mean, kl_k3, masked_sum


class Watched(Algorithm):
    """GRPO (arXiv:2402.03300) that measures its own conflict; one micro-batch a step, so that gradients are whole."""

    class Spec(Spec):
        """clip: ε of both sides. beta: of the k3 estimate of KL(π_θ‖π₀)."""

        clip: float = 0.2
        beta: float = 0.04
        updates: int = 4

    needs_reference = True

    def __init__(self, spec: Watched.Spec) -> None:
        self.spec, self.updates = spec, spec.updates

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = batch.to_rows(adv.group_standardized(batch.rewards, ddof=1, eps=1e-4))
        return batch.weighted(rows, torch.ones_like(rows) / batch.mask.sum(1)), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        assert batch.ref_logprobs is not None
        logprobs, old, ref, clip = outputs.logprobs, batch.old_logprobs, batch.ref_logprobs, self.spec.clip
        bounds = {"clip_low": clip, "clip_high": clip}
        surrogate = batch.weights * masked_sum(
            clipped_surrogate(logprobs, old, batch.advantages, batch.mask, **bounds), batch.mask
        )
        penalty = self.spec.beta * batch.weights * masked_sum(kl_k3(logprobs, ref), batch.mask)
        weights = parameters_behind(logprobs)
        first, second = (
            _flat(torch.autograd.grad(each.sum(), weights, retain_graph=True)) for each in (surrogate, penalty)
        )
        ratio, drift = (logprobs.detach() - old).exp(), logprobs.detach() - ref
        blocked = ((ratio > 1 + clip) & (drift < 0)) | ((ratio < 1 - clip) & (drift > 0))
        outside = ((ref - old).exp() - 1).abs() > clip
        means = {"conflict/blocked": Mean.of(blocked, batch.mask), "conflict/outside": Mean.of(outside, batch.mask)}
        if first.any() and second.any():  # π_θ = π₀ has no penalty, and a batch of ties no surrogate
            means["conflict/cosine"] = Mean.of(torch.cosine_similarity(first, second, 0))
        return Terms(surrogate + penalty, means)


def parameters_behind(output: Tensor) -> list[nn.Parameter]:
    """Every parameter that a result was computed from, found in its graph."""
    found, seen, waiting = dict[int, nn.Parameter](), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        waiting += [parent for parent, _ in node.next_functions]
    return list(found.values())


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])
