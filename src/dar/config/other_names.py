"""What other libraries call the settings of a run, and what says it here.

The names are those of TRL's GRPOConfig, DPOConfig and RewardConfig, of transformers' TrainingArguments, and a few that
people write anyway. `{key}` is a key of a recipe, shown as it is written where the name was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

INSTEAD = {
    "per_device_train_batch_size batch_size train_batch_size gradient_accumulation_steps generation_batch_size": "use "
    "{prompts_per_step}, the prompts of a step on all devices, each with {num_generations} completions; micro-batches "
    "follow from {runtime.max_tokens_per_microbatch}",
    "per_device_train_batch_size batch_size train_batch_size gradient_accumulation_steps": "{pairs_per_step} is the "
    "whole batch",
    "num_iterations steps_per_generation": "{algorithm.updates} counts optimizer steps on a batch, each on all of it",
    "max_steps": "use {steps}",
    "num_train_epochs epochs": "a run is counted in steps: {steps} = epochs × number of prompts / {prompts_per_step}",
    "max_new_tokens max_tokens response_length": "use {sampling.max_completion_length}",
    "max_prompt_length": "use {data.max_prompt_length}; prompts are never cut, only refused or dropped",
    "max_length": "{data.max_prompt_length} bounds prompts, {sampling.max_completion_length} completions",
    "algorithm": "use {algorithm}",
    "beta": "it belongs to the method: {algorithm.beta}",
    "epsilon epsilon_low epsilon_high": "use {algorithm.clip_low} and {algorithm.clip_high}",
    "loss_type importance_sampling_level": "a loss is a method: use {algorithm} (dapo is bnpo; dr_grpo; cispo; ipo; …)",
    "scale_rewards": "it belongs to the method: {algorithm.normalize} of dar; dr_grpo in place of grpo scales nothing",
    "mask_truncated_completions": "use {sampling.mask_truncated}",
    "reward_funcs reward_model": "use {rewards}",
    "reward_weights": "each of {rewards} has its own, with the key `weight`",
    "center_rewards_coefficient": "use {loss.centering_coef}",
    "ref_model": "use {reference}",
    "sync_ref_model ref_model_*": "use {reference_sync}, a mapping with `every` and `mix`",
    "model_name_or_path model_name": "use {model}",
    "model_init_kwargs": "use {model.revision}, {model.trust_remote_code} and {runtime.precision}",
    "peft_config use_peft lora_*": "use {model.lora}",
    "use_liger_kernel padding_free": "leave it out: nothing is padded, and "
    "{runtime.max_tokens_per_microbatch} bounds memory",
    "bf16 fp16 tf32 dtype torch_dtype": "set {runtime.precision} to 'bf16', 'fp32' or 'auto'; weights stay fp32",
    "load_in_4bit load_in_8bit quantization quantization_config bnb_*": "weights are fp32 or, of a frozen base under "
    "{model.lora}, as they were saved; the 'adamw_8bit' of {optim} has moments in 8 bits",
    "use_cpu no_cuda": "set {runtime.device} to 'cpu'",
    "torch_compile": "use {runtime.compile_layers}",
    "ddp_timeout": "use {runtime.rank_timeout}",
    "deepspeed fsdp fsdp_* ddp_*": "set {runtime.sharding} to 'full' to shard weights; {prompts_per_step} are shared "
    "among the processes that torchrun starts",
    "temperature": "use {sampling.temperature}",
    "top_p top_k min_p repetition_penalty generation_kwargs": "training samples from the very distribution whose "
    "log-probabilities it reads; held-out prompts have {evaluation.top_p} and {evaluation.top_k}",
    "use_vllm vllm_*": "leave it out: the trainer's process samples with the weights it trains; {engine} may be a "
    "class of yours that samples elsewhere",
    "train_dataset dataset dataset_name": "use {data.train}",
    "eval_dataset": "use {data.heldout}",
    "remove_unused_columns": "leave it out: every column of {data.train} reaches the reward functions",
    "dataloader_* dataset_*": "leave it out: {data.train} is read and tokenised once, before the first step",
    "lr": "use {optim.learning_rate}",
    "lr_scheduler_type lr_scheduler": "use {optim.schedule}",
    "warmup_ratio": "use {optim.warmup_steps}, a number of optimizer steps",
    "adam_beta1 adam_beta2 adam_epsilon": "use {optim.beta1}, {optim.beta2} and {optim.eps}",
    "eval_strategy evaluation_strategy do_eval": "{data.heldout} is measured before the first and after the last step, "
    "and every {evaluation.every} steps",
    "eval_steps": "use {evaluation.every}",
    "save_steps save_strategy": "use {checkpoint.every} (0 = only at the end)",
    "save_total_limit": "use {checkpoint.keep}",
    "load_best_model_at_end metric_for_best_model": "use {checkpoint.best}, a metric: its best policy stays in `best`",
    "logging_steps logging_strategy": "use {logging.every}; metrics.jsonl has every step",
    "eval_strategy eval_steps logging_steps": "every step is shown, and {data.heldout} is measured before and after "
    "training",
    "log_completions": "use {logging.completions_every}",
    "report_to": "use {logging.trackers}",
    "run_name logging_dir": "a run has its name and all it writes from its folder, {output_dir}",
    "overwrite_output_dir": "train(overwrite=True), or `--overwrite`, starts again where {output_dir} holds a run",
    "push_to_hub hub_strategy hub_always_push": "set {hub.repository}: the model is uploaded once, when the run is "
    "finished",
    "hub_token": "set HF_TOKEN, or `hf auth login`: no recipe holds a token, and {hub} needs none in it",
    "hub_model_id hub_private_repo": "use {hub}, a name, or a mapping with `repository` and `private`",
    "push_to_hub hub_*": "trainer.push_to_hub(name), or `dar export … --push NAME`, uploads what is in {output_dir}",
    "resume_from_checkpoint": "train(resume_from_checkpoint=True), or `--resume`, continues the run in {output_dir}",
}
"""Names, or patterns of a family of names, and what to write instead."""


def instead(name: str, keys: Iterable[str], written: Callable[[str], str]) -> str | None:
    """What to write for a name that is not known, as far as the recipe has the keys for it.

    Args:
        name: as it was found.
        keys: of the recipe, dotted.
        written: how a key is written where the name was found.
    """
    known = dict.fromkeys(keys)
    for names, text in INSTEAD.items():
        if any(fnmatchcase(name, pattern) for pattern in names.split()) and known.keys() >= set(keys_in(text)):
            return f"there is no '{name}': " + re.sub(_KEY, lambda key: written(key[1]), text)
    found = [key for key in known if key.endswith(f".{name}")]
    if 0 < len(found) <= 3:
        return f"there is no '{name}' here: use {' or '.join(map(written, found))}"
    return None


def batch_size(given: Mapping[str, Any], key: str) -> str | None:
    """What TRL's batch sizes, as far as they are given, come to: a value of `prompts_per_step` or `pairs_per_step`."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    found = {name: given[name] for name in (*names, "generation_batch_size") if type(given.get(name)) is int}
    each, accumulated, per_generation = (found.get(name) for name in names)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = found.get("generation_batch_size") or (each or 0) * (per_generation or accumulated or 1) * ranks
    said = f"{' and '.join(f'{name}={size}' for name, size in found.items())} on {ranks} process{'es' * (ranks > 1)}"
    group = 1 if key == "pairs_per_step" else given.get("num_generations")
    if rows and group is None:
        return f"{said} are {rows} rows: {key}={rows}, or that by num_generations where completions are sampled"
    if not rows or type(group) is not int or group < 1 or rows % group:
        return None
    return f"{said}{f', with num_generations={group},' * (group > 1)} are {key}={rows // group}"


def keys_in(text: str) -> list[str]:
    """The keys that a text of `INSTEAD` names."""
    return re.findall(_KEY, text)


_KEY = r"\{([\w.]+)\}"
