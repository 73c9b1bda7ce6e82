"""DAR in verl's words: what a configuration says of it, the weights of the whole batch, the loss of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dar.algorithms.base import Metrics
from dar.algorithms.regression import DAR
from dar.batch import Batch, TokenGroups
from dar.config.regression import DARSpec
from dar.errors import ConfigError
from dar.objectives.regression import weighted_nll

_WITHOUT = {
    "algorithm.use_kl_in_reward": "holds to π₀ a second time, which algorithm.dar.alpha does already",
    "actor_rollout_ref.actor.use_kl_loss": "holds to π₀ a second time (verl loads π₀ for DAR without it)",
    "algorithm.rollout_correction.bypass_mode": "puts a loss of its own in the place of DAR's",
    "algorithm.rollout_correction.rollout_rs": "takes tokens out of completions that are weighed as a whole",
    "algorithm.dar.updates": "has another name in verl, actor_rollout_ref.actor.ppo_epochs",
    "algorithm.dar.normalize_weights": "needs each prompt's completions in one micro-batch, which verl may tear apart",
}
"""Settings that must be off, and why."""
_READ = {"response_mask", "token_level_rewards", "old_log_probs", "ref_log_prob"}
_found: dict[str, Metrics] = {}
"""What the last batch's weights are like, from where they are made to where the metrics of the step are."""


def ask_for_reference(utils: Any) -> None:
    """Has verl load π₀ where DAR reads it. verl asks before it starts anything, so that is where mistakes are told."""
    needs_reference = utils.need_reference_policy

    @wraps(needs_reference)
    def asked(config: Any) -> bool:
        methods = [config.algorithm.adv_estimator, config.actor_rollout_ref.actor.policy_loss.get("loss_mode")]
        if "dar" not in methods and "dar" not in config.algorithm:
            return needs_reference(config)
        if methods != ["dar", "dar"]:
            both = "algorithm.adv_estimator and actor_rollout_ref.actor.policy_loss.loss_mode"
            raise ConfigError(f"{both} must both be dar, weights and their loss, but are {' and '.join(methods)}")
        for key, why in _WITHOUT.items():
            if reduce(lambda node, name: (node or {}).get(name), key.split("."), config):
                raise ConfigError(f"{key} {why}: leave it out")
        return _spec(config.algorithm, updates=config.actor_rollout_ref.actor.ppo_epochs).alpha > 0

    utils.need_reference_policy = asked


def _spec(algorithm: Any, **others: Any) -> DARSpec:
    given = (algorithm.get("dar") or {}).items()
    plain: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given}
    return DARSpec(**plain, **others)


def add_weights(ray_trainer: Any) -> None:
    """verl's estimators are handed neither π₀ nor π_t; the function that calls them has the whole batch."""
    compute_advantage = ray_trainer.compute_advantage

    @wraps(compute_advantage)
    def computed(data: Any, adv_estimator: Any, **settings: Any) -> Any:
        if adv_estimator != "dar":
            return compute_advantage(data, adv_estimator=adv_estimator, **settings)
        batch, rows = _sampled(data, settings["num_repeat"])
        weighted, _found["weights"] = DAR(_spec(settings["config"])).weigh(batch)
        # verl divides by all rows of a mini-batch, those that it filled the batch up with among them.
        weights = torch.zeros(len(data)).index_copy(0, rows, weighted.weights * (len(data) / weighted.denominator))
        data.batch["advantages"] = data.batch["returns"] = weights[:, None] * data.batch["response_mask"]
        return data

    ray_trainer.compute_advantage = computed


def _sampled(data: Any, num_generations: int) -> tuple[Batch, Tensor]:
    """The rows of a batch of verl that have a sampled token, prompt by prompt, and [B] where in it they are."""
    kept = data.batch["response_mask"].any(1).nonzero().flatten()
    uids = data.non_tensor_batch["uid"][kept.numpy()].astype(str)
    rows, sizes = kept[torch.from_numpy(np.argsort(uids))], torch.from_numpy(np.unique(uids, return_counts=True)[1])
    if (largest := int(sizes.max())) > num_generations:
        why = "DAR weighs whole completions, and no agents' sessions of several outputs"
        raise ConfigError(f"a prompt has {largest} outputs, but rollout.n is {num_generations}: {why}")
    found = {name: data.batch[name][rows].float() for name in data.batch.keys() & _READ}
    mask, counts = found["response_mask"].bool(), tuple(sizes.tolist())
    batch = Batch(
        # DAR reads which tokens were sampled, not what they are.
        groups=TokenGroups(((),) * len(counts), counts, torch.zeros_like(mask, dtype=torch.int64), mask),
        old_logprobs=found["old_log_probs"],
        ref_logprobs=found.get("ref_log_prob"),
        rewards=pad_sequence(found["token_level_rewards"].sum(1).split(counts), True, torch.nan),
        has_eos=torch.ones(len(rows), dtype=torch.bool),
        places=(torch.arange(largest) < sizes[:, None]).flatten().nonzero().flatten(),
    )
    return batch, rows


def add_metrics(trainer_base: Any) -> None:
    """`weights/…` among what verl logs of a step."""
    trainer, compute_advantage = trainer_base.PPOTrainer, trainer_base.PPOTrainer._compute_advantage

    @wraps(compute_advantage)
    def computed(self: Any, batch: Any, metrics: dict[str, float]) -> Any:
        result = compute_advantage(self, batch, metrics=metrics)
        metrics.update(_found.get("weights", {}))
        return result

    trainer._compute_advantage = computed


def add_loss(core_algos: Any) -> None:
    """The policy loss `dar`, −(1/B) Σ_i w_i · log π_θ(y_i | x_i) with B the rows of the mini-batch, over all ranks.

    `loss_agg_mode` is not read: that tokens are summed and rows averaged is part of the method.
    """

    @core_algos.register_policy_loss("dar")
    def dar_loss(*, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, config: Any,
                 rollout_is_weights: Tensor | None = None, **_: Any) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        mask = response_mask.bool()
        logprobs = log_prob if rollout_is_weights is None else log_prob * rollout_is_weights
        # Every sampled token has its row's weight, of either sign, and all others 0.
        weights = advantages.gather(1, mask.int().argmax(1, keepdim=True)).squeeze(1)
        rows = weighted_nll(logprobs, weights, mask)[:, None]
        return core_algos.agg_loss(rows, mask.any(1)[:, None], "seq-mean-token-sum", **config.global_batch_info), {}
