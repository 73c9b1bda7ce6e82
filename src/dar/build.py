"""The only place where specs become objects."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from dar.algorithms import (
    BAPO,
    BNPO,
    DAO,
    DAPO,
    DAR,
    GRPO,
    GSPO,
    LCO,
    PPO,
    R2VPO,
    RLOO,
    SFT,
    VAR,
    Algorithm,
    BestOfN,
    DrGRPO,
    DualPPO,
    awr,
    offline_preference,
    online_preference,
)
from dar.config import (
    ActorCriticSpec,
    AnyAlgorithm,
    AnyReward,
    AWRSpec,
    BAPOSpec,
    BestOfNSpec,
    BNPOSpec,
    ChiPOSpec,
    DAOSpec,
    DAPOSpec,
    DARSpec,
    DPOSpec,
    DrGRPOSpec,
    DualPPOSpec,
    FunctionRewardSpec,
    GRPOSpec,
    GSPOSpec,
    IPOSpec,
    LCOSpec,
    LengthRewardSpec,
    MissingEosPenaltySpec,
    OnlineDPOSpec,
    OnlineIPOSpec,
    OnlineSLiCSpec,
    PatternCountRewardSpec,
    PPOSpec,
    R2VPOSpec,
    RegexRewardSpec,
    RLOOSpec,
    RunSpec,
    RuntimeSpec,
    SentimentRewardSpec,
    SFTSpec,
    SLiCSpec,
    SourceSpec,
    VARSpec,
    reward_name,
)
from dar.data import LoggedSet, PromptSet, PromptStream, load_rows, prepare_logged, prepare_prompts
from dar.data.logged import Kind
from dar.data.sources import rows_of
from dar.errors import ConfigError
from dar.evaluate import HeldoutEvaluation
from dar.policy import Policy
from dar.policy.critic import make_critic
from dar.policy.head import look_up_sparsely
from dar.policy.loading import (
    add_lora,
    disable_dropout,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
)
from dar.policy.logprobs import hidden_states, unwrapped
from dar.policy.policy import Precision
from dar.recipe import flatten
from dar.rewards import Reward, RewardFunction, RewardSet, builtin, load_function
from dar.rollout import InProcessEngine
from dar.rollout.truncation import Decoding
from dar.train.collect import Collector, LoggedCollector, OnlineCollector
from dar.train.display import Display
from dar.train.environment import describe_environment, settle_heap
from dar.train.loop import Loop
from dar.train.null_space import NullSpaceConstraint, gram_matrices, null_space_projection
from dar.train.optim import build_optimizer
from dar.train.recorder import Callback, Recorder
from dar.train.run_folder import RunFolder
from dar.train.update import Updater

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objects:
    """Python objects that stand in for what a recipe would load; None = as the recipe says."""

    model: Any | None = None
    tokenizer: Any | None = None
    reference: Any | None = None
    train_rows: Iterable[Any] | None = None
    heldout_rows: Iterable[Any] | None = None
    reward_functions: dict[str, RewardFunction] = field(default_factory=dict)
    lora: Any | None = None
    callbacks: Sequence[Callback] = ()


def build_loop(
    spec: RunSpec,
    objects: Objects | None = None,
    *,
    resume: bool = False,
    allow_changed_recipe: bool = False,
    quiet: bool = False,
) -> Loop:
    """Everything a run needs, the cheap checks first: data, rewards and run folder fail before weights are loaded.

    Args:
        spec: the recipe.
        objects: Python objects to use instead of loading.
        resume: the run folder must hold a run of the same recipe; otherwise it must hold none.
        allow_changed_recipe: resume although the recipe differs.
        quiet: print nothing while training.

    Raises:
        DarError: something cannot be had or does not fit together.
    """
    objects = objects or Objects()
    settle_heap()
    precision = resolve_precision(spec.runtime)
    accelerator = build_accelerator(spec, precision)
    if spec.prompts_per_step % accelerator.num_processes:
        raise ConfigError(
            f"prompts_per_step is {spec.prompts_per_step}, which {accelerator.num_processes} ranks cannot share equally"
        )
    tokenizer = objects.tokenizer or load_tokenizer(spec.model)
    config = objects.model.config if objects.model is not None else load_config(spec.model)
    context = context_length(config)
    logged = build_logged(spec, objects, tokenizer, context)
    if logged is None:
        train_prompts = build_prompts(spec, spec.data.train, objects.train_rows, tokenizer, context)
    else:
        train_prompts = logged.prompts
    heldout_prompts = build_heldout_prompts(spec, objects.heldout_rows, tokenizer, context)
    require_vocabulary(config, train_prompts, heldout_prompts, logged)
    rewards = [build_reward(reward, objects.reward_functions) for reward in spec.rewards]
    folder = RunFolder(spec.output_dir)
    if resume:
        folder.require_same_recipe(spec, allow_changes=allow_changed_recipe)
    elif accelerator.is_main_process:
        folder.require_new()
    algorithm = build_algorithm(spec.algorithm, max_completion_length=spec.sampling.max_completion_length)
    if spec.reference_sync is not None and not algorithm.needs_reference and heldout_prompts is None:
        raise ConfigError(
            f"reference_sync moves π₀, but {spec.algorithm.type} as it is set does not read it, and no held-out "
            "evaluation does: remove reference_sync"
        )
    policy = build_policy(
        spec,
        objects,
        tokenizer,
        precision,
        with_reference=algorithm.needs_reference or heldout_prompts is not None,
        critic=spec.algorithm.critic if isinstance(spec.algorithm, ActorCriticSpec) else None,
    )
    if accelerator.num_processes == 1:
        look_up_sparsely(unwrapped(policy.model))
    engine = InProcessEngine(policy, max_tokens=spec.runtime.max_cache_tokens)
    display = Display(num_steps=spec.steps, quiet=quiet or not accelerator.is_main_process)
    heldout = None
    if heldout_prompts is not None:
        heldout = HeldoutEvaluation(
            prompts=heldout_prompts.prompts[: spec.evaluation.max_prompts],
            policy=policy,
            engine=engine,
            rewards=RewardSet(rewards),
            num_generations=spec.evaluation.num_generations,
            max_completion_length=spec.sampling.max_completion_length,
            max_tokens=spec.runtime.max_tokens_per_microbatch,
            seed=spec.seed,
            decoding=Decoding(greedy=spec.evaluation.greedy, top_k=spec.evaluation.top_k, top_p=spec.evaluation.top_p),
        )
    updater = Updater(
        module=accelerator.prepare(policy.module),
        optimizer=build_optimizer(spec.optim, policy.trainable().values()),
        accelerator=accelerator,
        precision=precision,
        max_tokens=spec.runtime.max_tokens_per_microbatch,
        max_grad_norm=spec.optim.max_grad_norm,
        constraint=build_null_space(spec, policy, tokenizer, context),
        correction=spec.sampling.correction,
        correction_cap=spec.sampling.correction_cap,
    )
    stream = PromptStream(train_prompts, prompts_per_step=spec.prompts_per_step, seed=spec.seed)
    collector: Collector
    if logged is None:
        collector = OnlineCollector(
            engine=engine,
            rewards=RewardSet(rewards),
            stream=stream,
            num_generations=spec.num_generations,
            max_completion_length=spec.sampling.max_completion_length,
            seed=spec.seed,
            progress=display.tokens,
        )
    else:
        collector = LoggedCollector(logged, stream)
    if not resume and accelerator.is_main_process:
        # Only now, with everything loaded, is there a run that could be continued.
        folder.start(spec, describe_environment(precision, world_size=accelerator.num_processes))
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
        recorder=Recorder(folder, display, accelerator, spec.logging.every, objects.callbacks),
    )


def build_algorithm(spec: AnyAlgorithm, *, max_completion_length: int) -> Algorithm:
    """The method a recipe names."""
    match spec:
        case DARSpec():
            return DAR(spec)
        case AWRSpec():
            return awr(spec)
        case BestOfNSpec():
            return BestOfN(spec)
        case DAOSpec():
            return DAO(spec)
        case PPOSpec():
            return PPO(spec)
        case DualPPOSpec():
            return DualPPO(spec)
        case RLOOSpec():
            return RLOO(spec)
        case GRPOSpec():
            return GRPO(spec)
        case BNPOSpec():
            return BNPO(spec)
        case DAPOSpec():
            return DAPO(spec, max_completion_length=max_completion_length)
        case DrGRPOSpec():
            return DrGRPO(spec, max_completion_length=max_completion_length)
        case GSPOSpec():
            return GSPO(spec)
        case BAPOSpec():
            return BAPO(spec)
        case R2VPOSpec():
            return R2VPO(spec)
        case LCOSpec():
            return LCO(spec)
        case OnlineDPOSpec() | OnlineIPOSpec() | OnlineSLiCSpec():
            return online_preference(spec)
        case SFTSpec():
            return SFT()
        case DPOSpec() | IPOSpec() | SLiCSpec() | ChiPOSpec():
            return offline_preference(spec)
        case VARSpec():
            return VAR(spec)


def logged_kind(spec: AnyAlgorithm) -> Kind | None:
    """What rows an offline method reads, or None for a method that samples its own completions."""
    match spec:
        case SFTSpec():
            return "demonstrations"
        case DPOSpec() | IPOSpec() | SLiCSpec() | ChiPOSpec():
            return "preferences"
        case VARSpec():
            return "rewards"
        case _:
            return None


def build_reward(spec: AnyReward, functions: dict[str, RewardFunction]) -> Reward:
    """A reward of a recipe; a function given as an object is found by its reward's name.

    Raises:
        ConfigError: the function cannot be imported, or a package it needs is missing.
    """
    name = reward_name(spec)
    match spec:
        case FunctionRewardSpec():
            function = functions[name] if name in functions else load_function(spec.function)
        case SentimentRewardSpec():
            function = builtin.sentiment()
        case LengthRewardSpec():
            function = builtin.length(spec.target)
        case PatternCountRewardSpec():
            function = builtin.pattern_count(spec.pattern)
        case RegexRewardSpec():
            function = builtin.regex(spec.pattern)
        case MissingEosPenaltySpec():
            function = builtin.missing_eos_penalty(spec.penalty)
    return Reward(name, function, spec.weight)


def build_policy(
    spec: RunSpec,
    objects: Objects,
    tokenizer: Any,
    precision: Precision,
    *,
    with_reference: bool,
    critic: Literal["head", "model"] | None = None,
) -> Policy:
    """The policy with its reference.

    Raises:
        ConfigError: a model cannot be loaded or trained.
    """
    model = objects.model if objects.model is not None else load_model(spec.model)
    # Master weights are fp32 whatever the object came in: a small step would be lost to bf16's rounding.
    model = model.float()
    disable_dropout(model)
    lora = objects.lora or spec.model.lora
    if lora is not None:
        if spec.reference_sync is not None:
            raise ConfigError("reference_sync needs a reference of its own, but with an adapter the base model is π₀")
        model = add_lora(model, lora)
    if spec.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora is not None:
            # Without a gradient at the input, checkpointing would find nothing to recompute for.
            model.enable_input_require_grads()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is trainable: every parameter of the model has requires_grad=False")
    model.eval()
    reference = objects.reference
    if reference is None and spec.reference is not None and with_reference:
        reference = load_model(spec.reference)
    if reference is not None and with_reference:
        sizes = [each.config.get_text_config().vocab_size for each in (reference, model)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the reference has a vocabulary of {sizes[0]} tokens and the policy one of {sizes[1]}: they cannot be "
                "compared token by token"
            )
    return Policy(
        model,
        tokenizer,
        precision,
        temperature=spec.sampling.temperature,
        reference=reference if with_reference else None,
        with_reference=with_reference,
        reference_moves=spec.reference_sync is not None,
        critic=None if critic is None else make_critic(model, critic),
    )


def build_logged(spec: RunSpec, objects: Objects, tokenizer: Any, context: int | None) -> LoggedSet | None:
    """The completions an offline method learns from, or None for a method that samples its own.

    Raises:
        DataError: rows lack a column or hold something else than they should.
    """
    kind = logged_kind(spec.algorithm)
    if kind is None:
        return None
    source, rows = spec.data.train, objects.train_rows
    generation_config = load_generation_config(spec.model) if objects.model is None else objects.model.generation_config
    return prepare_logged(
        load_rows(source) if rows is None else rows_of(rows, where=source.path)[: source.max_rows],
        tokenizer,
        spec.data,
        kind=kind,
        eos_token_ids=eos_token_ids(generation_config, tokenizer),
        max_prompt_length=longest_prompt(spec, context),
        max_completion_length=spec.sampling.max_completion_length,
        where=source.path,
    )


def build_null_space(spec: RunSpec, policy: Policy, tokenizer: Any, context: int | None) -> NullSpaceConstraint | None:
    """The constraint of `optim.null_space`, its Gram matrices from one pass over the general prompts.

    Raises:
        ConfigError: the policy trains an adapter, or no layer is selected.
        DataError: the prompts cannot be read.
    """
    asked = spec.optim.null_space
    if asked is None:
        return None
    prompts = build_prompts(spec, asked.data, None, tokenizer, context).prompts
    model = unwrapped(policy.model)
    head = model.get_output_embeddings()

    def select(name: str, layer: torch.nn.Linear) -> bool:
        return layer is not head and (asked.layers == "all" or ".mlp." in name)

    def read() -> None:
        for prompt in prompts:
            hidden_states(model, input_ids=torch.tensor([prompt.token_ids], device=model.device), use_cache=False)

    with torch.no_grad():
        grams = gram_matrices(model, read, select)
    projections = {
        name: null_space_projection(gram, relative_threshold=asked.threshold).float() for name, gram in grams.items()
    }
    return NullSpaceConstraint({name: model.get_submodule(name) for name in grams}, projections)


def longest_prompt(spec: RunSpec, context: int | None) -> int | None:
    """Most tokens a prompt may have, so that a completion still fits the model.

    Raises:
        ConfigError: no room for a prompt is left.
    """
    longest = spec.data.max_prompt_length
    if context is None:
        return longest
    room = context - spec.sampling.max_completion_length
    if room < 1:
        raise ConfigError(
            f"sampling.max_completion_length is {spec.sampling.max_completion_length}, but the model reads at most "
            f"{context} tokens: no room is left for a prompt"
        )
    return min(room, longest or room)


def build_prompts(
    spec: RunSpec, source: SourceSpec, rows: Iterable[Any] | None, tokenizer: Any, context: int | None
) -> PromptSet:
    """Prompts read and tokenised.

    Raises:
        DataError: a file or row cannot be used, or prompts are too long.
        ConfigError: no room for a prompt is left, or messages meet a tokenizer without a chat template.
    """
    longest = longest_prompt(spec, context)
    table = load_rows(source) if rows is None else rows_of(rows, where=source.path)[: source.max_rows]
    return prepare_prompts(table, tokenizer, spec.data, max_prompt_length=longest, where=source.path)


def require_vocabulary(config: Any, train: PromptSet, heldout: PromptSet | None, logged: LoggedSet | None) -> None:
    """Raises ConfigError where the data has a token without an embedding: the tokenizer is another model's."""
    size = config.get_text_config().vocab_size
    texts = [prompt.token_ids for prompt in (*train.prompts, *(heldout.prompts if heldout else ()))]
    texts += [completion.token_ids for group in (logged.groups if logged else ()) for completion in group.completions]
    largest = max(map(max, texts))
    if largest >= size:
        raise ConfigError(
            f"the tokenizer gives the token id {largest}, but the model knows {size} tokens: it is not this model's "
            "tokenizer, or the model's embeddings were not resized for the tokens added to it"
        )


