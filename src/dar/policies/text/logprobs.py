"""Log-probabilities of completions under a causal language model.

The packed path computes each prompt once and no padding; the padded path is the plain definition, kept for
architectures the packed one cannot serve and as the yardstick it is tested against. Either way only completion
positions go through the head, a chunk at a time (`head.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dar.batch import TokenGroups, TokenOutputs, pad_rows
from dar.policies.text import attention
from dar.policies.text.critic import Critic
from dar.policies.text.divergence import HeldTokens, forward_kl
from dar.policies.text.head import decoder_of, head_logits, head_logprobs
from dar.policies.text.packing import PackedGroups, pack
from dar.policies.text.rotary import fixed_length, require_fixed

log = logging.getLogger(__name__)

_SMALL = 3
"""What a number of the configuration is made to find out whether it is one of tokens."""
_SIZES = re.compile("_id$|vocab|hidden_size|intermediate_size|_dim$|(heads|layers|experts)$")
"""Numbers of the configuration that are none of tokens, by name; to try them would only take time."""


class LogprobModel(nn.Module):
    """A causal language model whose forward returns log-probabilities of given completions.

    Being an `nn.Module` whose parameters are the model's, it can be wrapped by DDP and FSDP as it is.

    Args:
        model: a transformers causal language model, or a peft model around one.
        temperature: divides the logits.
        packed: use the shared-prefix layout where the architecture allows it; False forces the padded path.
        critic: gives every sampled token's value along with its log-probability.
    """

    model: Any
    critic: Critic | None

    def __init__(self, model: Any, *, temperature: float, packed: bool = True, critic: Critic | None = None) -> None:
        super().__init__()
        self.model = model
        self.critic = critic
        self.temperature = temperature
        self.is_packed = packed and can_pack(unwrapped(model))
        if self.is_packed and critic is not None and critic.trunk is not None:
            critic.trunk.set_attn_implementation(attention.NAME)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self,
        groups: TokenGroups,
        *,
        with_logits: bool = False,
        with_values: bool = False,
        held: HeldTokens | None = None,
    ) -> TokenOutputs:
        """log π(y_t | x, y_<t) of every sampled token, the logits divided by the temperature.

        Args:
            groups: prompts and completions.
            with_logits: also the sampled tokens' logits.
            with_values: also the critic's values, where there is a critic.
            held: also KL(π₀‖π_θ) at the tokens of these rows.

        Returns:
            [B, T] fp32 each, 0 where masked.
        """
        model = unwrapped(self.model)
        states, targets = self.states(model, groups)
        logprobs = head_logprobs(model, states, targets, temperature=self.temperature)
        values = logits = ref_kl = None
        if self.critic is not None and with_values:
            trunk = self.critic.trunk
            values = self.critic(states if trunk is None else self.states(trunk, groups)[0])
        if with_logits:
            logits = head_logits(model, states, targets, temperature=self.temperature)
        if held is not None:
            mask = groups.mask & held.rows.unsqueeze(1)
            some = mask[groups.mask].to(states.device)
            kl = forward_kl(model, states[some], held.states[some], held.ref_logits, temperature=self.temperature)
            ref_kl = _unflattened(kl, mask)
        return TokenOutputs(
            logprobs=_unflattened(logprobs, groups.mask),
            values=None if values is None else _unflattened(values, groups.mask),
            logits=None if logits is None else _unflattened(logits, groups.mask),
            ref_kl=ref_kl,
        )

    def states(self, model: Any, groups: TokenGroups) -> tuple[Tensor, Tensor]:
        """([M, D] hidden states before each sampled token, [M] those tokens), by the layout this module uses."""
        prompts = (len(prompt) for prompt in groups.row_prompts())
        require_fixed(model, max(map(sum, zip(prompts, groups.lengths.tolist()))))
        return packed_states(model, groups) if self.is_packed else padded_states(model, groups)


def _unflattened(flat: Tensor, mask: Tensor) -> Tensor:
    """[M] numbers of the sampled tokens, row-major, as [B, T] with 0 elsewhere."""
    mask = mask.to(flat.device)
    return torch.zeros(mask.shape, dtype=torch.float32, device=flat.device).masked_scatter(mask, flat)


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """Last hidden states of the decoder, before the head."""
    return decoder_of(model)(**inputs).last_hidden_state


def flat_hidden_states(model: Any, ids: Tensor, positions: Tensor, longest: int, **layout: Any) -> Tensor:
    """[N, D] last hidden states of a flat row of tokens, who sees whom said by `packed` or `decoding`.

    No position is as high as `longest`.
    """
    ids = ids.unsqueeze(0)
    token = attention.row_length.set(longest)
    try:
        return hidden_states(
            model,
            input_ids=ids,
            position_ids=positions.unsqueeze(0),
            # Without one, transformers takes positions that start again for other sequences.
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **layout,
        )[0]
    finally:
        attention.row_length.reset(token)


def packed_states(model: Any, groups: TokenGroups, **layout: Any) -> tuple[Tensor, Tensor]:
    """([M, D] states that predict each sampled token, [M] those tokens), by the shared-prefix layout."""
    packed = attention.placed(pack(groups), model.device)
    states = flat_hidden_states(model, packed.ids, packed.positions, packed.longest, packed=packed, **layout)
    # Not by indexing, whose gradient torch adds up in whatever order its threads come by where a state is read K times.
    return states.index_select(0, packed.sources), packed.targets


def padded_states(model: Any, groups: TokenGroups) -> tuple[Tensor, Tensor]:
    """As `packed_states`, each completion with its own copy of the prompt, padded to the longest row."""
    prompts = list(groups.row_prompts())
    lengths = groups.lengths.tolist()
    completions = groups.completion_ids.tolist()
    rows = [[*prompt, *row[:length]] for prompt, row, length in zip(prompts, completions, lengths, strict=True)]
    # The pad id is never read: padding is masked, and stands to the right of everything that counts.
    ids, mask = pad_rows(rows, pad_id=0)
    hidden = hidden_states(
        model, input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False
    )
    row_index, token_index = groups.mask.nonzero(as_tuple=True)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    # The state before a token predicts it.
    source = prompt_lengths[row_index] + token_index - 1
    states = hidden[row_index.to(model.device), source.to(model.device)]
    return states, groups.completion_ids[groups.mask].to(model.device)


def unwrapped(model: Any) -> Any:
    """The transformers model inside a peft wrapper (the adapter stays active), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Switches the model to `dar`'s attention, and finds out by trying whether the packed pass is the padded one.

    An architecture it cannot serve (no attention backend, recurrent layers, attention sinks, …) keeps its own
    attention, and a warning says so once.
    """
    attention.register()
    before = model.config._attn_implementation
    try:
        problem = _packed_differs(model)
    except Exception as error:  # whatever an unknown architecture raises, the padded path still serves it
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return True
    model.set_attn_implementation(before)
    log.warning(
        "%s cannot use the shared-prefix pass (%s); the padded one is used, which takes more time and memory",
        type(model).__name__,
        problem,
    )
    return False


def _packed_differs(model: Any) -> str | None:
    """What is wrong with the packed pass on a few tokens, or None; the model is left with `dar`'s attention.

    What takes effect only behind many tokens (a window, how many keys are kept, from where a scale grows) is a number
    of the configuration. So each is made small in turn, then all together, and the passes must still agree wherever the
    padded one runs: it does not without a size of its weights, which says nothing.
    """
    config = model.config.get_text_config()
    tokens = torch.arange(30) % config.vocab_size
    room = (fixed_length(config) or 14) - 6
    groups = TokenGroups(
        prompt_ids=(tuple(tokens[:6].tolist()), (int(tokens[5]),)),
        group_sizes=(2, 1),
        completion_ids=tokens[6:].view(3, 8),
        mask=torch.arange(8) < torch.tensor([[3], [8], [2]]).clamp(max=max(1, room)),
    )
    numbers = {name: n for name, n in config.to_dict().items() if type(n) is int and n > _SMALL}
    numbers = {name: n for name, n in numbers.items() if not _SIZES.search(name)}
    harmless: dict[str, int] = {}
    for small in ({}, *({name: n} for name, n in numbers.items()), harmless):
        with _made_small(model, small):
            # Eager attention is the architecture's definition; SDPA leaves out what it has no argument for (soft caps).
            model.set_attn_implementation("eager")
            try:
                padded, _ = padded_states(model, groups)
            except Exception:
                if not small:
                    raise
                continue
            model.set_attn_implementation(attention.NAME)
            packed, _ = packed_states(model, groups, decoding=_EachLayerOnce())
        if small and not padded.isfinite().all():
            continue
        gap = float((packed - padded).abs().max() / padded.abs().max())
        # Written so that NaN fails too.
        if not gap < (1e-3 if padded.dtype == torch.float32 else 1e-2):
            where = f" with {_SMALL} for {', '.join(small)}" if small else ""
            return f"its hidden states differ by {gap:.2g}{where}"
        harmless |= small
    model.set_attn_implementation(attention.NAME)
    return None


class _EachLayerOnce:
    """A sampler's store that takes a layer's keys and values once: it would not know two attentions of one apart."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def add_prompts(self, layer: int, keys: Tensor, values: Tensor, packed: PackedGroups) -> None:
        if layer in self.layers:
            raise ValueError("a layer attends twice")
        self.layers.add(layer)


@contextmanager
def _made_small(model: nn.Module, numbers: Mapping[str, int]) -> Iterator[None]:
    """Inside, numbers of the configuration are `_SMALL`, as are modules' copies (under a part of the name, maybe)."""
    modules = list(model.modules())
    holders = {id(each): vars(each) for each in (*modules, *(getattr(module, "config", module) for module in modules))}
    changed = [
        (holder, key, value)
        for holder in holders.values()
        for key, value in holder.items()
        if type(value) is int and any(key in name and value == number for name, number in numbers.items())
    ]
    try:
        for holder, key, _ in changed:
            holder[key] = _SMALL
        yield
    finally:
        for holder, key, value in changed:
            holder[key] = value
