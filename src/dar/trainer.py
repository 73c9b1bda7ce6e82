"""The Python face: `Trainer` and `DARTrainer`."""

from __future__ import annotations

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from dar import arguments
from dar.algorithms.base import Algorithm
from dar.arguments import GivenModel, GivenReward, GivenRows, Problems, described, shown
from dar.assembly.engine import build_engine
from dar.assembly.export import push_model
from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.assembly.training import TrainResult, run_loop, save_policy
from dar.cluster.start import train_on_cluster
from dar.collective import from_main
from dar.config.algorithm import AlgorithmSpec
from dar.config.algorithms import ALGORITHM_SPECS, OwnAlgorithmSpec
from dar.config.base import Spec, keys_below
from dar.config.recipe import build_spec
from dar.config.run import LoggingSpec
from dar.errors import ConfigError, DarError
from dar.files.hints import nearest_hint
from dar.files.paths import expanded
from dar.learn.checkpoint import list_checkpoints
from dar.policies.text.loading import load_tokenizer
from dar.policies.text.policy import Policy
from dar.record.folder import RunFolder
from dar.run.loop import Loop
from dar.run.recorder import Callback
from dar.run.trainer_callbacks import callback_problems
from dar.training_config import DARConfig, FlatConfig, TrainingConfig


