"""Training a reward model from its recipe to its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar.collective import failing_together
from dar.policies.saving import save_model
from dar.reward_model.card import reward_model_card
from dar.reward_model.loop import RewardModelLoop


@dataclass(frozen=True, repr=False)
class RewardModelResult:
    """steps: completed, of num_steps. evaluation: what evaluation.json holds. output_dir: the run folder."""

    steps: int
    num_steps: int
    evaluation: dict[str, Any]
    output_dir: str

    @property
    def model_dir(self) -> str:
        """The reward model's folder, once the training is finished."""
        return str(Path(self.output_dir) / "model")

    def __repr__(self) -> str:
        accuracy = [f"{row['accuracy']:.1%}" for row in self.evaluation.values()]
        held = f"; held-out accuracy {' → '.join(accuracy)}" if accuracy else ""
        return f"RewardModelResult({self.steps} of {self.num_steps} steps in {self.output_dir}{held})"


def run_reward_model(loop: RewardModelLoop, *, resume: bool | Path, command: str) -> RewardModelResult:
    """Runs a loop and, when it is finished, saves the model, an adapter merged into it.

    Args:
        loop: from `dar.reward_model.build_loop.build_reward_model_loop`.
        resume: continue from the newest checkpoint, or from that one.
        command: for the model card.
    """
    try:
        done = loop.run(resume=resume)
    finally:
        loop.end()
    evaluation = loop.folder.evaluation()
    if done == loop.num_steps:
        card = reward_model_card(loop.spec, evaluation, num_pairs=len(loop.pairs), command=command)
        whole = loop.model.merge_and_unload() if hasattr(loop.model, "merge_and_unload") else loop.model
        with failing_together():
            if loop.is_main:
                save_model(whole, loop.tokenizer, loop.folder.model, card=card)
    return RewardModelResult(done, loop.num_steps, evaluation, str(loop.folder.path))
