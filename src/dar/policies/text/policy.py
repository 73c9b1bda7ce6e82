"""A policy with its reference: the model that is trained and the π₀ it is held against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dar.batch import TokenGroups, TokenOutputs
from dar.errors import ConfigError
from dar.policies.base import ModelPolicy
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.saving import save_model
from dar.policies.text.compiling import compiled_layers
from dar.policies.text.critic import Critic
from dar.policies.text.divergence import HeldTokens
from dar.policies.text.frozen import keep_frozen, shrink
from dar.policies.text.head import check_head, logits_of
from dar.policies.text.loading import eos_token_ids
from dar.policies.text.logprobs import LogprobModel, unwrapped


class Policy(ModelPolicy[LogprobModel]):
    """The trainable model, its tokenizer, and the reference π₀.

    π₀ is, in this order: the model given explicitly; the policy's own base with the adapter off (LoRA); a frozen copy
    of the initial policy, its linear layers in the compute precision, or in the one it was saved in if that has fewer
    bytes.

    Args:
        model: a transformers causal language model, or a peft model around one. Moved to the device.
        tokenizer: its tokenizer.
        precision: device and compute precision.
        temperature: divides the logits of policy and reference alike.
        reference: an explicit π₀, or None.
        with_reference: False leaves π₀ out altogether (nothing will read it).
        reference_moves: `sync_reference` will be called, so π₀ is kept in fp32, to which small steps can be added.
        critic: trained along with the policy, or None.

    Raises:
        ConfigError: no EOS token exists, or the architecture's head is not understood.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        precision: Precision,
        *,
        temperature: float,
        reference: Any | None = None,
        with_reference: bool = True,
        reference_moves: bool = False,
        critic: Critic | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids(unwrapped(model).generation_config, tokenizer)
        check_head(unwrapped(model.to(precision.device)))
        critic = None if critic is None else critic.to(precision.device)
        self.is_lora = hasattr(model, "disable_adapter")
        self._reference_moves = reference_moves
        super().__init__(
            LogprobModel(model, temperature=temperature, critic=critic),
            precision,
            reference=reference,
            with_reference=with_reference,
        )

    def _frozen(self, model: Any) -> LogprobModel:
        model.requires_grad_(False)
        model.eval()
        keep_frozen(model, check_head)
        if self._reference_moves:
            return LogprobModel(model.float().to(self.precision.device), temperature=self.module.temperature)
        module = LogprobModel(model.to(self.precision.device), temperature=self.module.temperature)
        # Only the linear layers change dtype: autocast would cast exactly these, so the copy computes bit for bit
        # what the policy computed before training. So does what of the rest fits fewer bytes without rounding.
        tied = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding)
                for parameter in module.parameters()}  # fmt: skip
        for layer in model.modules():
            if self.precision.dtype != torch.float32 and isinstance(layer, nn.Linear) and id(layer.weight) not in tied:
                layer.to(self.precision.dtype)
        shrink(model)
        return module

    @contextlib.contextmanager
    def training(self, *, compiled: bool = False) -> Iterator[None]:
        # train() is what switches transformers' gradient checkpointing on; dropout is 0 either way.
        self.trained.train()
        try:
            with compiled_layers(self.trained) if compiled else contextlib.nullcontext():
                yield
        finally:
            self.trained.eval()

    def outputs(self, groups: TokenGroups, wants: Wants) -> TokenOutputs:
        held = None if wants.held is None else self.held_tokens(groups, wants.held)
        with self.precision.compute():
            return self.trained(groups, with_logits=wants.logits, with_values=wants.values, held=held)

    @torch.no_grad()
    def held_tokens(self, groups: TokenGroups, rows: Tensor) -> HeldTokens:
        """What π₀ says of whole distributions, for `module` to hold π_θ to it at the tokens of some rows [B] bool."""
        module = self._reference_module()
        if isinstance(module, FSDPModule):
            raise ConfigError(
                "runtime.sharding is full, but the method holds rows to π₀ over the whole vocabulary, which needs π₀'s "
                "head outside of a pass: set runtime.sharding=none"
            )
        model = unwrapped(module.model)

        def ref_logits(states: Tensor) -> Tensor:
            with self._as_reference():
                return logits_of(model, states)

        with self.precision.compute(), self._as_reference():
            states, _ = module.states(model, groups)
        return HeldTokens(rows, states, ref_logits)

    @torch.no_grad()
    def values(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        if self.module.critic is None:
            raise ValueError("this policy was built without a critic")
        return self._in_parts(self.module, groups, max_tokens, "values", with_values=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, each shared tensor once; the critic's begin with `critic.`."""
        found = super().trainable()
        if self.module.critic is not None:
            critic = self.module.critic.named_parameters(prefix="critic")
            found |= {name: p for name, p in critic if p.requires_grad}
        return found

    def write(self, module: LogprobModel, folder: Path, *, card: str, notes: Mapping[str, str] | None) -> None:
        save_model(module.model, self.tokenizer, folder, card=card, notes=notes)
