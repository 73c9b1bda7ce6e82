"""What a run of a causal language model is made of: the policy, its reference and critic, and what restricts it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dar.algorithms.base import Algorithm
from dar.algorithms.flow import FlowGRPO
from dar.assembly.adapter import adapted, has_adapter, require_named_base
from dar.assembly.data import build_prompts
from dar.assembly.engine import build_engine
from dar.assembly.objects import Objects
from dar.collective import num_ranks
from dar.config.actor_critic import ActorCriticSpec
from dar.config.model import ModelSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.learn.adapter_ranks import AdapterRanks
from dar.learn.null_space import NullSpaceConstraint, gram_matrices, null_space_projection
from dar.policies.precision import Precision
from dar.policies.text import loading
from dar.policies.text.critic import make_critic
from dar.policies.text.frozen import asks_its_base, keep_frozen
from dar.policies.text.head import check_head, look_up_sparsely
from dar.policies.text.logprobs import hidden_states, unwrapped
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import prompt_ids
from dar.rollout.protocol import Engine


class TextParts:
    """What differs between runs of one kind of policy and of another.

    tokenizer: reads prompts and writes tokens as text. read: a prompt as tokens, of which there are `vocabulary`.
    context: most tokens of a row, if there is a limit. max_completion_length: of a completion.
    offered: what reward functions may name beside what all may. Raises ConfigError where any of it cannot be had.
    """

    offered: tuple[str, ...] = ()
    policy: Policy

    def __init__(self, spec: RunSpec, model: ModelSpec, objects: Objects) -> None:
        self.spec, self.source, self.objects = spec, model, objects
        self.tokenizer = objects.tokenizer or loading.load_tokenizer(model)
        self.config = objects.model.config if objects.model is not None else loading.load_config(model)
        self.read = partial(prompt_ids, self.tokenizer)
        self.context = loading.context_length(self.config)
        self.vocabulary = self.config.get_text_config().vocab_size
        self.max_completion_length = spec.sampling.max_completion_length

    def require(self, algorithm: Algorithm) -> None:
        """Raises ConfigError where the policy has not what a method reads."""
        if isinstance(algorithm, FlowGRPO):
            raise ConfigError(f"{self.spec.algorithm.type} reads denoising steps, which only model.type flow has")
        if (teacher := self.spec.teacher) is not None:
            size = loading.load_config(teacher).get_text_config().vocab_size
            other = self.tokenizer.get_vocab().items() - loading.load_tokenizer(teacher).get_vocab().items()
            if other or size < self.vocabulary:
                found = f"no {min(other)[0]!r} of its id" if other else f"{size} tokens to its {self.vocabulary}"
                raise ConfigError(f"the teacher {teacher.path} must know the policy's tokens, and has {found}")

    def engine(self, say: Callable[[str], None]) -> Engine:
        return build_engine(self.spec.engine, log_file=Path(self.spec.output_dir) / "vllm.log", say=say)

    def build(self, precision: Precision, *, with_reference: bool) -> Policy:
        """Makes the policy, with a reference if asked for, and the critic of a method that has one.

        Raises:
            ConfigError: a model cannot be loaded or trained.
        """
        spec, source, objects = self.spec, self.source, self.objects
        if objects.lora is not None and source.lora is not None:
            raise ConfigError("peft_config and overrides both describe an adapter: leave one of them out")
        lora = objects.lora or source.lora
        model = objects.model if objects.model is not None else loading.load_model(source, as_saved=lora is not None)
        loading.disable_dropout(model)
        is_adapted = lora is not None or has_adapter(model)
        # What is trained is fp32 whatever the model came in: a small step would be lost to bf16's rounding.
        if is_adapted and asks_its_base(lora or getattr(model, "active_peft_config", None)):
            keep_frozen(model if lora is None else model.requires_grad_(False), check_head)
        else:
            model = model.float()
        if is_adapted:
            if spec.reference_sync is not None:
                raise ConfigError("reference_sync needs a π₀ of its own, but with an adapter the base model is π₀")
            if objects.model is not None:
                require_named_base(model)
            model = adapted(model.to(precision.device), lora, seed=spec.seed)
        if source.gradient_checkpointing:
            loading.checkpoint_layers(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("nothing is trainable: every parameter of the model has requires_grad=False")
        model.eval()
        reference = objects.reference
        if reference is None and spec.other_reference is not None and with_reference:
            reference = loading.load_model(spec.other_reference, as_saved=spec.reference_sync is None)
        if reference is not None and with_reference:
            sizes = [each.config.get_text_config().vocab_size for each in (reference, model)]
            if sizes[0] != sizes[1] and spec.teacher is None:
                raise ConfigError(
                    f"the reference has a vocabulary of {sizes[0]} tokens and the policy one of {sizes[1]}: they "
                    "cannot be compared token by token"
                )
        self.policy = Policy(
            model,
            self.tokenizer,
            precision,
            temperature=spec.sampling.temperature,
            reference=reference if with_reference else None,
            with_reference=with_reference,
            reference_moves=spec.reference_sync is not None,
            critic=make_critic(model, spec.algorithm.critic) if isinstance(spec.algorithm, ActorCriticSpec) else None,
        )
        if num_ranks() == 1:
            look_up_sparsely(self.bare)
        return self.policy

    def ranks(self) -> AdapterRanks | None:
        """How the ranks of adapters shrink, if they do; raises as `AdapterRanks`."""
        return AdapterRanks(schedule, self.policy.model) if (schedule := self.source.rank_schedule) else None

    def constraint(self) -> NullSpaceConstraint | None:
        """That of `optim.null_space` on the policy's weights, its Gram matrices from one pass over the general prompts.

        Raises:
            ConfigError: the policy trains an adapter, or no layer is selected.
            DataError: the prompts cannot be read.
        """
        asked = self.spec.optim.null_space
        if asked is None:
            return None
        prompts = build_prompts(self.spec, asked.data, None, self).prompts
        model = self.bare
        head = model.get_output_embeddings()

        def select(name: str, layer: torch.nn.Linear) -> bool:
            return layer is not head and (asked.layers == "all" or ".mlp." in name)

        def read() -> None:
            for prompt in prompts:
                hidden_states(model, input_ids=torch.tensor([prompt.token_ids], device=model.device), use_cache=False)

        with torch.no_grad():
            grams = gram_matrices(model, read, select)
        projections = {
            name: null_space_projection(gram, relative_threshold=asked.threshold).float()
            for name, gram in grams.items()
        }
        return NullSpaceConstraint({name: model.get_submodule(name) for name in grams}, projections)

    @property
    def bare(self) -> Any:
        """The library's model, whatever is around it."""
        return unwrapped(self.policy.model)