class SavesModel(ABC):
    """What every trainer does with the model it has trained.

    spec: the recipe.
    loop: what trains, once it does.
    """

    spec: Any
    loop: Any

    def save_model(self, path: str | Path | None = None) -> Path:
        """Saves the model as it is now, with tokenizer and model card; by default to `model` in the run folder.

        Raises:
            ConfigError: nothing was trained yet, or the folder holds something that is no model.
            CheckpointError: it cannot be written.
        """
        if self.loop is None:
            raise ConfigError("there is no trained model here: call train() first, or see a cluster's run folder")
        target = self.loop.folder.model if path is None else Path(path).expanduser()
        holds = {file.name for file in target.iterdir()} if target.is_dir() else set()
        if holds and not holds & {"config.json", "adapter_config.json"}:
            raise ConfigError(f"{target} would be replaced, and holds {min(holds)} and no model: name a new folder")
        self._save_to(target)
        return target

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save_model` saves to the Hub, with the run's report, and returns the address of the commit.

        Args:
            repo_id: `name/model`; made where there is none.
            private: of a new repository; by default as the account says.
            token: by default the one of `hf auth login`.

        Raises:
            CheckpointError: the Hub cannot be reached, or refuses.
            ConfigError: as `save_model`, or what the report is made with is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            model = self.save_model(Path(folder) / "model")
            run = self.loop.folder.path
            return from_main(lambda: push_model(model, run, repo_id, private=private, token=token))

    @abstractmethod
    def _save_to(self, folder: Path) -> None:
        """Writes the model of `loop`."""

    def _resumes(self, given: object) -> bool | Path:
        """What `resume_from_checkpoint` asks for: nothing, the newest checkpoint, or that one. Raises ConfigError."""
        folder = RunFolder(self.spec.output_dir)
        known = list_checkpoints(folder.checkpoints)
        if isinstance(given, str | Path):
            path = Path(expanded(given)).resolve()
            given = path == folder.path.resolve() or next((each for each in known if each.resolve() == path), given)
        if not isinstance(given, bool | None) and given not in known:
            raise ConfigError(
                f"resume_from_checkpoint is {given!r}, but must be True or False, or a checkpoint of this run, which "
                f"continues in its own folder, {folder.path}. There are: {', '.join(map(str, known)) or 'none'}"
            )
        return given if isinstance(given, Path) else bool(given)


class Trainer(SavesModel):
    """Aligns a language model with any algorithm of the library.

        Trainer(model, my_reward, TrainingConfig(output_dir="runs/a", max_steps=100), prompts, algorithm="grpo").train()
        Trainer(model, None, TrainingConfig(output_dir="runs/b", max_steps=100), pairs, algorithm="dpo").train()

    Args:
        model: a Hub id, folder or `.gguf` file, or a transformers causal language model, perhaps with an adapter.
        reward_funcs: one or several, of any kind: functions with TRL's signature, names (`"sentiment"`), import paths
            (`"pkg.mod:fn"`), specs of `dar.config.rewards` or mappings as in a recipe (judges, verifiers), folders or
            Hub ids of reward models, and transformers sequence classifiers. Offline methods measure held-out samples
            with them and do without otherwise.
        args: shared settings.
        train_dataset: prompts to train on (for an offline method with their completions): a `datasets.Dataset`, a
            DataFrame, an iterable of rows, or a path.
        algorithm: a name (`"dar"`, `"grpo"`, `"dpo"`, …) for its defaults, its spec, or a method of your own: a
            `dar.Algorithm`, or the import path of one (`"pkg.mod:Class"`). Required, unless `args` is a `DARConfig`.
        eval_dataset: held-out prompts, of the same kinds.
        ref_model: π₀; by default the policy before training.
        processing_class: the tokenizer; by default the model's.
        reward_processing_classes: tokenizers of classifiers among the rewards: one, or a list with an entry (None for
            others) per reward; by default those in the folders they came from.
        peft_config: any configuration of peft under which sampler, trainer and saved folder are one policy.
        callbacks: told about every line of metrics; may stop the run, save or evaluate. Those of transformers are told
            of the events they know; their `args` are these settings.

    Raises:
        ConfigError: all that is wrong with the arguments; of rows and columns, when `train` begins, before a model is
            loaded.
    """

    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig
    default_algorithm: ClassVar[str | None] = None

    def __init__(
        self,
        model: GivenModel,
        reward_funcs: GivenReward | Sequence[GivenReward] | None = None,
        args: TrainingConfig | None = None,
        train_dataset: GivenRows | None = None,
        *,
        algorithm: str | AlgorithmSpec | Algorithm | None = None,
        eval_dataset: GivenRows | None = None,
        ref_model: GivenModel | None = None,
        processing_class: Any | None = None,
        reward_processing_classes: Any | None = None,
        peft_config: Any | None = None,
        callbacks: Sequence[Callback | TrainerCallback] | None = None,
        **unknown: Any,
    ) -> None:
        problems = Problems(arguments.settings_problems(type(self), self.config_class, args, unknown))
        problems += arguments.model_problems("model", model)
        problems += arguments.model_problems("ref_model", "" if ref_model is None else ref_model)
        problems += arguments.part_problems(model, processing_class, peft_config)
        problems += callback_problems(callbacks, is_evaluated=eval_dataset is not None)
        if ref_model is model and not isinstance(model, str | Path):
            problems.append(
                "ref_model is the very object that is trained, so it would move along with it: leave ref_model out (a "
                "frozen copy is then the reference), or pass a copy"
            )
        if train_dataset is None:
            problems.append("train_dataset is missing: pass a datasets.Dataset, a list of rows, or a path")
        train = problems.of(arguments.given_rows, train_dataset, "train_dataset")
        heldout = problems.of(arguments.given_rows, eval_dataset, "eval_dataset")
        weights = getattr(args, "reward_weights", None)
        method = problems.of(self._method, algorithm, args)
        rewards = problems.of(arguments.given_rewards, reward_funcs, weights, reward_processing_classes)
        if method is not None and rewards is not None and isinstance(args, TrainingConfig):
            problems.of(self._build_spec, args, model, train, heldout, ref_model, method, rewards[0])
        with python_words(self.config_class):
            problems.require_none(type(self).__name__)
        assert rewards is not None
        self._objects = Objects(
            model=object_of(model),
            tokenizer=processing_class,
            reference=object_of(ref_model),
            train_rows=object_of(train),
            heldout_rows=object_of(heldout),
            rewards=rewards[1],
            lora=peft_config,
            callbacks=tuple(callbacks or ()),
            algorithm=algorithm if isinstance(algorithm, Algorithm) else None,
        )
        self.loop: Loop | None = None

    @property
    def model(self) -> Any:
        """The policy's transformers (or peft) model as it is now; one given by path is loaded by `train`."""
        if self.loop is None and self._objects.model is None:
            raise ConfigError(f"the model {self.spec.model.path} is not loaded yet: train() does that")
        return self._objects.model if self.loop is None else _model_of(self.loop)

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self._objects.tokenizer or load_tokenizer(self.spec.model)

    tokenizer = processing_class

    def train(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        *,
        allow_changed_recipe: bool = False,
        overwrite: bool = False,
    ) -> TrainResult:
        """Runs to the last step and saves `model/`.

        Args:
            resume_from_checkpoint: True (or `output_dir`) continues the run there from its newest valid checkpoint;
                the path of one of its checkpoints from that, and forgets what came later.
            allow_changed_recipe: continue although settings have changed.
            overwrite: start again in an `output_dir` that holds a run, of which nothing is kept.

        Raises:
            DarError: whatever went wrong; nothing already saved is lost.
        """
        resume = self._resumes(resume_from_checkpoint)
        if self.loop is not None and self._objects.model is not None:
            raise ConfigError(
                "this trainer has trained its model already, and a run begins with the initial weights: make another "
                "trainer with the model loaded anew, or give the model by its path"
            )
        command = f"{type(self).__name__}(…).train()"
        with python_words(self.config_class):
            if self.spec.cluster is not None:
                settings: dict[str, Any] = {"allow_changed_recipe": allow_changed_recipe, "overwrite": overwrite}
                return train_on_cluster(self.spec, objects=self._objects, resume=resume, command=command, **settings)
            self.loop = build_loop(
                self.spec, self._objects, resume=resume, allow_changed_recipe=allow_changed_recipe, overwrite=overwrite
            )
            return run_loop(self.loop, resume=resume, command=command)

    def evaluate(self) -> dict[str, float]:
        """Measures the policy as it is on the held-out rows: `eval/…`, as in metrics.jsonl.

        Nothing is written. The random numbers are those of the run's own evaluations.

        Raises:
            ConfigError: there is no `eval_dataset`.
            DarError: as `train`.
        """
        if self.spec.data.heldout is None:
            raise ConfigError("there is nothing to evaluate on: pass held-out prompts as eval_dataset")
        with python_words(self.config_class), tempfile.TemporaryDirectory() as folder:
            if self.loop is not None:
                return measured(self.loop, self.spec.steps)
            spec = self.spec.model_copy(update={"output_dir": folder, "hub": None, "logging": LoggingSpec()})
            loop = build_loop(spec, self._objects, quiet=True)
            if self._objects.model is not None:
                # An adapter is put on in place: the run finds it there.
                self._objects = replace(self._objects, model=_model_of(loop), lora=None)
            try:
                loop.calibration.run()
                return measured(loop, 0)
            finally:
                loop.end()

    def _save_to(self, folder: Path) -> None:
        assert self.loop is not None
        with python_words(self.config_class):
            save_policy(self.loop, folder, command=f"{type(self).__name__}(…).train()")

    def _build_spec(self, args: TrainingConfig, model: GivenModel, train: Any, heldout: Any,
                    ref_model: GivenModel | None, method: AlgorithmSpec,
                    rewards: list[dict[str, Any]]) -> None:  # fmt: skip
        """The recipe. Raises ConfigError."""
        if not rewards and method.needs_rewards and not method.logged:
            offline = ", ".join(name for name, spec in ALGORITHM_SPECS.items() if spec.logged)
            raise ConfigError(
                f"{method.model_dump()['type']} learns from the rewards of its own samples: pass reward_funcs. (Only "
                f"{offline} learn from the completions of the data.)"
            )
        self.spec = args.run_spec(
            model=described(model),
            reference=None if ref_model is None else described(ref_model),
            train=described(train, "train_dataset: "),
            heldout=None if heldout is None else described(heldout, "eval_dataset: "),
            algorithm=method,
            rewards=rewards,
        )

    def _method(self, algorithm: str | AlgorithmSpec | Algorithm | None, args: TrainingConfig | None) -> AlgorithmSpec:
        """The spec that is meant; a `DARConfig` says DAR's itself."""
        algorithm = algorithm or self.default_algorithm or ("dar" if isinstance(args, DARConfig) else None)
        if algorithm is None:
            raise ConfigError(
                "algorithm is missing: say which method trains. For a GRPO script of TRL, algorithm='grpo' is GRPO as "
                "published and 'bnpo' what TRL's default loss computes; for a DPO script it is 'dpo'; 'dar' is DAR "
                f"(DARTrainer with a DARConfig). There are {', '.join(ALGORITHM_SPECS)}"
            )
        is_name = isinstance(algorithm, str) and (":" in algorithm or algorithm in ALGORITHM_SPECS)
        if not is_name and not isinstance(algorithm, (OwnAlgorithmSpec, Algorithm, *ALGORITHM_SPECS.values())):
            hint = nearest_hint(str(algorithm), ALGORITHM_SPECS)
            raise ConfigError(
                f"algorithm is {shown(algorithm)}, which is not known{hint}; pass a method, its spec (GRPOSpec(…)), "
                f"its import path, or one of the names {', '.join(ALGORITHM_SPECS)}"
            )
        if isinstance(args, DARConfig):
            if algorithm == "dar":
                return args.algorithm
            if unread := sorted(args.model_fields_set - TrainingConfig.model_fields.keys()):
                raise ConfigError(
                    f"args sets {', '.join(unread)}, which algorithm=… replaces: use a TrainingConfig with it, or "
                    "leave algorithm out"
                )
        if isinstance(algorithm, Algorithm):
            own = type(algorithm)
            settings = getattr(algorithm, "spec", None)
            recorded = settings.model_dump() if isinstance(settings, Spec) else {}
            return _own({**recorded, "type": f"{own.__module__}:{own.__name__}"})
        if isinstance(algorithm, str):
            return _own({"type": algorithm}) if ":" in algorithm else ALGORITHM_SPECS[algorithm]()
        return algorithm


class DARTrainer(Trainer):
    """`Trainer` with DAR, whose settings are those of its `DARConfig`.

        trainer = DARTrainer(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            reward_funcs=my_reward,
            args=DARConfig(output_dir="runs/first", max_steps=100),
            train_dataset=dataset,
        )
        trainer.train()

    Arguments as for `Trainer`.
    """

    config_class = DARConfig
    default_algorithm = "dar"


@contextmanager
def python_words(config: type[FlatConfig]) -> Iterator[None]:
    """Errors say options and keys as Python writes them; transformers' bars, which tell of files, are hidden."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except DarError as error:
        text = re.sub(r" \((?:resume_from_checkpoint|overwrite)=True[^)]*\)", "", str(error))
        text = text.replace("--resume", "resume_from_checkpoint=True").replace("--overwrite", "overwrite=True")
        text = text.replace("--allow-changed-recipe", "allow_changed_recipe=True")
        keys = dict.fromkeys(re.findall(r"(?:^|(?<=\S ))[a-z_]+\.[a-z_.]*[a-z_]\b", text))
        known = [key for key in keys if key in keys_below(config.recipe)]
        if known and "overrides=" not in text:
            text += f" (In Python: {', '.join(f'{key} is {config.written(key)}' for key in known)}.)"
        error.args = (text,)
        raise
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def measured(loop: Loop, step: int) -> dict[str, float]:
    """What a held-out evaluation finds now, as in metrics.jsonl; nothing is written."""
    found = {} if loop.known is None else loop.known.run()
    if loop.heldout is not None:
        with closing(build_engine(loop.spec.engine, log_file=loop.folder.path / "vllm.log")) as engine:
            found |= replace(loop.heldout, engine=engine).run(step).metrics
    return {f"eval/{name}": value for name, value in found.items()}


def _model_of(loop: Loop) -> Any:
    policy = loop.learner.policy
    assert isinstance(policy, Policy)
    return policy.model


def _own(recorded: dict[str, Any]) -> OwnAlgorithmSpec:
    return build_spec(recorded, where="algorithm", kind=OwnAlgorithmSpec)


def object_of(value: Any) -> Any | None:
    """What is given as an object; None for what is given by path."""
    return None if isinstance(value, str | Path) else value
