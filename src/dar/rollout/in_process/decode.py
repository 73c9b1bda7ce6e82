"""Token by token: the shared-prefix decoder, and the plain one for architectures it cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dar.batch import Prompt, pad_rows
from dar.policies.text.attention import placed
from dar.policies.text.logprobs import LogprobModel, flat_hidden_states, hidden_states, unwrapped
from dar.policies.text.packing import pack_prompts
from dar.rollout.in_process.cache import DecodeCache

Sampler = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(states [R, D], rows [R], positions [R]) -> (tokens [R], ended [R]): draws one token for each of some rows, writes it
down, and says which rows have ended, with this token or before; None where it has not looked, so that nobody waits for
a device. All tensors are on the model's."""


@dataclass
class SharedPrefixDecoder:
    """Each prompt is read once; its completions decode against the one copy of its keys and values.

    Finished rows leave the batch, and waiting prompts are admitted as room comes free, so the batch stays full.

    Args:
        module: whose model decodes (it must be packable).
        max_tokens: of prompts and completions in the cache at once; one group is always admitted.
    """

    module: LogprobModel
    max_tokens: int
    _cache: DecodeCache = field(init=False)

    def run(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        max_new_tokens: int,
        sample: Sampler,
    ) -> None:
        """Decodes every row until it ends or has `max_new_tokens`.

        Args:
            prompts: P prompts.
            num_generations: rows per prompt.
            max_new_tokens: most tokens per row.
            sample: draws and keeps tokens; rows are numbered group-major over all prompts.
        """
        device = self.module.device
        cache = self._cache = DecodeCache(max_new_tokens, device)
        waiting = list(range(len(prompts)))
        rows = torch.zeros(0, dtype=torch.int64, device=device)
        states: Tensor | None = None
        while True:
            admitted = self._admit(waiting, prompts, num_generations, max_new_tokens)
            if admitted:
                fresh = self._read([prompts[index] for index in admitted])
                lengths = torch.tensor([len(prompts[index].token_ids) for index in admitted], device=device)
                cache.rearrange(torch.ones_like(rows, dtype=torch.bool), lengths, num_generations)
                new_rows = [index * num_generations + k for index in admitted for k in range(num_generations)]
                rows = torch.cat([rows, torch.tensor(new_rows, device=device)])
                fresh = fresh.repeat_interleave(num_generations, 0)
                states = fresh if states is None else torch.cat([states, fresh])
            if states is None or len(rows) == 0:
                return
            tokens, ended = sample(states, rows, cache.lengths)
            if ended is not None or cache.width == max_new_tokens:
                running = cache.lengths + 1 < max_new_tokens
                if ended is not None:
                    running &= ~ended
                if self._worth_dropping(running):
                    cache.rearrange(running, rows.new_zeros(0), 0)
                    rows, tokens = rows[running], tokens[running]
            states = self._step(tokens) if len(rows) else None

    def _admit(
        self, waiting: list[int], prompts: Sequence[Prompt], num_generations: int, max_new_tokens: int
    ) -> list[int]:
        """Takes as many prompts off the queue as fit the cache."""
        longest = self._cache.longest_prompt
        num_prompts, num_rows = len(self._cache.prompt_lengths), self._cache.num_rows
        admitted = []
        while waiting:
            longest = max(longest, len(prompts[waiting[0]].token_ids))
            num_prompts, num_rows = num_prompts + 1, num_rows + num_generations
            if num_rows > num_generations and num_prompts * longest + num_rows * max_new_tokens > self.max_tokens:
                break
            admitted.append(waiting.pop(0))
        return admitted

    def _worth_dropping(self, running: Tensor) -> bool:
        """Dropping rows copies the cache of the others: done for an eighth of them, or when a row has no room left."""
        finished = int((~running).sum())
        return finished * 8 >= len(running) or self._cache.width == self._cache.max_new_tokens

    def _read(self, prompts: Sequence[Prompt]) -> Tensor:
        """[P', D] states after each prompt's last token; their keys and values are kept."""
        packed = placed(pack_prompts([prompt.token_ids for prompt in prompts]), self.module.device)
        model, layout = unwrapped(self.module.model), {"packed": packed, "decoding": self._cache}
        return flat_hidden_states(model, packed.ids, packed.positions, packed.longest, **layout)[packed.sources]

    def _step(self, tokens: Tensor) -> Tensor:
        """[R, D] states after each row's newest token."""
        model, cache = unwrapped(self.module.model), self._cache
        states = flat_hidden_states(model, tokens, cache.positions(), cache.longest, decoding=cache)
        cache.advance()
        return states


@dataclass
class PaddedDecoder:
    """transformers' own cache, prompts padded to one length and repeated for each completion."""

    module: LogprobModel

    def run(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        max_new_tokens: int,
        sample: Sampler,
    ) -> None:
        """As `SharedPrefixDecoder.run`."""
        device, model = self.module.device, unwrapped(self.module.model)
        # Prompts stand flush right, so that every completion continues at the same column.
        reversed_ids, reversed_mask = pad_rows([p.token_ids[::-1] for p in prompts], pad_id=0)
        ids, attention = reversed_ids.flip(1).to(device), reversed_mask.flip(1).long().to(device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        # Which prompt each row completes: recurrent layers have no `batch_repeat_interleave`.
        order: Any = torch.arange(len(prompts), device=device).repeat_interleave(num_generations)
        rows = torch.arange(len(order), device=device)
        for t in range(max_new_tokens):
            states = hidden_states(
                model,
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )[:, -1]
            if t == 0:
                cache.reorder_cache(order)
                states, attention, positions = states[order], attention[order], positions[order, -1:]
            tokens, ended = sample(states, rows, torch.full_like(rows, t))
            if ended is not None and ended.all():
                return
            ids, positions = tokens.unsqueeze(1), positions + 1
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
