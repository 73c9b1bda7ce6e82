"""DAR's update in TRL's loop."""

from __future__ import annotations

import inspect
from collections import deque
from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from dar.algorithms.base import kl_metrics
from dar.algorithms.regression import DAR
from dar.batch import Batch, TokenGroups, joined
from dar.collective import gathered, own_rank
from dar.errors import ConfigError, NonFiniteError, RewardError
from dar.integrations.trl.config import DARConfig


class DARTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with DAR's update: same arguments, same data, same reward functions.

        L(θ) = −(1/B) Σ_i sg(min(w_reg·w_adv, w_clip)) · log π_θ(y_i | x_i)

    B counts the completions of an optimizer step, on all processes together. Advantages, an adaptive β and the weights
    are of the generation batch, likewise of all processes. log π_t and log π₀ are the trainer's own passes over it,
    before the first update on it; with vLLM, TRL's importance sampling stands for the distance to what sampled.

    Args:
        model, reward_funcs: as for `GRPOTrainer`, and so is all that is not named here.
        args: a `DARConfig`.

    Raises:
        ConfigError: `args` is another configuration.

    He et al. 2026, arXiv:2602.11523.
    """

    args: Any
    model: Any
    _name, _tag_names = "DAR", ("trl", "dar")
    _paper: ClassVar = dict(title="Unifying Stable Optimization and Reference Regularization in RLHF", id="2602.11523")

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DARConfig | None = None, *others: Any, **options: Any
    ) -> None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = args or DARConfig(f"{name.split('/')[-1]}-DAR")
        if not isinstance(args, DARConfig):
            raise ConfigError(f"args must be a DARConfig, and a {type(args).__name__} was given")
        self.algorithm = DAR(args.spec)
        # Above 0 it has TRL load π₀ and compute its log-probabilities. α·β is the coefficient of KL(π_θ‖π₀) in DAR's
        # objective; where β is adaptive it has no value yet.
        args = copy(args)
        args.beta = args.alpha * (args.dar_beta if isinstance(args.dar_beta, float) else 1.0)
        super().__init__(model, reward_funcs, args, *others, **options)
        self.loss_type, self.epsilon_high = "cispo", 1.0  # see _compute_loss
        # TRL would take cut-off completions out of the model's sight; DAR's statistics count them.
        self.mask_truncated_completions = False

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        if infinite := [name for name, row in zip(self.reward_func_names, rewards.T, strict=True) if row.isinf().any()]:
            raise RewardError(f"step {self.state.global_step + 1}: infinite rewards from {', '.join(infinite)}")
        self._rewards_per_func = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        is_training = self.model.training
        batch = self._batch(output, self.num_generations if is_training else self.num_generations_eval)
        weighted, found = self.algorithm.weigh(batch.rewarded())
        weights = weighted.to_table(weighted.weights, absent=0.0).flatten()
        advantages = weighted.to_table(weighted.advantages, absent=0.0).flatten()
        if self.args.mask_truncated_completions:
            weights = weights * batch.has_eos
        if batch.ref_logprobs is not None:
            found |= kl_metrics(batch.old_logprobs, batch.ref_logprobs, batch.mask, name="ref")
            found["kl"] = found["kl/ref_k3_per_token"]
        for name, value in found.items():
            self._metrics["train" if is_training else "eval"][name].append(value)
        # TRL has written down GRPO's.
        logged = self._logs["advantages"]
        self._logs["advantages"] = deque([*logged][: -len(advantages)] + advantages.tolist(), logged.maxlen)
        self._logs["extra"]["weight"].extend(weights.tolist())
        own = slice(own_rank() * len(inputs), (own_rank() + 1) * len(inputs))
        fixed = {"weights": weights[own], "advantages": advantages[own]}
        fixed["num_items_in_batch"] = torch.tensor(weighted.denominator)
        return output | {name: tensor.to(self.accelerator.device) for name, tensor in fixed.items()}

    def _batch(self, output: dict[str, Any], num_generations: Any) -> Batch:
        """The generation batch of all processes, as the maths reads it: without the tokens themselves."""
        mask = output["completion_mask"].bool()
        last = output["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        has_eos = torch.isin(last, last.new_tensor([*self.eos_token_ids, self._tokenizer.pad_token_id]))
        if "tool_mask" in output:
            mask &= output["tool_mask"].bool()
        # From here on nobody reads these but the maths; with α = 0 it does not either.
        old, ref = (output.pop(f"{name}_per_token_logps", None) for name in ("old", "ref"))
        if ref is None:
            old = torch.zeros_like(mask, dtype=torch.float32)
        elif old is None:
            old = self._old_logprobs(output)
        own = tuple(None if each is None else each.cpu() for each in (old, ref, mask, has_eos))
        old, ref, mask, has_eos = (joined(parts) for parts in zip(*gathered(own), strict=True))
        per_func = self._rewards_per_func.cpu()
        rewards = (per_func * self.reward_weights.cpu()).nansum(1).masked_fill(per_func.isnan().all(1), torch.nan)
        if rewards.isnan().all():
            raise RewardError(f"step {self.state.global_step + 1}: no completion has a reward, all are None")
        num_prompts = len(rewards) // num_generations
        groups = TokenGroups(((),) * num_prompts, (num_generations,) * num_prompts, torch.zeros_like(mask).long(), mask)
        return Batch(groups, old, ref, rewards.view(num_prompts, num_generations), has_eos)

    @torch.no_grad()
    def _old_logprobs(self, output: dict[str, Any]) -> Tensor:
        """log π_t of the generation batch. TRL takes the update's own pass for it where that is of the same policy,
        which is too late for weights that depend on the whole batch."""
        known = inspect.signature(self._get_per_token_logps_and_entropies).parameters
        return self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            output["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            **{name: value for name, value in output.items() if name in known},
        )[0]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # CISPO's loss is −Σ sg(ratio) · advantage · log π_θ / num_items_in_batch. Without log π_t among the inputs its
        # ratio is 1; with the weight in the advantage's place, and completions counted in that of tokens, it is DAR's.
        # GRPO's penalty, which `beta` would add, is not.
        beta, self.beta = self.beta, 0.0
        try:
            loss = super()._compute_loss(model, {**inputs, "advantages": inputs["weights"]})
        finally:
            self.beta = beta
        self._metrics["train" if self.model.training else "eval"].pop("cispo_clip_ratio", None)
        if not loss.isfinite():
            raise NonFiniteError(f"step {self.state.global_step + 1}: the loss is {float(loss)}")
        return loss
