"""The policy with its reference and critic, and what restricts its weights."""

from __future__ import annotations

from typing import Any

import torch

from dar.assembly.adapter import adapted, has_adapter, require_named_base
from dar.assembly.data import build_prompts
from dar.assembly.objects import Objects
from dar.config.actor_critic import ActorCriticSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.learn.null_space import NullSpaceConstraint, gram_matrices, null_space_projection
from dar.policies.precision import Precision
from dar.policies.text.critic import make_critic
from dar.policies.text.frozen import asks_its_base, keep_frozen
from dar.policies.text.head import check_head
from dar.policies.text.loading import checkpoint_layers, disable_dropout, load_model
from dar.policies.text.logprobs import hidden_states, unwrapped
from dar.policies.text.policy import Policy


def build_policy(
    spec: RunSpec,
    objects: Objects,
    tokenizer: Any,
    precision: Precision,
    *,
    with_reference: bool,
) -> Policy:
    """The policy, with a reference if asked for, and the critic of a method that has one.

    Raises:
        ConfigError: a model cannot be loaded or trained.
    """
    if objects.lora is not None and spec.model.lora is not None:
        raise ConfigError("peft_config and overrides both describe an adapter: leave one of them out")
    lora = objects.lora or spec.model.lora
    model = objects.model if objects.model is not None else load_model(spec.model, as_saved=lora is not None)
    disable_dropout(model)
    is_adapted = lora is not None or has_adapter(model)
    # What is trained is fp32 whatever the model came in: a small step would be lost to bf16's rounding.
    if is_adapted and asks_its_base(lora or getattr(model, "active_peft_config", None)):
        keep_frozen(model if lora is None else model.requires_grad_(False), check_head)
    else:
        model = model.float()
    if is_adapted:
        if spec.reference_sync is not None:
            raise ConfigError("reference_sync needs a reference of its own, but with an adapter the base model is π₀")
        if objects.model is not None:
            require_named_base(model)
        model = adapted(model.to(precision.device), lora, seed=spec.seed)
    if spec.model.gradient_checkpointing:
        checkpoint_layers(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is trainable: every parameter of the model has requires_grad=False")
    model.eval()
    reference = objects.reference
    if reference is None and spec.reference is not None and with_reference:
        reference = load_model(spec.reference, as_saved=spec.reference_sync is None)
    if reference is not None and with_reference:
        sizes = [each.config.get_text_config().vocab_size for each in (reference, model)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the reference has a vocabulary of {sizes[0]} tokens and the policy one of {sizes[1]}: they cannot be "
                "compared token by token"
            )
    return Policy(
        model,
        tokenizer,
        precision,
        temperature=spec.sampling.temperature,
        reference=reference if with_reference else None,
        with_reference=with_reference,
        reference_moves=spec.reference_sync is not None,
        critic=make_critic(model, spec.algorithm.critic) if isinstance(spec.algorithm, ActorCriticSpec) else None,
    )


def build_null_space(spec: RunSpec, policy: Policy, tokenizer: Any, context: int | None) -> NullSpaceConstraint | None:
    """The constraint of `optim.null_space`, its Gram matrices from one pass over the general prompts.

    Raises:
        ConfigError: the policy trains an adapter, or no layer is selected.
        DataError: the prompts cannot be read.
    """
    asked = spec.optim.null_space
    if asked is None:
        return None
    prompts = build_prompts(spec, asked.data, None, tokenizer, context).prompts
    model = unwrapped(policy.model)
    head = model.get_output_embeddings()

    def select(name: str, layer: torch.nn.Linear) -> bool:
        return layer is not head and (asked.layers == "all" or ".mlp." in name)

    def read() -> None:
        for prompt in prompts:
            hidden_states(model, input_ids=torch.tensor([prompt.token_ids], device=model.device), use_cache=False)

    with torch.no_grad():
        grams = gram_matrices(model, read, select)
    projections = {
        name: null_space_projection(gram, relative_threshold=asked.threshold).float() for name, gram in grams.items()
    }
    return NullSpaceConstraint({name: model.get_submodule(name) for name in grams}, projections)
