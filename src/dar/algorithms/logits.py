"""Convex losses in the logits: LCO."""

from __future__ import annotations

from dar import advantages as adv
from dar.algorithms.base import Algorithm, Metrics, Terms
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.logits import LCOSpec
from dar.objectives.logits import lco_kld_on_policy, lco_logcosh, lco_mse
from dar.ops import masked_sum


class LCO(Algorithm):
    """Logits convex optimization with a sparse advantage: the completion's, on the token that was sampled.

    arXiv:2603.00963. One update per batch: π_θ is then π_t, and neither loss needs logits over the vocabulary.
    """

    def __init__(self, spec: LCOSpec) -> None:
        self.spec = spec
        self.needs_logits = spec.loss != "kld"

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = batch.to_rows(adv.group_standardized(batch.rewards, ddof=1, eps=1e-4))
        # Without an advantage the target is where the policy is.
        return batch.weighted(rows, (rows != 0).float(), denominator=float(batch.mask.sum())), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        spec, mask = self.spec, batch.mask
        if spec.loss == "kld":
            per_token = lco_kld_on_policy(outputs.logprobs, batch.advantages, mask, beta=spec.beta)
        else:
            if outputs.logits is None:
                raise ValueError("LCO's distance of logits needs the sampled tokens' logits, and got none")
            distance = lco_mse if spec.loss == "mse" else lco_logcosh
            per_token = distance(outputs.logits, outputs.logits.detach(), batch.advantages, mask, beta=spec.beta)
        return Terms(batch.weights * masked_sum(per_token, mask), {})
