"""One measured run of TRL's GRPOTrainer, in its own environment: job (JSON) on standard input, result as last line."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Wall time of each optimizer step, rollout included."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def reward(completion_ids, **kwargs) -> list[float]:
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def main() -> None:
    job = json.load(sys.stdin)
    rows = job["num_prompts"] * job["num_generations"]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            max_steps=job["steps"],
            per_device_train_batch_size=job["num_generations"],
            gradient_accumulation_steps=rows // job["num_generations"],
            num_generations=job["num_generations"],
            max_completion_length=job["max_new_tokens"],
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            beta=0.04,
            loss_type="grpo",
            bf16=job["precision"] == "bf16",
            use_cpu=True,
            # On by default; off is faster, and what dar does too.
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
            callbacks=[clock],
        )
        trainer.train()
    history = [row for row in trainer.state.log_history if "step_time" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    lengths = [row["completions/mean_length"] for row in history]
    print(json.dumps({"seconds": clock.seconds, "peak_gb": peak, "mean_length": lengths}))


if __name__ == "__main__":
    main()
