"""What must hold before a step is worth taking: sampler, trainer and reference agree on what the policy says."""

from __future__ import annotations

from dar.batch import Prompt
from dar.config.run import RunSpec
from dar.errors import RolloutError
from dar.ops import masked_mean
from dar.policies.protocol import Policy
from dar.rollout.protocol import Engine
from dar.rollout.sampling import SamplingKey


def check_start(policy: Policy, engine: Engine, prompt: Prompt, spec: RunSpec) -> None:
    """Samples two short completions and compares the three views of their log-probabilities.

    Raises:
        RolloutError: sampler and trainer differ by more than `runtime.max_logprob_gap`, or π₀ should be the policy
            itself but its KL is not 0 within the precision's noise.
    """
    engine.sync(policy, 0)
    length = min(16, spec.sampling.max_completion_length)
    rollouts = engine.generate([prompt], 2, max_completion_length=length, key=SamplingKey(spec.seed, "sample"))
    groups, max_tokens = rollouts.groups, spec.runtime.max_tokens_per_microbatch
    current = policy.logprobs(groups, max_tokens=max_tokens)
    gap = float(masked_mean((current - rollouts.logprobs).abs(), groups.mask))
    require_parity(gap, spec.runtime.max_logprob_gap, "the start")
    if not (policy.has_reference and policy.has_own_reference):
        return
    drift = float(masked_mean((current - policy.ref_logprobs(groups, max_tokens=max_tokens)).abs(), groups.mask))
    if drift > policy.precision.logprob_noise:
        raise RolloutError(
            f"before the first step the policy already differs from its reference π₀, by {drift:.3g} nats per token: "
            "an adapter is not zero at the start (init_lora_weights), or the model is not deterministic. To train one "
            "model while holding it against another, name that other one as `reference`."
        )


def require_parity(gap: float, limit: float, where: str) -> None:
    """Raises RolloutError when sampler and trainer differ by more than `limit` nats per token on average."""
    # Written so that NaN fails too.
    if not gap <= limit:
        raise RolloutError(
            f"the sampler's log-probabilities differ from the trainer's by {gap:.3g} nats per token at {where} (limit "
            f"{limit}): the samples would not be those of π_t. Try runtime.precision=fp32; if that helps, raise "
            "runtime.max_logprob_gap knowingly; if not, please report the architecture."
        )
