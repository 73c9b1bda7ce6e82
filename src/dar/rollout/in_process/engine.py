"""The sampling engine that runs in the trainer's own process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dar.batch import FinishReason, Prompt, Rollouts, TokenGroups
from dar.config.data import DecodingSpec
from dar.errors import RolloutError
from dar.policies.text.head import logits_of
from dar.policies.text.logprobs import unwrapped
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import control_token_ids, opened_tag
from dar.policies.text.rotary import require_fixed
from dar.rollout.in_process.decode import PaddedDecoder, SharedPrefixDecoder
from dar.rollout.in_process.weights import sampling_weights
from dar.rollout.protocol import Progress
from dar.rollout.sampling import SamplingKey, draw
from dar.rollout.truncation import PLAIN, constrained, first_stop


class InProcessEngine:
    """Samples with the trainer's own weights.

    Args:
        max_tokens: prompt and completion tokens in the cache at once; what does not fit waits its turn.
    """

    reproduces: Literal["tokens", "requests", "nothing"] = "tokens"
    policy: Policy

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def sync(self, policy: Policy, version: int) -> None:
        """The weights are the policy's own, and so only named."""
        self.policy, self.version = policy, version
        module = policy.module
        self.control = control_token_ids(policy.tokenizer)
        self.decoder = SharedPrefixDecoder(module, self.max_tokens) if module.is_packed else PaddedDecoder(module)

    def close(self) -> None:
        """Nothing is held that is not the policy's."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        *,
        max_completion_length: int,
        key: SamplingKey,
        progress: Progress | None = None,
        decoding: DecodingSpec = PLAIN,
    ) -> Rollouts:
        longest = max(len(prompt.token_ids) for prompt in prompts) + max_completion_length
        require_fixed(unwrapped(self.policy.model), longest)
        seeds = torch.stack(
            [key.seeds(p.position, k, max_completion_length) for p in prompts for k in range(num_generations)]
        )
        written = _Written.empty(*seeds.shape)
        eos = torch.tensor(self.policy.eos_token_ids)

        def sample(states: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            tokens, chosen = self._draw(states, seeds[rows, positions], positions, decoding)
            # The decoder may keep rows that have ended among the others; what is drawn for them counts for nothing.
            running = ~written.ended[rows]
            at = rows[running]
            written.ids[at, positions[running]] = tokens[running]
            written.logprobs[at, positions[running]] = chosen[running]
            written.lengths[at] += 1
            written.has_eos[at] = torch.isin(tokens[running], eos)
            if decoding.stop:
                written.has_stop[at] = torch.tensor(
                    [first_stop(decoding, text) is not None for text in self._texts(written, at)], dtype=torch.bool
                )
            if progress is not None:
                progress(len(at))
            return tokens, written.ended[rows]

        precision, num_rows = self.policy.precision, len(seeds)
        with precision.compute(), sampling_weights(self.policy.model, precision.dtype, batch_size=num_rows):
            self.decoder.run(prompts, num_generations, max_completion_length, sample)
        return self._rollouts(prompts, num_generations, written, decoding)

    def _draw(self, states: Tensor, seeds: Tensor, positions: Tensor, decoding: DecodingSpec) -> tuple[Tensor, Tensor]:
        """One token per row and its log-probability, on the CPU."""
        module = self.policy.module
        logits = logits_of(unwrapped(module.model), states)
        if module.temperature != 1.0:
            logits = logits / module.temperature
        logits = constrained(decoding, logits, positions, self.policy.eos_token_ids)
        probabilities = torch.softmax(logits, dim=-1)
        tokens = draw(probabilities, seeds.to(probabilities.device))
        # A drawn token's probability is above 0, so its logarithm is as good as a log-softmax of all.
        logprobs = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log()
        # One logit that is not finite makes its whole row so.
        if not torch.isfinite(logprobs).all():
            raise RolloutError(
                "the policy's logits are not finite, so nothing can be sampled from it. The weights have probably "
                "diverged: continue from an earlier checkpoint with a lower optim.learning_rate, or use "
                "runtime.precision=fp32."
            )
        return tokens.cpu(), logprobs.cpu()

    def _texts(self, written: _Written, rows: Tensor) -> list[str]:
        """What rows say so far, control tokens removed (an EOS is none of the text, whatever the tokenizer says)."""
        lengths = (written.lengths - written.has_eos.long())[rows].tolist()
        contents = [
            [token for token in ids[:length] if token not in self.control]
            for ids, length in zip(written.ids[rows].tolist(), lengths, strict=True)
        ]
        return self.policy.tokenizer.batch_decode(contents)

    def _rollouts(
        self, prompts: Sequence[Prompt], num_generations: int, written: _Written, decoding: DecodingSpec
    ) -> Rollouts:
        width = int(written.lengths.max())
        texts = self._texts(written, torch.arange(len(written.ids)))
        groups = TokenGroups(
            prompt_ids=tuple(prompt.token_ids for prompt in prompts),
            group_sizes=(num_generations,) * len(prompts),
            completion_ids=written.ids[:, :width],
            mask=torch.arange(width) < written.lengths.unsqueeze(1),
        )
        return Rollouts(
            prompts=tuple(prompts),
            groups=groups,
            texts=tuple(
                opened_tag(self.policy.tokenizer, prompts[row // num_generations].token_ids, text)
                + text[: first_stop(decoding, text)]
                for row, text in enumerate(texts)
            ),
            logprobs=written.logprobs[:, :width],
            finish_reasons=written.finish_reasons(),
            versions=(self.version,) * len(texts),
        )


@dataclass
class _Written:
    """The completions so far.

    ids, logprobs: [B, T], 0 where nothing is written yet.
    lengths: [B] tokens written.
    has_eos, has_stop: [B] bool, the last token written is an EOS; it completed a stop string.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    has_eos: Tensor
    has_stop: Tensor

    @classmethod
    def empty(cls, num_rows: int, max_new_tokens: int) -> _Written:
        return cls(
            ids=torch.zeros(num_rows, max_new_tokens, dtype=torch.int64),
            logprobs=torch.zeros(num_rows, max_new_tokens, dtype=torch.float32),
            lengths=torch.zeros(num_rows, dtype=torch.int64),
            has_eos=torch.zeros(num_rows, dtype=torch.bool),
            has_stop=torch.zeros(num_rows, dtype=torch.bool),
        )

    @property
    def ended(self) -> Tensor:
        """[B] bool."""
        return self.has_eos | self.has_stop

    def finish_reasons(self) -> tuple[FinishReason, ...]:
        return tuple(
            "eos" if eos else "stop" if stop else "length"
            for eos, stop in zip(self.has_eos.tolist(), self.has_stop.tolist(), strict=True)
        )
