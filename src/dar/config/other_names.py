"""What other libraries call the settings of a run, and what says it here.

The names are those of TRL's GRPOConfig, DPOConfig and RewardConfig, of transformers' TrainingArguments, and a few that
people write anyway. `{key}` is a key of a recipe, shown as it is written where the name was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

INSTEAD = {
    "per_device_train_batch_size batch_size train_batch_size generation_batch_size": "{prompts_per_step} counts the "
    "prompts of a step on all devices, each with {num_generations} completions",
    "gradient_accumulation_steps auto_find_batch_size": "{prompts_per_step} is the whole batch; micro-batches follow "
    "from {runtime.max_tokens_per_microbatch}",
    "per_device_eval_batch_size": "{engine.max_cache_tokens} bounds what is sampled at once",
    "num_iterations steps_per_generation": "{algorithm.updates} counts optimizer steps on a batch, each on all of it",
    "max_steps": "use {steps}",
    "num_train_epochs epochs": "a run is counted in steps: {steps} = epochs × number of prompts / {prompts_per_step}",
    "max_new_tokens max_tokens response_length": "use {sampling.max_completion_length}",
    "max_prompt_length truncation_mode": "use {data.max_prompt_length}; prompts are never cut, only refused or dropped",
    "max_length": "{data.max_prompt_length} bounds prompts, {sampling.max_completion_length} completions",
    "algorithm": "use {algorithm}",
    "beta": "it belongs to the method: {algorithm.beta}",
    "epsilon epsilon_low": "use {algorithm.clip_low}, and {algorithm.clip_high} for the other side",
    "epsilon_high": "use {algorithm.clip_high}",
    "delta": "GRPO's second upper bound is not offered; {algorithm.clip_high} is the first",
    "loss_type": "a loss is a method: use {algorithm} (TRL's dapo is bnpo; grpo, dr_grpo, gspo; dpo, ipo, slic; …)",
    "importance_sampling_level": "one ratio per completion is the method gspo: use {algorithm}",
    "scale_rewards": "it belongs to the method: {algorithm.normalize} of dar; dr_grpo in place of grpo scales nothing",
    "mask_truncated_completions": "use {sampling.mask_truncated}",
    "top_entropy_quantile entropy_* use_adaptive_entropy": "no method ({algorithm}) weighs tokens by their entropy",
    "label_smoothing label_smoothing_factor": "only reward models have it, no method ({algorithm})",
    "missing_eos_penalty reward_funcs reward_model": "use {rewards}",
    "reward_weights": "each of {rewards} has its own, with the key `weight`",
    "center_rewards_coefficient": "use {loss.centering_coef}",
    "ref_model": "use {reference}",
    "sync_ref_model": "use {reference_sync}, a mapping with `every` and `mix`",
    "ref_model_sync_steps": "use {reference_sync.every}",
    "ref_model_mixup_alpha": "use {reference_sync.mix}",
    "model_name_or_path model_name": "use {model}",
    "model_init_kwargs": "use {model.revision}, {model.trust_remote_code} and {runtime.precision}",
    "peft_config use_peft lora_*": "use {model.lora}",
    "disable_dropout": "leave it out: dropout is always off ({model})",
    "chat_template_kwargs chat_template_path": "the chat template is the tokenizer's own, as it comes with {model}",
    "use_liger_kernel liger_kernel_config padding_free pad_to_multiple_of": "leave it out: nothing is padded, and the "
    "logits of a batch never exist at once; {runtime.max_tokens_per_microbatch} bounds memory",
    "gradient_checkpointing_kwargs": "{model.gradient_checkpointing} has no further settings",
    "bf16": "set {runtime.precision} to 'bf16'; weights and optimizer stay fp32",
    "fp16 tf32 dtype torch_dtype": "set {runtime.precision} to 'bf16', 'fp32' or 'auto'",
    "use_cpu no_cuda": "set {runtime.device} to 'cpu'",
    "torch_compile torch_compile_*": "use {runtime.compile_layers}",
    "deepspeed ds3_* fsdp fsdp_* ddp_* accelerator_config parallelism_config": "leave it out: weights are not sharded, "
    "and {prompts_per_step} are shared among the processes that `accelerate launch` starts",
    "temperature": "use {sampling.temperature}",
    "top_p top_k min_p": "training samples from the very distribution whose log-probabilities it reads, so nothing may "
    "be cut off; held-out prompts have {evaluation.top_p} and {evaluation.top_k}",
    "repetition_penalty generation_kwargs cache_implementation do_sample": "training samples from the very "
    "distribution whose log-probabilities it reads; {sampling.temperature} is all that may change it",
    "use_vllm vllm_* use_transformers_*": "leave it out: the trainer's process samples with the weights it trains; "
    "{engine} may be a class of yours that samples elsewhere",
    "train_dataset dataset dataset_name": "use {data.train}",
    "eval_dataset": "use {data.heldout}",
    "remove_unused_columns": "leave it out: every column of {data.train} reaches the reward functions",
    "dataloader_* dataset_*": "leave it out: {data.train} is read and tokenised once, before the first step",
    "shuffle_dataset data_seed": "{seed} decides the order of the rows too",
    "lr": "use {optim.learning_rate}",
    "lr_scheduler_type lr_scheduler": "use {optim.schedule}",
    "lr_scheduler_kwargs": "{optim.schedule} is constant, linear or cosine, without further settings",
    "warmup_ratio": "use {optim.warmup_steps}, a number of optimizer steps",
    "adam_beta1": "use {optim.beta1}",
    "adam_beta2": "use {optim.beta2}",
    "adam_epsilon": "use {optim.eps}",
    "eval_strategy evaluation_strategy eval_on_start do_eval": "{data.heldout} is measured before the first and after "
    "the last step, and every {evaluation.every} steps",
    "eval_steps": "use {evaluation.every}",
    "num_generations_eval": "use {evaluation.num_generations}",
    "save_steps save_strategy save_only_model": "use {checkpoint.every} (0 = only at the end)",
    "save_total_limit": "use {checkpoint.keep}",
    "load_best_model_at_end": "use {checkpoint.best}: the policy of the best evaluation stays in the folder `best`",
    "metric_for_best_model": "use {checkpoint.best.metric}",
    "greater_is_better": "use {checkpoint.best.mode}",
    "logging_steps logging_strategy logging_first_step": "use {logging.every}; metrics.jsonl has every step",
    "log_completions num_completions_to_print log_unique_prompts": "use {logging.completions_every}",
    "report_to": "use {logging.trackers}",
    "run_name logging_dir overwrite_output_dir": "a run has its name and all it writes from its folder, {output_dir}",
    "push_to_hub hub_*": "the finished model is the folder `model` in {output_dir}, and can be pushed from there",
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


def keys_in(text: str) -> list[str]:
    """The keys that a text of `INSTEAD` names."""
    return re.findall(_KEY, text)


_KEY = r"\{([\w.]+)\}"
