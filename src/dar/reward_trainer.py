"""The Python face of `dar reward-model`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dar import arguments
from dar.arguments import GivenModel, GivenRows, Problems, described
from dar.collective import failing_together
from dar.errors import ConfigError
from dar.files.atomic import written
from dar.reward_config import RewardConfig
from dar.reward_model.build_loop import GivenPairs, build_reward_model_loop
from dar.reward_model.loop import RewardModelLoop
from dar.reward_model.training import RewardModelResult, run_reward_model
from dar.trainer import SavesModel, object_of, python_words


class RewardTrainer(SavesModel):
    """Trains a reward model on preference pairs (Bradley–Terry).

        pairs = [{"prompt": "Two and two is", "chosen": " four.", "rejected": " five."}]
        args = RewardConfig(output_dir="runs/rm", num_train_epochs=1)
        result = RewardTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args, pairs).train()
        DARTrainer(..., reward_funcs=result.model_dir)

    Args:
        model: a Hub id or folder of a causal language model, whose layers get a new head, or of a sequence classifier
            with one output, or such a classifier.
        args: the settings.
        train_dataset: rows of `prompt`, `chosen` and `rejected`: a `datasets.Dataset`, an iterable, or a path.
        eval_dataset: held-out pairs, measured before and after.
        processing_class: the tokenizer; by default the model's.
        peft_config: an adapter to train, with `task_type="SEQ_CLS"`; it is merged into the saved model.

    Raises:
        ConfigError: all that is wrong with the arguments.
    """

    def __init__(
        self,
        model: GivenModel,
        args: RewardConfig | None = None,
        train_dataset: GivenRows | None = None,
        *,
        eval_dataset: GivenRows | None = None,
        processing_class: Any | None = None,
        peft_config: Any | None = None,
        **unknown: Any,
    ) -> None:
        problems = Problems(arguments.settings_problems(type(self), RewardConfig, args, unknown))
        problems += arguments.part_problems(model, processing_class, peft_config)
        if not isinstance(model, str | Path) and not arguments.is_classifier(model):
            problems.append(
                f"model is {arguments.shown(model)}; expected a Hub id or folder (a language model's layers get a new "
                "head), or a sequence classifier with one output"
            )
        if getattr(peft_config, "task_type", "SEQ_CLS") != "SEQ_CLS":
            problems.append("peft_config does not train the head: it needs task_type='SEQ_CLS'")
        if train_dataset is None:
            problems.append("train_dataset is missing: pass a datasets.Dataset, a list of rows, or a path")
        train = problems.of(arguments.given_rows, train_dataset, "train_dataset")
        heldout = problems.of(arguments.given_rows, eval_dataset, "eval_dataset")
        if isinstance(args, RewardConfig):
            held = None if heldout is None else described(heldout, "eval_dataset: ")
            sources = {"model": described(model), "train": described(train, "train_dataset: ")}
            self.spec = problems.of(args.reward_model_spec, **sources, heldout=held)
        problems.require_none(type(self).__name__)
        self._given = GivenPairs(*map(object_of, (model, processing_class, train, heldout, peft_config)))
        self.loop: RewardModelLoop | None = None

    def train(
        self, resume_from_checkpoint: bool | str | Path | None = None, *, overwrite: bool = False
    ) -> RewardModelResult:
        """Runs to the last step and saves `model/`; True or a checkpoint's path continues the run in `output_dir`, and
        `overwrite` starts again in its place.

        Raises:
            DarError: whatever went wrong; nothing already saved is lost.
        """
        resume = self._resumes(resume_from_checkpoint)
        with python_words(RewardConfig):
            self.loop = build_reward_model_loop(self.spec, self._given, resume=resume, overwrite=overwrite)
            return run_reward_model(self.loop, resume=resume, command="RewardTrainer(…).train()")

    def evaluate(self) -> dict[str, float]:
        """What the trained model makes of the held-out pairs: `eval/accuracy`, `eval/loss`, …"""
        found = {} if self.loop is None else self.loop.folder.evaluation()
        if "after" not in found:
            raise ConfigError("nothing is evaluated yet: pass held-out pairs as eval_dataset, and call train()")
        return {f"eval/{name}": value for name, value in found["after"].items() if isinstance(value, float)}

    def _save_to(self, folder: Path) -> None:
        assert self.loop is not None
        if not self.loop.folder.model.exists():
            raise ConfigError(f"{self.spec.output_dir} holds no model yet: continue with resume_from_checkpoint=True")
        with failing_together():
            if self.loop.is_main:
                with written(folder) as scratch:
                    shutil.copytree(self.loop.folder.model, scratch)
