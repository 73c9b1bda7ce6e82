"""A method of your own, in the library's loop: no file of `dar` is edited.

Soft best-of-N: weighted fine-tuning on the policy's own samples, a completion's weight its softmax among the K of its
prompt. At temperature 0 this would be best-of-N, at infinity plain fine-tuning on one's own samples.

    w_k = K · exp(r_k / τ) / Σ_j exp(r_j / τ),      L(θ) = −(1/B) Σ_i w_i · log π_θ(y_i | x_i)

    python examples/own_method.py
    cd examples && dar train toy 'algorithm={type: "own_method:SoftBest", temperature: 0.2}'
"""

from __future__ import annotations

from dar import Algorithm, Trainer, TrainingConfig
from dar.algorithms.base import Metrics, Terms
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.base import Positive, Spec
from dar.objectives.regression import weighted_nll


class SoftBest(Algorithm):
    """Weights fixed once per batch (`weigh`), a loss per row (`terms`); everything else is the loop's."""

    class Spec(Spec):
        """Checked like every key of a recipe: `algorithm.temperature=0` is refused, with the reason."""

        temperature: Positive = 1.0
        """τ, in units of the reward."""

    def __init__(self, spec: SoftBest.Spec) -> None:
        self.spec = spec

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        # A completion without a reward is NaN in the table [P, K]; it has no share, and no row in the batch.
        shares = (batch.rewards / self.spec.temperature).nan_to_num(nan=-float("inf")).softmax(1)
        weights = batch.to_rows(shares * batch.rewards.shape[1])
        return batch.weighted(advantages=weights - 1, weights=weights), {"weights/max": float(weights.max())}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        return Terms(weighted_nll(outputs.logprobs, batch.weights, batch.mask), {})


def good_pairs(completions: list[str], **columns: object) -> list[float]:
    """The toy language's reward: how often one of its good pairs stands in a completion."""
    return [float(sum(text.count(pair) for pair in ("ab", "bc", "cd", "da"))) for text in completions]


if __name__ == "__main__":
    args = TrainingConfig(output_dir="runs/own_method", max_steps=20, max_completion_length=24, learning_rate=1e-3)
    prompts = "package:dar/prompts/toy.jsonl"
    method = SoftBest(SoftBest.Spec(temperature=0.2))
    result = Trainer("toy:letters", good_pairs, args, prompts, algorithm=method).train()
    print(result.metrics[0]["reward"], "→", result.metrics[-1]["reward"])
