"""Runs of the DARTrainer of TRL on completions made by hand, and what the library's own functions say of them.

As a script, run by every rank: each case of `CASES`, of which the main rank saves what its optimizer steps saw.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback

from dar.advantages import batch_standardized, group_mean, leave_one_out
from dar.integrations.trl import DARConfig, DARTrainer
from dar.objectives.adaptive import beta_for_ess, beta_for_kl
from dar.objectives.regression import clip_log_weights, dar_log_weights, weighted_nll

PROMPTS = ("a", "say bee", "of the sea", "dee")
LENGTHS = (3, 8, 1, 5, 8, 2, 7)
EOS, NUM_ROWS = 0, 16
LEARNING_RATE = 1e-3

CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "accumulated": {"per_device_train_batch_size": 4},
    "rows one by one, pairs": {"per_device_train_batch_size": 2, "num_generations": 2},
    "two steps on one generation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                                    "steps_per_generation": 4, "learning_rate": 0.0, "max_steps": 2},
    "two passes": {"per_device_train_batch_size": 4, "num_iterations": 2, "max_steps": 2},
    "alpha 0": {"alpha": 0.0, "per_device_train_batch_size": 4},
    "temperature": {"temperature": 0.7, "alpha": 0.5, "dar_beta": 0.5, "w_clip": 3.0},
    "cut off": {"mask_truncated_completions": True, "per_device_train_batch_size": 4},
    "target ESS": {"dar_beta": {"target_ess": 0.4}, "per_device_train_batch_size": 4},
    "target KL, masked": {"dar_beta": {"target_kl": 0.5}, "mask_truncated_completions": True, "weight_scale": "mean"},
    "leave one out": {"baseline": "leave_one_out", "normalize": "none", "weight_scale": "clip", "dar_beta": 0.3},
    "pushed down, too": {"dar_beta": 0.3, "center_weights": True, "per_device_train_batch_size": 4, "has_gaps": True},
    "tools": {"has_tools": True, "per_device_train_batch_size": 4},
    "no reward": {"has_gaps": True, "per_device_train_batch_size": 4},
}  # fmt: skip
ON_RANKS = ("accumulated", "target KL, masked", "tools", "no reward")


@dataclass(frozen=True)
class Step:
    """What an optimizer step saw: its loss and its gradient."""

    loss: float
    gradient: Tensor


def completion_of(place: int) -> list[int]:
    """The completion at a place of the batch: ragged, letters, with an end of sequence unless it is cut off."""
    length = LENGTHS[place % len(LENGTHS)]
    letters = torch.randint(5, 261, (length,), generator=torch.Generator().manual_seed(place)).tolist()
    return letters if length == 8 else [*letters[:-1], EOS]


def own_tokens(completion: Sequence[int], *, has_tools: bool) -> list[int]:
    """1 on the policy's own tokens; with tools the second of every three is one's answer."""
    return [int(not has_tools or at % 3 != 1 or at == len(completion) - 1) for at in range(len(completion))]


def reward_of(completion: Sequence[int], *, has_gaps: bool) -> float | None:
    return None if has_gaps and sum(completion) % 3 == 0 else float(sum(completion) % 11)


def policy(folder: Path) -> LlamaForCausalLM:
    """A policy that has moved from π₀, which is in the folder."""
    if not folder.exists():
        make_model(initializer_range=0.1).save_pretrained(folder)
    model = initial(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def initial(folder: Path) -> LlamaForCausalLM:
    """π₀."""
    return LlamaForCausalLM.from_pretrained(folder)


def settings(folder: Path, **changes: Any) -> DARConfig:
    """Small, on the CPU, in fp32, and silent."""
    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    return DARConfig(str(folder / "out"), **{**quiet, "logging_steps": 1, "save_strategy": "no", **changes})


def train(
    folder: Path, *callbacks: TrainerCallback, num_ranks: int = 1, has_tools: bool = False, has_gaps: bool = False,
    peft_config: LoraConfig | None = None, **changes: Any,
) -> tuple[DARTrainer, list[Step]]:  # fmt: skip
    """The trainer, and the optimizer steps it took on the completions above; batch sizes are of all ranks."""
    size = changes.pop("per_device_train_batch_size", NUM_ROWS)
    base = {"num_generations": 4, "max_completion_length": 8, "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd",
            "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "shuffle_dataset": False,
            "per_device_train_batch_size": size // num_ranks,
            "gradient_accumulation_steps": NUM_ROWS // size}  # fmt: skip
    args = settings(folder, **{**base, **changes})
    tokenizer, gradients = make_tokenizer(), []

    def rollout(prompts: list[str], trainer: DARTrainer) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        completions = [completion_of(first + at) for at in range(len(prompts))]
        masks = {"env_mask": [own_tokens(each, has_tools=True) for each in completions]} if has_tools else {}
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, **masks}

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [reward_of(each, has_gaps=has_gaps) for each in completion_ids]

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **others: Any) -> None:
            gradients.append(flat(model))

    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * (4 // (args.num_generations or 1))])
    options: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer, "rollout_func": rollout}
    model = policy(folder / "model")
    trainer = DARTrainer(model, reward, args, callbacks=[Look(), *callbacks], peft_config=peft_config, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [Step(*each) for each in zip(losses, gradients, strict=True)]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def row_logprobs(model: LlamaForCausalLM, prompt: str, completion: Sequence[int], temperature: float) -> Tensor:
    """[T] log π of one completion by the plain model, alone and without padding."""
    ids = [*make_tokenizer().encode(prompt), *completion]
    logits = model(torch.tensor([ids])).logits[0, -len(completion) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)


def expected(folder: Path, *, has_tools: bool = False, has_gaps: bool = False, **changes: Any) -> list[Step]:
    """The same by the functions of `dar.advantages` and `dar.objectives`, one row at a time."""
    spec = settings(
        folder, **{k: v for k, v in changes.items() if not k.startswith(("per_", "grad", "steps_per"))}
    ).spec
    temperature, size = changes.get("temperature", 1.0), changes.get("num_generations", 4)
    model, frozen = policy(folder / "model"), initial(folder / "model")
    completions = [completion_of(place) for place in range(NUM_ROWS)]
    prompts = [PROMPTS[place // size % 4] for place in range(NUM_ROWS)]
    masks = [torch.tensor(own_tokens(each, has_tools=has_tools)).bool() for each in completions]

    def logprobs(of: LlamaForCausalLM) -> Tensor:
        rows = [row_logprobs(of, *each, temperature) for each in zip(prompts, completions, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)
    found = [reward_of(each, has_gaps=has_gaps) for each in completions]
    rewards = torch.tensor([torch.nan if each is None else each for each in found]).view(-1, size)
    advantages = {"group_mean": group_mean, "leave_one_out": leave_one_out}[spec.baseline](rewards)
    if spec.normalize == "batch":
        advantages = batch_standardized(advantages)
    kept = ~advantages.flatten().isnan()
    advantages = advantages.flatten()[kept]
    with torch.no_grad():
        old, ref = logprobs(model)[kept], logprobs(frozen)[kept]
    log_w_reg = spec.alpha * ((ref - old) * mask[kept]).sum(1)
    match changes.get("dar_beta", 0.05):
        case {"target_ess": share}:
            beta = beta_for_ess(advantages, log_w_reg, target_ess=share).beta
        case {"target_kl": nats}:
            beta = beta_for_kl(advantages, log_w_reg, target_kl=nats).beta
        case beta:
            pass
    log_weights = dar_log_weights(old, ref, advantages, mask[kept], alpha=spec.alpha, beta=beta)
    weights = clip_log_weights(log_weights, spec.w_clip)
    weights = weights / {"none": 1.0, "clip": spec.w_clip, "mean": weights.mean()}[spec.weight_scale]
    weights = weights - weights.mean() * spec.center_weights
    if changes.get("mask_truncated_completions"):
        weights = weights * torch.tensor([each[-1] == EOS for each in completions])[kept]
    steps = []
    for _ in range(changes.get("num_iterations", 1)):
        model.zero_grad()
        loss = weighted_nll(logprobs(model)[kept], weights, mask[kept]).sum() / len(weights)
        loss.backward()
        steps.append(Step(loss.item(), flat(model)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(LEARNING_RATE * (0.0 if parameter.grad is None else parameter.grad))
    return steps


if __name__ == "__main__":
    here = Path(sys.argv[1])
    for name in ON_RANKS:
        trainer, steps = train(here, num_ranks=2, **CASES[name])
        if trainer.is_world_process_zero():
            torch.save([vars(step) for step in steps], here / f"{name}.pt")
