"""A whole run from its spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dar.assembly.algorithm import build_algorithm, require_reference_is_read
from dar.assembly.data import build_data
from dar.assembly.device import build_accelerator
from dar.assembly.objects import Objects
from dar.assembly.policy import build_null_space, build_policy
from dar.assembly.realignment import build_oracle, saved_pairs, triage_pairs, weigh_pairs
from dar.assembly.reward import build_reward
from dar.config.actor_critic import ActorCriticSpec
from dar.config.data import DecodingSpec
from dar.config.realignment import TRACESpec
from dar.config.recipe import flatten
from dar.config.run import RunSpec
from dar.console import Console
from dar.data.logged import LoggedSet
from dar.data.prompts import PromptSet, PromptStream
from dar.errors import ConfigError
from dar.learn.optim import build_optimizer
from dar.learn.update import Updater
from dar.policies.precision import resolve_precision
from dar.policies.text.compiling import require_compiler
from dar.policies.text.head import look_up_sparsely
from dar.policies.text.loading import context_length, load_config, load_tokenizer
from dar.policies.text.logprobs import unwrapped
from dar.policies.text.policy import Policy
from dar.reward_model.calibration import Calibration
from dar.reward_model.reward import calibrated
from dar.rewards import Reward, RewardSet
from dar.rollout.in_process.engine import Engine, InProcessEngine
from dar.run.best import BestPolicy
from dar.run.collect import Collector, LoggedCollector, OnlineCollector
from dar.run.display import Display
from dar.run.environment import describe_environment, settle_heap
from dar.run.folder import RunFolder
from dar.run.heldout import HeldoutEvaluation
from dar.run.loop import Loop
from dar.run.recorder import Recorder
from dar.run.watch import Watch


def build_loop(
    spec: RunSpec,
    objects: Objects | None = None,
    *,
    resume: bool = False,
    allow_changed_recipe: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Loop:
    """Everything a run needs, the cheap checks first: data, rewards and run folder fail before weights are loaded.

    Args:
        spec: the recipe.
        objects: Python objects to use instead of loading.
        resume: the run folder must hold a run of the same recipe; otherwise it must hold none.
        allow_changed_recipe: resume although the recipe differs.
        quiet: print nothing while training.
        console: where to print; standard output by default.

    Raises:
        DarError: something cannot be had or does not fit together.
    """
    objects = objects or Objects()
    settle_heap()
    precision = resolve_precision(spec.runtime)
    if spec.runtime.compile_layers:
        require_compiler(precision.device)
    accelerator = build_accelerator(spec, precision)
    if spec.prompts_per_step % accelerator.num_processes:
        raise ConfigError(
            f"prompts_per_step is {spec.prompts_per_step}, which {accelerator.num_processes} ranks cannot share equally"
        )
    tokenizer = objects.tokenizer or load_tokenizer(spec.model)
    config = objects.model.config if objects.model is not None else load_config(spec.model)
    data, oracle = build_data(spec, objects, tokenizer, config), build_oracle(spec)
    rewards = [build_reward(reward, objects.reward_functions, spec.runtime) for reward in spec.rewards]
    gold = [build_reward(reward, {}, spec.runtime) for reward in spec.evaluation.rewards]
    folder = RunFolder(spec.output_dir, data.fingerprints())
    if resume:
        folder.require_same_recipe(spec, allow_changes=allow_changed_recipe)
    elif accelerator.is_main_process:
        folder.require_new()
    pairs = saved = None
    if data.logged is not None and isinstance(spec.algorithm, TRACESpec):
        saved = saved_pairs(data.logged, folder) if resume else None
        pairs = saved or triage_pairs(
            data.logged, oracle, name=spec.algorithm.oracle, where=spec.data.train.path, accelerator=accelerator
        )
    max_length = spec.sampling.max_completion_length
    algorithm = objects.algorithm or build_algorithm(spec.algorithm, max_completion_length=max_length)
    require_reference_is_read(spec, algorithm, has_heldout=data.heldout is not None)
    policy = build_policy(
        spec,
        objects,
        tokenizer,
        precision,
        with_reference=algorithm.needs_reference or data.heldout is not None,
        critic=spec.algorithm.critic if isinstance(spec.algorithm, ActorCriticSpec) else None,
    )
    if accelerator.num_processes == 1:
        look_up_sparsely(unwrapped(policy.model))
    engine = InProcessEngine(policy, max_tokens=spec.runtime.max_cache_tokens)
    display = Display(num_steps=spec.steps, quiet=quiet or not accelerator.is_main_process, console=console)
    logged = data.logged
    if pairs is not None:
        # At the initial weights, which a resumed run has not restored yet; but it has the numbers from its start.
        if saved is None and data.gold is not None:
            pairs = weigh_pairs(pairs, data.gold, policy, spec, display)
        logged = pairs.labelled()
        display.note(pairs.summary())
    collector = _collector(spec, logged, data.train, rewards, engine, display)
    heldout = None if data.heldout is None else _heldout(spec, data.heldout, rewards, gold, policy, engine)
    updater = Updater(
        module=accelerator.prepare(policy.module),
        optimizer=build_optimizer(spec.optim, policy.trainable().values()),
        accelerator=accelerator,
        precision=precision,
        max_tokens=spec.runtime.max_tokens_per_microbatch,
        max_grad_norm=spec.optim.max_grad_norm,
        constraint=build_null_space(spec, policy, tokenizer, context_length(config)),
        correction=spec.sampling.correction,
        correction_cap=spec.sampling.correction_cap,
        reference=policy.held_tokens,
        compile_layers=spec.runtime.compile_layers,
        # What completions from the data were sampled with is not known, and nothing to agree with.
        max_gap=None if spec.algorithm.logged else spec.runtime.max_logprob_gap,
    )
    if not resume and accelerator.is_main_process:
        # Only now, with everything loaded, is there a run that could be continued.
        folder.start(spec, describe_environment(precision, world_size=accelerator.num_processes))
    if pairs is not None and saved is None and accelerator.is_main_process:
        folder.write_triage(pairs.columns())
    accelerator.init_trackers("dar", config={key: str(value) for key, value in flatten(spec).items()})
    return Loop(
        spec=spec,
        policy=policy,
        engine=engine,
        collector=collector,
        algorithm=algorithm,
        heldout=heldout,
        updater=updater,
        accelerator=accelerator,
        folder=folder,
        display=display,
        recorder=Recorder(
            folder, display, accelerator, policy.tokenizer, spec.logging.every, Watch(spec.alerts), objects.callbacks
        ),
        best=BestPolicy(spec, policy, folder),
        calibration=Calibration(
            rewards=calibrated(spec.rewards, rewards) | calibrated(spec.evaluation.rewards, gold, prefix="gold."),
            prompts=data.train.prompts,
            engine=engine,
            max_completion_length=spec.sampling.max_completion_length,
            seed=spec.seed,
        ),
    )


def _collector(
    spec: RunSpec,
    logged: LoggedSet | None,
    train: PromptSet,
    rewards: Sequence[Reward],
    engine: Engine,
    display: Display,
) -> Collector:
    """Where batches come from: the data's completions of an offline method, or the policy's own."""
    stream = PromptStream(train, prompts_per_step=spec.prompts_per_step, seed=spec.seed)
    if logged is not None:
        return LoggedCollector(logged, stream)
    return OnlineCollector(
        engine=engine,
        rewards=RewardSet(rewards),
        stream=stream,
        num_generations=spec.num_generations,
        max_completion_length=spec.sampling.max_completion_length,
        seed=spec.seed,
        progress=display.tokens,
    )


def _heldout(
    spec: RunSpec,
    prompts: PromptSet,
    rewards: Sequence[Reward],
    gold: Sequence[Reward],
    policy: Policy,
    engine: Engine,
) -> HeldoutEvaluation:
    """The evaluation on held-out prompts."""
    return HeldoutEvaluation(
        prompts=prompts.prompts[: spec.evaluation.max_prompts],
        policy=policy,
        engine=engine,
        rewards=RewardSet(_as_they_are(rewards)),
        num_generations=spec.evaluation.num_generations,
        max_completion_length=spec.sampling.max_completion_length,
        max_tokens=spec.runtime.max_tokens_per_microbatch,
        seed=spec.seed,
        decoding=DecodingSpec(greedy=spec.evaluation.greedy, top_k=spec.evaluation.top_k, top_p=spec.evaluation.top_p),
        gold=RewardSet(_as_they_are(gold)) if gold else None,
    )


def _as_they_are(rewards: Sequence[Reward]) -> list[Reward]:
    """Not standardised: a batch of held-out completions by itself would have the same mean every time."""
    return [replace(each, spec=each.spec.model_copy(update={"standardize": False})) for each in rewards]
