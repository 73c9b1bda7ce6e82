"""Sampled tokens as the record that training reads, whatever engine they are from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dar.batch import FinishReason, Prompt, Rollouts, TokenGroups
from dar.config.data import DecodingSpec
from dar.errors import RolloutError
from dar.policies.text.rendering import control_token_ids, opened_tag
from dar.rollout.truncation import first_stop


class Completions:
    """Makes texts and records of the tokens that are a tokenizer's."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.control = tokenizer, control_token_ids(tokenizer)

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """What rows of tokens say, control tokens removed."""
        return self.tokenizer.batch_decode([[each for each in row if each not in self.control] for row in rows])

    def rollouts(
        self, prompts: Sequence[Prompt], ids: Tensor, lengths: Tensor, logprobs: Tensor,
        finish_reasons: tuple[FinishReason, ...], decoding: DecodingSpec, version: int,
    ) -> Rollouts:  # fmt: skip
        """Completions of prompts, group-major: tokens [B, T] with their EOS, how many there are of each [B], and
        log-probabilities [B, T] that are 0 past the end. Stop strings are cut from the texts."""
        width, size = int(lengths.max()), len(ids) // len(prompts)
        # An EOS is none of the text, whatever the tokenizer says.
        ends = [length - (reason == "eos") for length, reason in zip(lengths.tolist(), finish_reasons, strict=True)]
        texts = self.texts([row[:end] for row, end in zip(ids.tolist(), ends, strict=True)])
        return Rollouts(
            prompts=tuple(prompts),
            groups=TokenGroups(
                prompt_ids=tuple(prompt.token_ids for prompt in prompts),
                group_sizes=(size,) * len(prompts),
                completion_ids=ids[:, :width],
                mask=torch.arange(width) < lengths.unsqueeze(1),
            ),
            texts=tuple(
                opened_tag(self.tokenizer, prompts[row // size].token_ids, text) + text[: first_stop(decoding, text)]
                for row, text in enumerate(texts)
            ),
            logprobs=logprobs[:, :width],
            finish_reasons=finish_reasons,
            versions=(version,) * len(texts),
        )


def not_finite() -> RolloutError:
    """What there is to say of logits that are not."""
    return RolloutError(
        "the policy's logits are not finite, so nothing can be sampled from it. The weights have probably diverged: "
        "continue from an earlier checkpoint with a lower optim.learning_rate, or use runtime.precision=fp32."
    )
