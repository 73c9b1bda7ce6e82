"""Log-probabilities of completions under a causal language model: the plain, padded path.

Only completion positions go through the head, a chunk at a time, so the [rows, tokens, vocabulary] logits never exist
at once; in the backward pass each chunk is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dar.batch import TokenGroups, pad_rows
from dar.errors import ConfigError

_HEAD_CHUNK = 512
"""Positions per pass through the head: 512 × 49 152 fp32 logits are 100 MB."""


class LogprobModel(nn.Module):
    """A causal language model whose forward returns log-probabilities of given completions.

    Being an `nn.Module` whose parameters are the model's, it can be wrapped by DDP and FSDP as it is.
    """

    model: Any

    def __init__(self, model: Any, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, groups: TokenGroups) -> Tensor:
        """log π(y_t | x, y_<t) of every sampled token, the logits divided by the temperature.

        Args:
            groups: prompts and completions.

        Returns:
            [B, T] fp32 nats, 0 where masked.
        """
        device = next(self.parameters()).device
        prompts = list(groups.row_prompts())
        lengths = groups.lengths().tolist()
        completions = groups.completion_ids.tolist()
        rows = [[*prompt, *row[:length]] for prompt, row, length in zip(prompts, completions, lengths, strict=True)]
        # The pad id is never read: padding is masked, and stands to the right of everything that counts.
        ids, attention = pad_rows(rows, pad_id=0)
        ids, attention = ids.to(device), attention.to(device)
        hidden = self.hidden_states(input_ids=ids, attention_mask=attention.long(), use_cache=False)
        row_index, token_index = groups.mask.nonzero(as_tuple=True)
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        # The state before a token predicts it.
        source = (prompt_lengths[row_index] + token_index - 1).to(device)
        states = hidden[row_index.to(device), source]
        targets = groups.completion_ids[groups.mask].to(device)
        flat = self.head_logprobs(states, targets)
        logprobs = torch.zeros(groups.mask.shape, dtype=torch.float32, device=device)
        return logprobs.index_put((row_index.to(device), token_index.to(device)), flat)

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Last hidden states of the decoder, before the head."""
        return unwrapped(self.model).get_decoder()(**inputs).last_hidden_state

    def head_logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        """log softmax(head(h) / T)[target], in fp32.

        Args:
            states: [N, D] hidden states.
            targets: [N] token ids.

        Returns:
            [N] fp32 nats.
        """
        chunks = zip(states.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), strict=True)
        if not (torch.is_grad_enabled() and states.requires_grad):
            return torch.cat([self._chunk_logprobs(state, target) for state, target in chunks])
        parts = [checkpoint(self._chunk_logprobs, state, target, use_reentrant=False) for state, target in chunks]
        return torch.cat([part for part in parts if part is not None])

    def _chunk_logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(states)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits of hidden states, temperature not applied: the head and what the architecture does after it."""
        base = unwrapped(self.model)
        logits = base.get_output_embeddings()(states).float()
        config = base.config.get_text_config()
        # Cohere multiplies, Granite divides, Gemma bends: the three things architectures do to the head's output.
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scaling := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def unwrapped(model: Any) -> Any:
    """The transformers model inside a peft wrapper (the adapter stays active), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_head(module: LogprobModel) -> None:
    """Compares this file's idea of the head with the model's own logits on a few tokens.

    Raises:
        ConfigError: they differ, so log-probabilities computed here would not be the model's.
    """
    base = unwrapped(module.model)
    device = next(module.parameters()).device
    ids = torch.arange(4, device=device).unsqueeze(0) % base.config.get_text_config().vocab_size
    own = module.logits(module.hidden_states(input_ids=ids, use_cache=False))
    expected = base(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(own, expected, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(base).__name__} does something to its logits that dar does not know (largest difference "
            f"{(own - expected).abs().max():.3g}), so its log-probabilities would be wrong: please report it."
        )
