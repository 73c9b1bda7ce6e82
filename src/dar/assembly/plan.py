"""What one step of a recipe will do, before any weight is loaded: rows, tokens, passes, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from dar.assembly.algorithm import build_algorithm, build_before, reads_reference
from dar.assembly.data import build_data
from dar.assembly.device import build_precision
from dar.assembly.engine import build_engine
from dar.assembly.objects import NOTHING
from dar.assembly.reward import check_reward
from dar.config.actor_critic import ActorCriticSpec
from dar.config.optim import AdamWSpec
from dar.config.realignment import TRACESpec
from dar.config.run import RunSpec
from dar.policies.text.head import ENTRIES, POSITIONS
from dar.policies.text.loading import load_config, load_tokenizer


@dataclass(frozen=True)
class Plan:
    """Counts are exact; memory is an estimate of what stays allocated, and of one micro-batch on top."""

    num_parameters: int
    num_train_prompts: int
    num_heldout_prompts: int
    num_dropped: int
    mean_prompt_length: float
    longest_prompt: int
    rows_per_step: int
    max_completion_tokens_per_step: int
    max_padded_tokens_per_step: int
    epochs: float
    passes: tuple[str, ...]
    weights_gb: float
    optimizer_gb: float
    microbatch_gb: float
    device: str
    compute_dtype: str


def make_plan(spec: RunSpec) -> Plan:
    """Reads data and the model's configuration, and counts.

    Raises:
        DarError: the recipe cannot run; the same checks a run makes before loading weights.
    """
    precision = build_precision(spec)
    tokenizer = load_tokenizer(spec.model)
    config = load_config(spec.model)
    data = build_data(spec, NOTHING, tokenizer, config)
    before = build_before(spec)
    build_engine(spec.engine).close()
    for reward in (*spec.rewards, *spec.evaluation.rewards):
        check_reward(reward, spec.runtime)
    algorithm = build_algorithm(spec.algorithm, max_completion_length=spec.sampling.max_completion_length)
    with_reference = reads_reference(spec, algorithm, has_heldout=data.heldout is not None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    lengths = [len(prompt.token_ids) for prompt in data.train.prompts]
    num_generations = spec.num_generations if data.logged is None else len(data.logged.groups[0].completions)
    rows = spec.prompts_per_step * num_generations
    longest = max(lengths) + spec.sampling.max_completion_length
    passes = [f"sample {rows} completions", "score them"] if data.logged is None else [f"read {rows} completions"]
    if algorithm.needs_reference:
        passes.append("forward pass of the reference")
    if algorithm.needs_values:
        passes.append("forward pass of the critic")
    passes.append(f"{algorithm.updates} × forward and backward pass of the policy")
    if isinstance(spec.algorithm, TRACESpec) and spec.algorithm.kl_coef:
        passes.append("forward pass of the reference beside it, where pairs are retained")
    if algorithm.needs_ratios and algorithm.updates > 1:
        passes.append(f"{algorithm.updates - 1} × forward pass of the policy to set its bounds")
    if algorithm.replay:
        passes.append(f"{algorithm.replay} × forward and backward pass on earlier batches")
    has_reference = with_reference and spec.model.lora is None
    trainable = _lora_parameters(model, spec) if spec.model.lora else num_parameters
    critic = num_parameters if isinstance(spec.algorithm, ActorCriticSpec) and spec.algorithm.critic == "model" else 0
    trainable += critic
    text = config.get_text_config()
    tokens = max(spec.runtime.max_tokens_per_microbatch, longest * num_generations)
    compute_bytes = precision.dtype.itemsize
    # A decoder layer keeps about 34 hidden-sized values per token for its backward pass (Korthikanti et al. 2022).
    layers = 1 if spec.model.gradient_checkpointing else text.num_hidden_layers
    activations = tokens * text.hidden_size * 34 * layers * compute_bytes / 2
    # Three copies of a tile's logits, and the head's gradient before it is added to the embedding's.
    head = (3 * POSITIONS * ENTRIES + text.vocab_size * text.hidden_size) * 4
    return Plan(
        num_parameters=num_parameters,
        num_train_prompts=len(data.train),
        num_heldout_prompts=len(data.known.groups) if data.known else len(data.heldout or ()),
        num_dropped=data.train.num_dropped,
        mean_prompt_length=sum(lengths) / len(lengths),
        longest_prompt=max(lengths),
        rows_per_step=rows,
        max_completion_tokens_per_step=rows * spec.sampling.max_completion_length,
        max_padded_tokens_per_step=rows * longest,
        epochs=spec.steps * spec.prompts_per_step / len(data.train),
        passes=(*before.passes(data), *passes),
        weights_gb=((num_parameters + critic) * 4 + (num_parameters * compute_bytes if has_reference else 0)) / 1e9,
        optimizer_gb=trainable * 4 * (3 if isinstance(spec.optim, AdamWSpec) else 1) / 1e9,
        microbatch_gb=(activations + head) / 1e9,
        device=str(precision.device),
        compute_dtype=str(precision.dtype).removeprefix("torch."),
    )


def _lora_parameters(model: torch.nn.Module, spec: RunSpec) -> int:
    """Adapter parameters, were every linear layer but the head to get one (an upper bound for other targets)."""
    assert spec.model.lora is not None
    layers = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    return sum(spec.model.lora.rank * (layer.in_features + layer.out_features) for layer in layers)
