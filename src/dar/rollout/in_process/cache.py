"""Keys and values while sampling: each prompt's once for its group, each completion's own in a preallocated block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dar.policies.text.packing import PackedGroups, Sight


@dataclass
class _Layer:
    """prompt_keys, prompt_values: [P, G, L, D]. keys, values: [R, G, T, D]."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class DecodeCache:
    """The attention state of R running rows that belong to P prompts.

    Its tensors are on the device. What Python decides by is known without asking it: between two rearrangements all
    rows grow by a token a step.

    max_new_tokens: room of each row (T).
    device: of the model.
    prompt_lengths: [P].
    groups: [R] prompt of each row, ascending.
    lengths: [R] own tokens that are in the cache (the one being processed not counted).
    longest_prompt: of `prompt_lengths`, 0 where there are none.
    longest: of prompt and own tokens together, the one being processed counted.
    width: of own tokens, that one counted.
    """

    max_new_tokens: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prompt_lengths: Tensor = field(init=False)
    groups: Tensor = field(init=False)
    lengths: Tensor = field(init=False)
    longest_prompt: int = 0
    longest: int = 0
    width: int = 0
    _layers: dict[int, _Layer] = field(default_factory=dict)
    _fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _slots: Tensor = field(init=False)
    _slot_of_row: Tensor = field(init=False)
    _is_full: bool = True
    _rows: Tensor = field(init=False)
    _is_even: bool = True
    _biases: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.prompt_lengths = self.groups = self.lengths = nothing

    @property
    def num_rows(self) -> int:
        return len(self.groups)

    def positions(self) -> Tensor:
        """[R] position id of each row's newest token."""
        return self.prompt_lengths[self.groups] + self.lengths

    def add_prompts(self, layer: int, keys: Tensor, values: Tensor, packed: PackedGroups) -> None:
        """As `DecodeStore.add_prompts`."""
        self._fresh[layer] = (
            packed.prompts.pad(keys).transpose(1, 2).contiguous(),
            packed.prompts.pad(values).to(keys.dtype).transpose(1, 2).contiguous(),
        )

    def rearrange(self, keep: Tensor, new_prompt_lengths: Tensor, num_generations: int) -> None:
        """Drops finished rows (and prompts without rows), and gives each newly read prompt its rows.

        Args:
            keep: [R] bool.
            new_prompt_lengths: [P'] of the prompts just read; empty when there are none.
            num_generations: rows per new prompt.
        """
        kept_prompts = torch.unique(self.groups[keep])
        renumbered = torch.searchsorted(kept_prompts, self.groups[keep])
        num_new = len(new_prompt_lengths)
        new_rows = torch.arange(num_new, device=self.device).repeat_interleave(num_generations) + len(kept_prompts)
        self.prompt_lengths = torch.cat([self.prompt_lengths[kept_prompts], new_prompt_lengths])
        self.groups = torch.cat([renumbered, new_rows.to(renumbered)])
        self.lengths = torch.cat([self.lengths[keep], self.lengths.new_zeros(len(new_rows))])
        self._measure()
        if not len(self.groups):
            self._layers.clear()
        for index in self._fresh.keys() | self._layers.keys():
            self._layers[index] = self._rebuilt(index, keep, kept_prompts, len(new_rows))
        self._fresh.clear()
        self._index_slots()

    def _rebuilt(self, index: int, keep: Tensor, kept_prompts: Tensor, num_new_rows: int) -> _Layer:
        old, fresh = self._layers.get(index), self._fresh.get(index)
        parts: list[tuple[Tensor, Tensor]] = []
        if old is not None and len(kept_prompts):
            parts.append((old.prompt_keys[kept_prompts], old.prompt_values[kept_prompts]))
        if fresh is not None:
            parts.append(fresh)
        prompts = [torch.cat([_fit(part[which], self.longest_prompt) for part in parts]) for which in (0, 1)]
        heads, size = prompts[0].shape[1], prompts[0].shape[3]
        rows = []
        for which in ("keys", "values"):
            room = prompts[0].new_zeros(num_new_rows, heads, self.max_new_tokens, size)
            rows.append(room if old is None else torch.cat([getattr(old, which)[keep], room]))
        return _Layer(*prompts, *rows)

    def _index_slots(self) -> None:
        """Rows as [P, K] slots, so that a prompt's rows attend to it in one product; missing slots repeat a row."""
        counts = torch.bincount(self.groups, minlength=len(self.prompt_lengths))
        widest = int(counts.max()) if len(counts) else 0
        first = counts.cumsum(0) - counts
        within = torch.arange(self.num_rows, device=self.device) - first[self.groups]
        # With K rows for every prompt, slots and rows are the same thing.
        self._is_full = bool((counts == widest).all())
        self._slots = first.unsqueeze(1) + torch.arange(widest, device=self.device)
        self._slots = self._slots.minimum((first + counts - 1).unsqueeze(1))
        self._slot_of_row = self.groups * widest + within

    def _measure(self) -> None:
        """What every layer of a step needs to know of the rows' lengths, read once."""
        self._rows = torch.arange(self.num_rows, device=self.device)
        self.longest_prompt = int(self.prompt_lengths.max()) if len(self.prompt_lengths) else 0
        self.longest = int(self.positions().max()) + 1 if self.num_rows else 0
        self.width = int(self.lengths.max()) + 1 if self.num_rows else 0
        self._is_even = bool((self.lengths + 1 == self.width).all())
        self._biases.clear()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sight: Sight | None,
        softcap: float | None,
    ) -> Tensor:
        """As `DecodeStore.attend`."""
        cache = self._layers[layer]
        for room, new in (cache.keys, key), (cache.values, value):
            if self._is_even:
                # Rows that began together stand at one place, and a slice is written in a third of the time.
                room[:, :, self.width - 1] = new
            else:
                room[self._rows, :, self.lengths] = new.to(room.dtype)
        grouped = query.to(cache.keys.dtype).unflatten(1, (key.shape[1], -1))
        own = cache.keys[:, :, : self.width], cache.values[:, :, : self.width]
        if query.device.type == "cpu" and softcap is None and sight is None:
            return self._flash(cache, grouped, *own, scale=scale).flatten(1, 2)
        return self._dense(cache, grouped, *own, scale=scale, sight=sight, softcap=softcap).flatten(1, 2)

    def _flash(self, cache: _Layer, grouped: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
        """Both parts by torch's FlashAttention kernel for the CPU, joined through their log-sum-exps.

        Heads that share a key stand as queries of one head: [R, G, repeats, D] in and out.
        """
        repeats = grouped.shape[2]
        prompt_bias, own_bias = self._apart_biases(grouped)
        own, own_lse = _attention(grouped, keys, values, own_bias, scale)
        slots = self._by_slot(grouped)
        prompt, prompt_lse = _attention(slots, cache.prompt_keys, cache.prompt_values, prompt_bias, scale)
        share = torch.sigmoid(self._by_row(prompt_lse, repeats) - own_lse).unsqueeze(-1)
        return torch.lerp(own, self._by_row(prompt, repeats), share.to(own.dtype))

    def _dense(
        self,
        cache: _Layer,
        grouped: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        sight: Sight | None,
        softcap: float | None,
    ) -> Tensor:
        """The definition, with scores written out: any rule of who sees whom, any soft cap, any device."""
        repeats, width = grouped.shape[2], keys.shape[2]
        prompt_scores = self._by_slot(grouped) @ cache.prompt_keys.transpose(-1, -2)
        own_scores = grouped @ keys.transpose(-1, -2)
        scores = torch.cat([self._by_row(prompt_scores, repeats), own_scores], -1) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = functional.softmax(scores + self._bias(width, sight, scores), dim=-1)
        length = prompt_scores.shape[-1]
        prompt = self._by_slot(weights[..., :length]) @ cache.prompt_values
        return weights[..., length:] @ values + self._by_row(prompt, repeats)

    def advance(self) -> None:
        """The newest token of every row is now in the cache."""
        self.lengths = self.lengths + 1
        self.longest, self.width = self.longest + 1, self.width + 1
        self._biases.clear()

    def _by_slot(self, rows: Tensor) -> Tensor:
        """[R, G, repeats, X] → [P, G, K·repeats, X]: a prompt's rows as one set of queries."""
        if not self._is_full:
            rows = rows[self._slots.flatten()]
        return rows.unflatten(0, self._slots.shape).transpose(1, 2).flatten(2, 3)

    def _by_row(self, slots: Tensor, repeats: int) -> Tensor:
        """[P, G, K·repeats, …] → [R, G, repeats, …]."""
        rows = slots.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)
        return rows if self._is_full else rows[self._slot_of_row]

    def _apart_biases(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """([P, 1, 1, L], [R, 1, 1, width]): `_bias` without a rule, prompt and own keys apart; None hides nothing."""
        if "apart" not in self._biases:
            self._biases["apart"] = (
                _bias_from(self.prompt_lengths, like.dtype),
                _bias_from(self.lengths + 1, like.dtype),
            )
        return self._biases["apart"]

    def _bias(self, width: int, sight: Sight | None, like: Tensor) -> Tensor:
        """[R, 1, 1, L + width] 0 where a key is seen, −∞ where it is padding or out of sight.

        The same for every layer of a step that has the same rule.
        """
        if sight in self._biases:
            return self._biases[sight]
        prompt_lengths = self.prompt_lengths[self.groups].unsqueeze(1)
        own, shared = (torch.arange(length, device=self.device) for length in (width, self.longest_prompt))
        at = torch.cat([shared.expand(self.num_rows, -1), prompt_lengths + own], 1)
        exists = torch.cat([shared < prompt_lengths, own <= self.lengths.unsqueeze(1)], 1)
        if sight is not None:
            exists &= sight(self.positions().unsqueeze(1), at)
        bias = torch.zeros(exists.shape, dtype=like.dtype, device=self.device)
        bias = bias.masked_fill_(~exists, float("-inf"))[:, None, None]
        self._biases[sight] = bias
        return bias


def _bias_from(lengths: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[S] lengths → [S, 1, 1, longest]: 0 on the first `length` keys, −∞ behind them; None if all are as long."""
    beyond = torch.arange(int(lengths.max())) >= lengths.unsqueeze(1)
    if not beyond.any():
        return None
    return torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None]


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(output [S, H, Q, D], log-sum-exp [S, H, Q])."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )


def _fit(states: Tensor, width: int) -> Tensor:
    """[P, G, L, D] cut or padded to L = width."""
    missing = width - states.shape[2]
    return functional.pad(states, (0, 0, 0, missing)) if missing > 0 else states[:, :, :width]
