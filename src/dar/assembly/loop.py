"""A whole run from its spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dar.algorithms import preference
from dar.algorithms.base import Algorithm
from dar.assembly.algorithm import build_algorithm, build_before, reads_reference
from dar.assembly.data import RunData, build_data
from dar.assembly.device import build_accelerator, build_precision
from dar.assembly.engine import require_submit
from dar.assembly.flow import FlowParts
from dar.assembly.objects import NOTHING, Objects
from dar.assembly.retention import build_retention
from dar.assembly.reward import build_reward, check_calls
from dar.assembly.text import TextParts
from dar.collective import from_main
from dar.config.data import DecodingSpec
from dar.config.flow import FlowModelSpec
from dar.config.preference import DPOSpec
from dar.config.realignment import TRACESpec
from dar.config.recipe import flatten
from dar.config.run import RunSpec
from dar.console import Console
from dar.data.prompts import PromptStream
from dar.errors import require_package
from dar.files.hub import require_writable
from dar.learn.learner import Learner
from dar.learn.update import Updater
from dar.policies.protocol import Policy
from dar.record.environment import describe_environment, settle_heap
from dar.record.folder import RunFolder
from dar.record.watch import Watch
from dar.reward_model.calibration import Calibration
from dar.reward_model.reward import calibrated
from dar.rewards import Reward, RewardSet
from dar.rollout.portions import in_portions
from dar.rollout.protocol import Engine
from dar.run.ahead import Ahead
from dar.run.best import BestPolicy
from dar.run.collect import Collector, LoggedCollector, OnlineCollector
from dar.run.display import Display
from dar.run.heldout import HeldoutCompletions, HeldoutEvaluation
from dar.run.loop import Loop
from dar.run.recorder import Recorder
from dar.run.resample import ResamplingCollector
from dar.run.trainer_callbacks import adapted
from dar.shown import redacted


def build_loop(
    spec: RunSpec,
    objects: Objects = NOTHING,
    *,
    resume: bool | Path = False,
    allow_changed_recipe: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Loop:
    """Everything a run needs, the cheap checks first: data, rewards and run folder fail before weights are loaded.

    Args:
        spec: the recipe.
        objects: Python objects to use instead of loading.
        resume: the run folder must hold a run of the same recipe, if any step of one; otherwise it must hold none.
        allow_changed_recipe: resume although the recipe differs.
        overwrite: a run that the folder holds is removed, once this one has passed the checks before its first step.
        quiet: print nothing while training.
        console: where to print; standard output by default.

    Raises:
        DarError: something cannot be had or does not fit together.
    """
    settle_heap()
    precision = build_precision(spec)
    accelerator = build_accelerator(spec, precision)
    if spec.hub is not None:
        require_package("plotly", "hub: the report that is uploaded")
        from_main(partial(require_writable, spec.hub.repository))
    parts = build_parts(spec, objects)
    data, before = build_data(spec, objects, parts), build_before(spec)
    rewards = [build_reward(reward, objects.rewards, spec.runtime) for reward in spec.rewards]
    gold = [build_reward(reward, objects.gold, spec.runtime) for reward in spec.evaluation.rewards]
    if data.logged is None:  # an offline method scores held-out ones alone
        check_calls(rewards, data.train, parts.offered)
    check_calls([*rewards, *gold], data.heldout, parts.offered)
    retention = build_retention(spec, parts.tokenizer)
    display = Display(num_steps=spec.steps, quiet=quiet or not accelerator.is_main_process, console=console)
    engine = objects.engine or in_portions(parts.engine(display.note), spec.sampling.prompts_per_request)
    require_submit(spec, engine)
    folder = RunFolder(spec.output_dir, data.fingerprints())
    resume = folder.prepare(spec, resume=bool(resume), overwrite=overwrite, allow_changes=allow_changed_recipe)
    before.look(data, folder, resume=resume)
    length = parts.max_completion_length
    algorithm = objects.algorithm or build_algorithm(spec.algorithm, max_completion_length=length)
    parts.require(algorithm)
    with_reference = reads_reference(spec, algorithm, has_heldout=data.heldout is not None)
    policy = parts.build(precision, with_reference=with_reference)
    for notice in spec.silent_alerts:
        display.note(notice)
    data = replace(data, logged=before.measure(data, policy, display))
    updater = Updater(policy, accelerator, spec, parts.constraint(), parts.ranks())
    theirs = {"model": parts.bare, "processing_class": parts.tokenizer, "optimizer": updater.optimizer}
    callbacks = adapted(objects.callbacks, spec, **theirs)

    def start(resume: bool) -> None:
        if accelerator.is_main_process:
            if not resume:
                found = describe_environment(precision, world_size=accelerator.num_processes)
                sampler = {"reproduces": engine.reproduces, **getattr(engine, "software", {})}
                folder.start(spec, {**found, "engine": {"type": spec.engine.type, **sampler}, **objects.facts()})
            before.keep(folder)
        accelerator.init_trackers("dar", config={key: redacted(str(value)) for key, value in flatten(spec).items()})

    models = calibrated(spec.rewards, rewards) | calibrated(spec.evaluation.rewards, gold, prefix="gold.")
    watch, ahead = Watch(spec.alerts), Ahead(spec)
    return Loop(
        spec=spec,
        learner=Learner(updater, algorithm, display.tokens),
        engine=engine,
        collector=_collector(spec, data, rewards, policy, engine, display, ahead),
        ahead=ahead,
        heldout=_heldout(spec, data, rewards, gold, policy, engine),
        known=_known(spec, data, policy, algorithm),
        retention=None if retention is None else partial(retention, policy),
        accelerator=accelerator,
        folder=folder,
        display=display,
        start=start,
        recorder=Recorder(folder, display, accelerator, parts.tokenizer, spec.logging.every, watch, callbacks),
        best=BestPolicy(spec, policy, folder),
        calibration=Calibration(spec, models, data.train.prompts, engine),
    )


def build_parts(spec: RunSpec, objects: Objects) -> TextParts | FlowParts:
    """What is particular to the recipe's kind of policy. Raises ConfigError where it cannot be had."""
    model = spec.model
    return FlowParts(spec, model) if isinstance(model, FlowModelSpec) else TextParts(spec, model, objects)


