"""Held-out evaluation: completions of prompts that are never trained on, sampled with the same random numbers every
time, or read from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from transformers import TrainerState

from dar.advantages import tied_groups
from dar.algorithms.base import Algorithm, kl_metrics
from dar.batch import Prompt, Rollouts, TokenOutputs, joined
from dar.collective import failing_together, gathered
from dar.config.data import DecodingSpec
from dar.config.run import RunSpec
from dar.data.logged import LoggedGroup
from dar.learn.ranks import own_share
from dar.policies.protocol import Policy
from dar.record.completions import prompt_text
from dar.record.metrics import completion_metrics, gold_metrics
from dar.record.text import reward_length_metrics, sampled_entropy
from dar.rewards import RewardSet, RewardTable, join_tables
from dar.rollout.protocol import Engine, Progress
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN
from dar.run.collect import logged_rollouts

Item = TypeVar("Item")


@dataclass(frozen=True)
class HeldoutResult:
    """metrics without a prefix, the completions they are of, and what the rewards and the held-out rewards said.

    logprobs, ref_logprobs: [B, T] nats under the policy and π₀, from the trainer's pass; None where π₀ is not
    measured.
    """

    metrics: dict[str, float]
    rollouts: Rollouts
    rewards: RewardTable
    gold: RewardTable | None = None
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Samples `evaluation.num_generations` completions of each prompt and measures them.

    One, when they would all be the same.

    gold: held-out rewards, which nothing is trained on: what the proxy the policy maximises is to be compared with
        (Gao et al. 2023, arXiv:2210.10760).
    """

    spec: RunSpec
    prompts: Sequence[Prompt]
    policy: Policy
    engine: Engine
    rewards: RewardSet
    decoding: DecodingSpec = PLAIN
    gold: RewardSet | None = None

    def run(self, step: int, *, progress: Progress | None = None) -> HeldoutResult:
        """Reward, KL to π₀, lengths, endings, entropy and repetition of the policy after `step` steps.

        The random numbers do not depend on the step, so two evaluations differ by the policy alone. Entropy and KL are
        means over samples of the policy itself, and left out when the decoding draws from another distribution. Ranks
        share the prompts, and every one has the whole result.
        """
        where = f"the held-out evaluation at step {step}"
        state = TrainerState(global_step=step, max_steps=self.spec.steps)
        own, has_own = own_share(self.prompts)
        self.engine.sync(self.policy, step)
        rewards = gold = current = reference = None
        with failing_together():
            rollouts = self.engine.generate(
                own,
                1 if self.decoding.greedy else self.spec.evaluation.num_generations,
                max_completion_length=self.spec.sampling.max_completion_length,
                key=SamplingKey(self.spec.seed, "heldout"),
                progress=progress,
                decoding=self.decoding,
            )
            if has_own:
                rewards = self.rewards.score(rollouts, where=where, state=state)
            if has_own and self.gold is not None:
                gold = self.gold.score(rollouts, where=f"{where}, evaluation.rewards", state=state)
        has_kl = self.decoding.is_plain and self.policy.has_reference
        if has_kl:
            # Both sides from the trainer's pass: at step 0 they are then equal to the last bit, and the KL is 0.
            max_tokens = self.spec.runtime.max_tokens_per_microbatch
            current = self.policy.logprobs(rollouts.groups, max_tokens=max_tokens)
            reference = self.policy.ref_logprobs(rollouts.groups, max_tokens=max_tokens)
        found = gathered((rewards, gold, rollouts, current, reference) if has_own else None)
        tables, golds, *rows = zip(*filter(None, found))
        rewards, gold = join_tables(tables), None if self.gold is None else join_tables(golds)
        rollouts, current, reference = map(joined, rows)
        metrics = rewards.metrics() | completion_metrics(rollouts) | gold_metrics(gold)
        metrics["frac_reward_zero_std"] = float(tied_groups(rewards.total).float().mean())
        metrics |= reward_length_metrics(rewards.total, rollouts.groups.lengths)
        if self.decoding.is_plain:
            metrics["entropy"] = sampled_entropy(rollouts)
        if has_kl:
            metrics |= kl_metrics(current, reference, rollouts.groups.mask, name="ref")
        return HeldoutResult(metrics, rollouts, rewards, gold, current, reference)

    def to_read(self, entropy: float | None) -> dict[str, list[Any]]:
        """The policy that `run` has just measured, for people: a completion of each of three prompts, in columns.

        What a small model draws from its own distribution reads like noise. These are drawn at temperature
        T / max(1, H), T being the evaluation's and H the initial policy's entropy at T, with the random numbers of the
        evaluation's first completions, so that two of them differ by the policy alone. Nothing is measured on them.

        Args:
            entropy: H, nats per token; None, and they are drawn as those of the evaluation.
        """
        temperature = None if entropy is None else self.spec.sampling.temperature / max(1.0, entropy)
        stride = max(1, len(self.prompts) // 3)
        with failing_together():
            rollouts = self.engine.generate(
                self.prompts[::stride][:3],
                1,
                max_completion_length=self.spec.sampling.max_completion_length,
                key=SamplingKey(self.spec.seed, "heldout"),
                decoding=self.decoding.model_copy(update={"temperature": temperature}),
            )
        return {
            "prompt": [prompt_text(prompt.content) for prompt in rollouts.prompts],
            "completion": list(rollouts.texts),
            "temperature": [temperature] * len(rollouts.texts),
        }


@dataclass(frozen=True)
class HeldoutCompletions:
    """Measures an offline method on completions that come with the held-out rows: nothing is sampled or scored."""

    groups: Sequence[LoggedGroup]
    policy: Policy
    algorithm: Algorithm
    max_tokens: int

    def run(self) -> dict[str, float]:
        """`loss`, the method's own, and what it reports of its terms: of pairs `rewards/accuracies` and the like."""
        own, has_own = own_share(self.groups)
        rollouts, rewards = logged_rollouts(own, [group.prompt for group in own])
        reference = None
        if self.algorithm.needs_reference:
            reference = self.policy.ref_logprobs(rollouts.groups, max_tokens=self.max_tokens)
        current = self.policy.logprobs(rollouts.groups, max_tokens=self.max_tokens)
        found = gathered((rollouts, rewards, reference, current) if has_own else None)
        rollouts, rewards, reference, current = map(joined, zip(*filter(None, found)))
        batch, _ = self.algorithm.weigh(rollouts.scored(rewards, {}, ref_logprobs=reference))
        terms = self.algorithm.terms(TokenOutputs(current), batch)
        loss = float(terms.losses.sum()) / batch.denominator
        return {"loss": loss, **{name: mean.value for name, mean in terms.means.items()}}
