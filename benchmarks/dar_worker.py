"""One measured run of dar: reads a job (JSON) from standard input, prints the result (JSON) as its last line."""

from __future__ import annotations

import json
import sys
import tempfile

from dar.config.policy_gradient import GRPOSpec
from dar.config.regression import DARSpec
from dar.trainer import Trainer
from dar.training_config import TrainingConfig


def reward(completion_ids: list[list[int]]) -> list[float]:
    """Cheap, and different for every completion."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def main() -> None:
    job = json.load(sys.stdin)
    algorithm = {"dar": DARSpec(), "grpo": GRPOSpec(beta=0.04)}[job["algorithm"]]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingConfig(
            output_dir=f"{folder}/run",
            max_steps=job["steps"],
            prompts_per_step=job["num_prompts"],
            num_generations=job["num_generations"],
            max_completion_length=job["max_new_tokens"],
            learning_rate=1e-6,
            precision=job["precision"],
            save_steps=0,
            torch_compile=job["compile_layers"],
            max_tokens_per_microbatch=job["max_tokens_per_microbatch"],
            # TRL does not measure how far a step went from π_t; on equal terms neither does this run.
            overrides=["logging.old_kl_prompts=0"],
        )
        rows = [{"prompt": prompt} for prompt in job["prompts"]]
        trainer = Trainer(job["model"], reward, args, rows, algorithm=algorithm)
        result = trainer.train()
    print(json.dumps({"steps": [row for row in result.metrics if "loss" in row]}))


if __name__ == "__main__":
    main()