def _collector(spec: RunSpec, data: RunData, rewards: Sequence[Reward], policy: Policy, engine: Engine,
               display: Display, ahead: Ahead) -> Collector:  # fmt: skip
    """Where batches come from: the data's completions of an offline method, or the policy's own."""
    stream = PromptStream(data.train, prompts_per_step=spec.prompts_per_step, seed=spec.seed)
    if data.logged is not None:
        return LoggedCollector(data.logged, stream)
    kind = OnlineCollector if spec.sampling.resample_tied is None else ResamplingCollector
    return kind(spec, policy, engine, RewardSet(rewards), stream, display.tokens, ahead)


def _heldout(
    spec: RunSpec, data: RunData, rewards: Sequence[Reward], gold: Sequence[Reward], policy: Policy, engine: Engine
) -> HeldoutEvaluation | None:
    """The evaluation on held-out prompts, if there are any."""
    if data.heldout is None:
        return None
    asked = spec.evaluation
    return HeldoutEvaluation(
        spec,
        data.heldout.prompts[: asked.max_prompts],
        policy,
        engine,
        RewardSet(_as_they_are(rewards)),
        decoding=DecodingSpec(greedy=asked.greedy, top_k=asked.top_k, top_p=asked.top_p),
        gold=RewardSet(_as_they_are(gold)) if gold else None,
    )


def _known(spec: RunSpec, data: RunData, policy: Policy, algorithm: Algorithm) -> HeldoutCompletions | None:
    """The evaluation on held-out completions of the data, if there are any."""
    if data.known is None:
        return None
    if isinstance(spec.algorithm, TRACESpec):
        # Its own loss is of triaged pairs; of pairs as they should be it is DPO's.
        algorithm = preference.build(DPOSpec(beta=spec.algorithm.beta))
    groups = data.known.groups[: spec.evaluation.max_prompts]
    return HeldoutCompletions(groups, policy, algorithm, spec.runtime.max_tokens_per_microbatch)


def _as_they_are(rewards: Sequence[Reward]) -> list[Reward]:
    """Not standardised: a batch of held-out completions by itself would have the same mean every time."""
    return [replace(each, spec=each.spec.model_copy(update={"standardize": False})) for each in rewards]
