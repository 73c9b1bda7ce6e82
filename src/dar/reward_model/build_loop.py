"""A reward model's training from its spec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from dar.config.data import SourceSpec
from dar.config.reward_model import RewardModelSpec
from dar.data.sources import fingerprint, load_rows
from dar.errors import ConfigError
from dar.learn.optim import build_optimizer, require_optimizer
from dar.learn.ranks import join_ranks
from dar.policies.base import fingerprint as weights_fingerprint
from dar.policies.precision import resolve_precision
from dar.policies.text.loading import add_lora, checkpoint_layers, context_length, load_config, load_tokenizer
from dar.record.environment import describe_environment, settle_heap
from dar.record.folder import RunFolder
from dar.reward_model.classifier import make_classifier
from dar.reward_model.loop import RewardModelLoop
from dar.reward_model.pairs import TokenPair, read_pairs, tokenize_pairs
from dar.reward_model.score_model import ScoreModel
from dar.run.display import Display


@dataclass(frozen=True)
class GivenPairs:
    """Python objects that stand in for what a recipe would load; None = as the recipe says."""

    model: Any | None = None
    tokenizer: Any | None = None
    train_rows: Iterable[Any] | None = None
    heldout_rows: Iterable[Any] | None = None
    lora: PeftConfig | None = None


def build_reward_model_loop(
    spec: RewardModelSpec,
    given: GivenPairs = GivenPairs(),
    *,
    resume: bool | Path = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> RewardModelLoop:
    """Everything the training needs, the cheap checks first: data and run folder fail before weights are loaded.

    Args:
        spec: the recipe.
        given: Python objects to use instead of loading.
        resume, overwrite: as `dar.assembly.loop.build_loop`.
        quiet: print nothing while training.

    Raises:
        DarError: something cannot be had or does not fit together.
    """
    settle_heap()
    precision = resolve_precision(spec.runtime)
    require_optimizer(spec.optim)
    accelerator = join_ranks(spec.runtime, precision)
    if spec.pairs_per_step < accelerator.num_processes:
        raise ConfigError(
            f"pairs_per_step is {spec.pairs_per_step}, but there are {accelerator.num_processes} ranks, and each has "
            "a pair of its own: start fewer, or raise pairs_per_step"
        )
    tokenizer = given.tokenizer or load_tokenizer(spec.model)
    context = context_length(load_config(spec.model) if given.model is None else given.model.config)
    pairs = build_pairs(spec, spec.data.train, tokenizer, context, given.train_rows)
    source = spec.data.heldout
    heldout = [] if source is None else build_pairs(spec, source, tokenizer, context, given.heldout_rows)
    tables = {"data.train": pairs, "data.heldout": heldout}
    folder = RunFolder(spec.output_dir, {name: fingerprint(map(astuple, table)) for name, table in tables.items()})
    folder.prepare(spec, resume=bool(resume), overwrite=overwrite)
    model = make_classifier(spec.model, tokenizer, given.model)
    initial = weights_fingerprint(model)
    if (lora := given.lora or spec.model.lora) is not None:
        model = add_lora(model, lora, TaskType.SEQ_CLS, seed=spec.seed)
    if spec.model.gradient_checkpointing:
        checkpoint_layers(model)
    module = ScoreModel(model.to(precision.device))

    def start(resume: bool) -> None:
        if not resume and accelerator.is_main_process:
            folder.start(spec, describe_environment(precision, world_size=accelerator.num_processes))

    return RewardModelLoop(
        spec=spec,
        module=module,
        tokenizer=tokenizer,
        accelerator=accelerator,
        precision=precision,
        optimizer=build_optimizer(spec.optim, [p for p in model.parameters() if p.requires_grad]),
        pairs=pairs,
        heldout=heldout,
        initial=initial,
        folder=folder,
        display=Display(num_steps=spec.num_steps(len(pairs)), quiet=quiet or not accelerator.is_main_process),
        start=start,
    )


def build_pairs(
    spec: RewardModelSpec, source: SourceSpec, tokenizer: Any, context: int | None, rows: Iterable[Any] | None = None
) -> list[TokenPair]:
    """The pairs of a source, or of rows given, tokenised. Raises as `read_pairs` and `tokenize_pairs`."""
    pairs = read_pairs(load_rows(source, rows), spec.data, margin_column=spec.loss.margin_column, where=source.path)
    longest = min(filter(None, (spec.data.max_length, context)), default=None)
    return tokenize_pairs(pairs, tokenizer, spec.data, max_length=longest, where=source.path)
