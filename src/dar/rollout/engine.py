"""The sampling engine: its protocol, and the one that runs in the trainer's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from dar.batch import FinishReason, Prompt, Rollouts, TokenGroups, pad_rows
from dar.errors import RolloutError
from dar.policy import Policy
from dar.policy.logprobs import unwrapped
from dar.rollout.sampling import SamplingKey, inverse_cdf

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
    """Samples with the trainer's own weights: each prompt is read once, its K completions share the result."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

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
        with self.policy.precision.compute():
            ids, logprobs = self._decode(prompts, num_generations, uniforms, progress or (lambda _: None))
        return self._pack(prompts, num_generations, ids, logprobs)

    def _decode(
        self, prompts: Sequence[Prompt], num_generations: int, uniforms: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """([B, T] ids, [B, T] log-probabilities); what follows a row's EOS is meaningless."""
        module, device = self.policy.module, self.policy.precision.device
        # Prompts stand flush right, so that every completion continues at the same column.
        reversed_ids, reversed_mask = pad_rows([p.token_ids[::-1] for p in prompts], pad_id=0)
        ids, attention = reversed_ids.flip(1).to(device), reversed_mask.flip(1).long().to(device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=unwrapped(module.model).config)
        hidden = module.hidden_states(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        )[:, -1]
        cache.batch_repeat_interleave(num_generations)
        hidden, attention = (x.repeat_interleave(num_generations, 0) for x in (hidden, attention))
        position = positions[:, -1:].repeat_interleave(num_generations, 0)
        eos = torch.tensor(self.policy.eos_token_ids, device=device)
        running = torch.ones(len(hidden), dtype=torch.bool, device=device)
        all_ids, all_logprobs = [], []
        for t in range(uniforms.shape[1]):
            token, logprob = self._sample(module.logits(hidden), uniforms[:, t].to(device))
            all_ids.append(token)
            all_logprobs.append(logprob)
            progress(int(running.sum()))
            running &= ~torch.isin(token, eos)
            if t == uniforms.shape[1] - 1 or not running.any():
                break
            position = position + 1
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
            hidden = module.hidden_states(
                input_ids=token.unsqueeze(1),
                attention_mask=attention,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )[:, -1]
        return torch.stack(all_ids, 1).cpu(), torch.stack(all_logprobs, 1).cpu()

    def _sample(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One token per row and its log-probability, from fp32 logits."""
        logprobs = torch.log_softmax(logits / self.policy.module.temperature, dim=-1)
        if not torch.isfinite(logprobs.amax(-1)).all():
            raise RolloutError(
                "the policy's logits are not finite, so nothing can be sampled from it. The weights have probably "
                "diverged: continue from an earlier checkpoint with a lower optim.learning_rate, or use "
                "runtime.precision=fp32."
            )
        token = inverse_cdf(logprobs.exp(), uniforms)
        return token, logprobs.gather(1, token.unsqueeze(1)).squeeze(1)

    def _pack(self, prompts: Sequence[Prompt], num_generations: int, ids: Tensor, logprobs: Tensor) -> Rollouts:
        is_eos = torch.isin(ids, torch.tensor(self.policy.eos_token_ids))
        # A token counts until the first EOS, that one included.
        mask = (is_eos.long().cumsum(1) - is_eos.long()) == 0
        width = int(mask.sum(1).max())
        ids, mask, logprobs = ids[:, :width], mask[:, :width], logprobs[:, :width]
        reasons: list[FinishReason] = ["eos" if ended else "length" for ended in (is_eos[:, :width] & mask).any(1)]
        contents = [row[keep & ~ended].tolist() for row, keep, ended in zip(ids, mask, is_eos[:, :width], strict=True)]
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
            logprobs=logprobs.float().masked_fill(~mask, 0.0),
            finish_reasons=tuple(reasons),
        )
