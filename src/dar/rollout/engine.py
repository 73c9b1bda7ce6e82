"""The sampling engine: its protocol, and the one that runs in the trainer's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dar.batch import FinishReason, Prompt, Rollouts, TokenGroups
from dar.errors import RolloutError
from dar.policy import Policy
from dar.policy.head import logits_of
from dar.policy.logprobs import unwrapped
from dar.rollout.decode import PaddedDecoder, SharedPrefixDecoder
from dar.rollout.sampling import SamplingKey, inverse_cdf
from dar.rollout.weights import sampling_weights

Progress = Callable[[int], None]
"""Called with the number of tokens just sampled."""


class Engine(Protocol):
    """What samples completions from the current policy."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        *,
        max_completion_length: int,
        key: SamplingKey,
        progress: Progress | None = None,
    ) -> Rollouts:
        """Samples `num_generations` completions of each prompt.

        Args:
            prompts: P prompts.
            num_generations: K.
            max_completion_length: most tokens per completion, EOS included.
            key: of the random numbers; the same key gives the same completions.
            progress: told about sampled tokens as they come.

        Returns:
            Tokens, texts, finish reasons and log-probabilities under the distribution that sampled.

        Raises:
            RolloutError: the model gave logits that are not finite.
        """
        ...


class InProcessEngine:
    """Samples with the trainer's own weights.

    Args:
        policy: whose model samples.
        max_tokens: prompt and completion tokens in the cache at once; what does not fit waits its turn.
    """

    def __init__(self, policy: Policy, *, max_tokens: int) -> None:
        self.policy = policy
        module = policy.module
        self.decoder = SharedPrefixDecoder(module, max_tokens) if module.is_packed else PaddedDecoder(module)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        *,
        max_completion_length: int,
        key: SamplingKey,
        progress: Progress | None = None,
    ) -> Rollouts:
        uniforms = torch.stack(
            [key.uniforms(p.position, k, max_completion_length) for p in prompts for k in range(num_generations)]
        )
        ids = torch.zeros(uniforms.shape, dtype=torch.int64)
        logprobs = torch.zeros(uniforms.shape, dtype=torch.float32)
        eos = torch.tensor(self.policy.eos_token_ids)

        def sample(states: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
            tokens, chosen = self._draw(states, uniforms[rows, positions])
            ids[rows, positions], logprobs[rows, positions] = tokens, chosen
            if progress is not None:
                progress(len(rows))
            return tokens

        precision, num_rows = self.policy.precision, len(uniforms)
        with precision.compute(), sampling_weights(self.policy.model, precision.dtype, batch_size=num_rows):
            self.decoder.run(
                prompts, num_generations, max_completion_length, sample, lambda tokens: torch.isin(tokens, eos)
            )
        return self._rollouts(prompts, num_generations, ids, logprobs)

    def _draw(self, states: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One token per row and its log-probability, on the CPU."""
        module = self.policy.module
        logits = logits_of(unwrapped(module.model), states)
        logprobs = torch.log_softmax(logits if module.temperature == 1.0 else logits / module.temperature, dim=-1)
        if not torch.isfinite(logprobs.amax(-1)).all():
            raise RolloutError(
                "the policy's logits are not finite, so nothing can be sampled from it. The weights have probably "
                "diverged: continue from an earlier checkpoint with a lower optim.learning_rate, or use "
                "runtime.precision=fp32."
            )
        tokens = inverse_cdf(logprobs.exp(), uniforms.to(logprobs.device))
        return tokens.cpu(), logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).cpu()

    def _rollouts(self, prompts: Sequence[Prompt], num_generations: int, ids: Tensor, logprobs: Tensor) -> Rollouts:
        is_eos = torch.isin(ids, torch.tensor(self.policy.eos_token_ids))
        # A token counts until the first EOS, that one included; what stands behind it was never part of the text.
        mask = (is_eos.long().cumsum(1) - is_eos.long()) == 0
        width = int(mask.sum(1).max())
        ids, mask, logprobs, is_eos = (states[:, :width] for states in (ids, mask, logprobs, is_eos))
        reasons: list[FinishReason] = ["eos" if ended else "length" for ended in (is_eos & mask).any(1)]
        contents = [row[keep & ~ended].tolist() for row, keep, ended in zip(ids, mask, is_eos, strict=True)]
        groups = TokenGroups(
            prompt_ids=tuple(prompt.token_ids for prompt in prompts),
            group_sizes=(num_generations,) * len(prompts),
            completion_ids=ids.masked_fill(~mask, 0),
            mask=mask,
        )
        return Rollouts(
            prompts=tuple(prompts),
            groups=groups,
            texts=tuple(self.policy.tokenizer.batch_decode(contents, skip_special_tokens=True)),
            logprobs=logprobs.masked_fill(~mask, 0.0),
            finish_reasons=tuple(reasons),
        )
