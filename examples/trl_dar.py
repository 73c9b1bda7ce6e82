"""DAR in TRL's loop: a GRPO script with two names changed.

    python examples/trl_dar.py                        # 30 steps on a language of four letters, without a network
    python examples/trl_dar.py --steps 100 --lora 8   # an adapter; the reference is the model without it

Needs dar-rlhf[trl]. The reward counts the pairs ab, bc, cd and da; docs/trl.md has every setting.
"""

from __future__ import annotations

import argparse
import re

from datasets import Dataset
from peft import LoraConfig

from dar.integrations.trl import DARConfig, DARTrainer  # was: from trl import GRPOConfig, GRPOTrainer
from dar.policies.text.toy import toy_folder


def good_pairs(completions: list[str], **columns: object) -> list[float]:
    """How many pairs of neighbouring letters are in the alphabet's order."""
    return [float(len(re.findall("(?=ab|bc|cd|da)", text))) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lora", type=int, help="rank of an adapter; without it all weights are trained")
    parser.add_argument("--out", default="runs/trl")
    options = parser.parse_args()
    args = DARConfig(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        num_generations=4,
        max_completion_length=24,
        learning_rate=1e-3 if options.lora is None else 1e-2,
        alpha=0.1,
        dar_beta=0.5,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = DARTrainer(
        str(toy_folder()),
        good_pairs,
        args,
        train_dataset=Dataset.from_list([{"prompt": "abcd"[index % 4]} for index in range(64)]),
        peft_config=options.lora and LoraConfig(r=options.lora, target_modules="all-linear"),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            print(f"step {entry['step']:3}  reward {entry['reward']:.2f}  KL to π₀ {entry['kl/ref']:.2f} nats")


if __name__ == "__main__":
    main()
