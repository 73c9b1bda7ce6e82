"""The sampling engine that runs in the trainer's own process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dar.batch import FinishReason, Prompt, Rollouts, Rows
from dar.config.data import DecodingSpec
from dar.policies.text.head import logits_of
from dar.policies.text.logprobs import LogprobModel, unwrapped
from dar.policies.text.policy import Policy
from dar.policies.text.rotary import require_fixed
from dar.rollout.completions import Completions, not_finite
from dar.rollout.in_process.decode import PaddedDecoder, SharedPrefixDecoder
from dar.rollout.in_process.weights import sampling_weights
from dar.rollout.protocol import Progress
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN, draw_constrained, first_stop


def look_every(device: torch.device) -> int:
    """Tokens between two looks at which rows have ended: each look waits for a device to finish what it was told."""
    return 1 if device.type == "cpu" else 16


class InProcessEngine:
    """Samples with the trainer's own weights.

    Args:
        max_tokens: prompt and completion tokens in the cache at once; what does not fit waits its turn.
        in_place: make no copies of weights to sample from.
    """

    reproduces: Literal["tokens", "requests", "nothing"] = "tokens"
    policy: Policy
    module: LogprobModel

    def __init__(self, *, max_tokens: int, in_place: bool = False) -> None:
        self.max_tokens, self.in_place = max_tokens, in_place

    def sync(self, policy: Policy, version: int) -> None:
        """The weights are the policy's own, and so only named."""
        self.policy, self.version = policy, version
        self.completions = Completions(policy.tokenizer)

    def decoder(self, module: LogprobModel) -> SharedPrefixDecoder | PaddedDecoder:
        """What decodes with a module of that architecture."""
        return SharedPrefixDecoder(module, self.max_tokens) if module.is_packed else PaddedDecoder(module)

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
        device = self.policy.module.device
        seeds = torch.stack(
            [key.seeds(p.position, k, max_completion_length) for p in prompts for k in range(num_generations)]
        ).to(device)
        written = _Written.empty(len(seeds), max_completion_length, device)
        eos = torch.tensor(self.policy.eos_token_ids, device=device)
        # A stop string is found in text, which needs every token.
        every = 1 if decoding.stop else look_every(device)
        calls, told = itertools.count(1), 0

        def look() -> None:
            nonlocal told
            if not written.is_finite:
                raise not_finite()
            if progress is not None:
                total = int(written.lengths.sum())
                progress(total - told)
                told = total

        def sample(states: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
            tokens, chosen = self._draw(states, seeds[rows, positions], positions, decoding)
            # The decoder may keep rows that have ended among the others; what is drawn for them counts for nothing.
            running = ~written.ended[rows]
            written.add(rows, positions, running, tokens, chosen, eos)
            if decoding.stop:
                at = rows[running]
                stopped = [first_stop(decoding, text) is not None for text in self._texts(written, at)]
                written.has_stop[at] = torch.tensor(stopped, dtype=torch.bool, device=device)
            if next(calls) % every:
                return tokens, None
            look()
            return tokens, written.ended[rows]

        precision = self.policy.precision
        with (
            precision.compute(),
            self.policy.sampler() as self.module,
            sampling_weights(self.module.model, precision.dtype, batch_size=len(seeds), in_place=self.in_place),
        ):
            self.decoder(self.module).run(prompts, num_generations, max_completion_length, sample)
        look()
        written = written.to(torch.device("cpu"))
        return self.completions.rollouts(
            prompts, written.ids, written.lengths, written.logprobs, written.finish_reasons(), decoding, self.version
        )

    def _draw(self, states: Tensor, seeds: Tensor, positions: Tensor, decoding: DecodingSpec) -> tuple[Tensor, Tensor]:
        """One token per row and its log-probability."""
        module = self.module
        logits = logits_of(unwrapped(module.model), states)
        return draw_constrained(logits, seeds, positions, module.temperature, decoding, self.policy.eos_token_ids)

    def _texts(self, written: _Written, rows: Tensor) -> list[str]:
        """What rows say so far (an EOS is none of the text, whatever the tokenizer says)."""
        ends = (written.lengths - written.has_eos.long())[rows].tolist()
        return self.completions.texts([row[:end] for row, end in zip(written.ids[rows].tolist(), ends, strict=True)])


@dataclass(frozen=True)
class _Written(Rows):
    """The completions so far.

    ids, logprobs: [B, T], 0 where nothing is written yet.
    lengths: [B] tokens written.
    has_eos, has_stop: [B] bool, the last token written is an EOS; it completed a stop string.
    is_finite: bool, all log-probabilities are; where logits are not, neither is that of the drawn token.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    has_eos: Tensor
    has_stop: Tensor
    is_finite: Tensor

    @classmethod
    def empty(cls, num_rows: int, max_new_tokens: int, device: torch.device) -> _Written:
        return cls(
            ids=torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device),
            logprobs=torch.zeros(num_rows, max_new_tokens, dtype=torch.float32, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=device),
            has_eos=torch.zeros(num_rows, dtype=torch.bool, device=device),
            has_stop=torch.zeros(num_rows, dtype=torch.bool, device=device),
            is_finite=torch.ones((), dtype=torch.bool, device=device),
        )

    def add(
        self, rows: Tensor, positions: Tensor, running: Tensor, tokens: Tensor, logprobs: Tensor, eos: Tensor
    ) -> None:
        """Writes a token to each of these rows that is running still (by `where`: a mask would be waited for)."""
        self.is_finite.logical_and_(logprobs.isfinite().all())
        self.ids[rows, positions] = torch.where(running, tokens, 0)
        self.logprobs[rows, positions] = torch.where(running, logprobs, 0.0)
        self.lengths[rows] += running
        self.has_eos[rows] |= running & torch.isin(tokens, eos)

    @property
    def ended(self) -> Tensor:
        """[B] bool."""
        return self.has_eos | self.has_stop

    def finish_reasons(self) -> tuple[FinishReason, ...]:
        return tuple(
            "eos" if eos else "stop" if stop else "length"
            for eos, stop in zip(self.has_eos.tolist(), self.has_stop.tolist(), strict=True)
        )
