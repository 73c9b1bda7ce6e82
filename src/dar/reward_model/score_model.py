"""Scores of whole conversations by a sequence-classification model with one output.

Three ways to the same number, the first that the architecture allows:

* packed: conversations that begin alike share their beginning (`packing.py`), nothing is padded;
* padded: the decoder on a padded batch, the state of each row's last token through the head;
* whole: the model's own forward pass, for architectures that read something else than the last token's state.

What is the last token follows transformers: the rightmost that is not the model's padding token.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dar.batch import TokenGroups, pad_rows
from dar.policies.precision import Precision
from dar.policies.text.logprobs import can_pack, hidden_states, packed_states, unwrapped
from dar.policies.text.rotary import require_fixed

log = logging.getLogger(__name__)

TokenRow = tuple[int, ...]
Unit = Sequence[TokenRow]
"""Conversations that are kept together, because they probably begin alike: a prompt's completions, or a pair."""


class ScoreModel(nn.Module):
    """A sequence-classification model whose forward returns one score per conversation.

    Args:
        model: a transformers sequence-classification model with one output, or a peft model around one; fp32.
        packed: share common beginnings where the architecture allows it; False forces a padded pass.
    """

    model: Any

    def __init__(self, model: Any, *, packed: bool = True) -> None:
        super().__init__()
        self.model = model
        inner = unwrapped(model)
        self.pad_id: int | None = inner.config.get_text_config().pad_token_id
        self.way: Literal["packed", "padded", "whole"] = "whole"
        if reads_last_token(inner):
            self.way = "packed" if packed and can_pack(inner) else "padded"

    def forward(self, units: Sequence[Unit]) -> Tensor:
        """[N] fp32 scores of the units' rows, in order."""
        rows = [self._trimmed(row) for unit in units for row in unit]
        require_fixed(unwrapped(self.model), max(map(len, rows)))
        match self.way:
            case "packed":
                return self._head(packed_states(unwrapped(self.model), regrouped(rows, map(len, units)))[0])
            case "padded":
                return self._head(padded_last_states(unwrapped(self.model), rows))
            case "whole":
                ids, mask = pad_rows(rows, pad_id=self.pad_id or 0)
                device = self.model.device
                return self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits[:, 0].float()

    def batches(self, units: Sequence[Unit], max_tokens: int) -> list[list[int]]:
        """Indices of the units by length, in batches of at most `max_tokens` tokens, padding counted.

        A unit larger than that stands alone.
        """
        order = sorted(range(len(units)), key=lambda index: -max(map(len, units[index])))
        found: list[list[int]] = []
        total = longest = 0
        for index in order:
            unit = units[index]
            cost = _packed_length(unit) if self.way == "packed" else len(unit) * (longest or max(map(len, unit)))
            if not found or total + cost > max_tokens:
                found.append([])
                # The longest comes first, and is what the others of its batch are padded to.
                total, longest = 0, max(map(len, unit))
                cost = _packed_length(unit) if self.way == "packed" else len(unit) * longest
            found[-1].append(index)
            total += cost
        return found

    @torch.no_grad()
    def score(self, units: Sequence[Unit], precision: Precision, *, max_tokens: int) -> list[list[float]]:
        """Every unit's scores, computed in batches, without gradient."""
        found: list[list[float]] = [[] for _ in units]
        for batch in self.batches(units, max_tokens):
            chosen = [units[index] for index in batch]
            with precision.compute():
                scores = iter(self(chosen).tolist())
            for index, unit in zip(batch, chosen, strict=True):
                found[index] = list(itertools.islice(scores, len(unit)))
        return found

    def _trimmed(self, row: TokenRow) -> TokenRow:
        """The row up to its last token that is no padding (at least one token)."""
        length = len(row)
        while length > 1 and row[length - 1] == self.pad_id and self.way != "whole":
            length -= 1
        return row[:length]

    def _head(self, states: Tensor) -> Tensor:
        # In fp32 whatever the rest runs in: bf16 has steps of 0.03 at a score of 5.
        with torch.autocast(states.device.type, enabled=False):
            return unwrapped(self.model).score(states.float()).squeeze(-1)


def padded_last_states(model: Any, rows: Sequence[TokenRow]) -> Tensor:
    """[N, D] the decoder's state of each row's last token."""
    ids, mask = pad_rows(rows, pad_id=0)
    device = model.device
    states = hidden_states(model, input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    return states[torch.arange(len(rows), device=device), (mask.sum(1) - 1).to(device)]


def regrouped(rows: Sequence[TokenRow], sizes: Iterable[int]) -> TokenGroups:
    """Rows as groups that share what they begin with, each row with one more token, which alone is asked for.

    Nothing reads that token: the state before it is that of the row's own last one.

    Args:
        rows: token ids, at least one each.
        sizes: rows of each unit; a unit whose rows begin with different tokens becomes one group per row.
    """
    prefixes: list[TokenRow] = []
    group_sizes: list[int] = []
    own: list[TokenRow] = []
    left = iter(rows)
    for size in sizes:
        unit = list(itertools.islice(left, size))
        shared = common_prefix(unit)
        for group in [unit] if shared else [[row] for row in unit]:
            length = shared or len(group[0])
            prefixes.append(group[0][:length])
            group_sizes.append(len(group))
            own += [(*row[length:], 0) for row in group]
    ids, exists = pad_rows(own, pad_id=0)
    mask = torch.arange(ids.shape[1]) == exists.sum(1, keepdim=True) - 1
    return TokenGroups(tuple(prefixes), tuple(group_sizes), ids, mask)


def common_prefix(rows: Unit) -> int:
    """With how many tokens all rows begin."""
    first, last = min(rows), max(rows)
    differing = (place for place, (one, other) in enumerate(zip(first, last)) if one != other)
    return next(differing, min(len(first), len(last)))


def _packed_length(unit: Unit) -> int:
    shared = common_prefix(unit)
    return shared + sum(len(row) - shared for row in unit)


@torch.no_grad()
def reads_last_token(model: Any) -> bool:
    """Whether the model's own score of a few tokens is its `score` layer on the decoder's last state."""
    head = getattr(model, "score", None)
    if head is None:
        return False
    config = model.config.get_text_config()
    tokens = [token for token in range(min(6, config.vocab_size)) if token != config.pad_token_id]
    ids = torch.tensor([tokens], device=model.device)
    own = head(padded_last_states(model, [tuple(tokens)]).to(next(head.parameters()).dtype))
    expected = model(input_ids=ids).logits
    return torch.allclose(own.float(), expected.float(), rtol=1e-3, atol=1e-3)