def build_heldout_prompts(
    spec: RunSpec, rows: Iterable[Any] | None, tokenizer: Any, context: int | None
) -> PromptSet | None:
    """Held-out prompts, or None when the recipe has none. Raises as `build_prompts`."""
    if spec.data.heldout is None:
        return None
    return build_prompts(spec, spec.data.heldout, rows, tokenizer, context)


def build_accelerator(spec: RunSpec, precision: Precision) -> Accelerator:
    """accelerate's view of ranks, devices and trackers.

    Raises:
        ConfigError: a tracker is unknown or not installed.
    """
    available = [str(name) for name in get_available_trackers()]
    missing = [name for name in spec.logging.trackers if name not in available]
    if missing:
        raise ConfigError(
            f"logging.trackers: {', '.join(missing)} cannot be used here; installed: {', '.join(available) or 'none'}"
        )
    # Trainer, engine and reference share one autocast of their own, so accelerate is to cast nothing.
    return Accelerator(
        cpu=precision.device.type == "cpu",
        mixed_precision="no",
        log_with=list(spec.logging.trackers) or None,
        project_dir=spec.output_dir,
    )


def resolve_precision(spec: RuntimeSpec) -> Precision:
    """Device and compute precision of a recipe.

    Raises:
        ConfigError: the device does not exist here.
    """
    name = spec.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device: '{name}' is not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"runtime.device: '{name}' is not offered; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device is {name}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use runtime.device=cpu, or install a CUDA build of torch on a machine with a GPU"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("runtime.device is mps, but this torch sees no Apple GPU; use runtime.device=cpu")
    wants_bf16 = spec.precision == "bf16" or (spec.precision == "auto" and _has_bf16(device))
    return Precision(device, torch.bfloat16 if wants_bf16 else torch.float32)


def _has_bf16(device: torch.device) -> bool:
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            # Elsewhere bf16 is emulated, and slower than fp32.
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        case _:
            return False


def context_length(config: Any) -> int | None:
    """Most tokens a model reads, or None when its configuration does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
