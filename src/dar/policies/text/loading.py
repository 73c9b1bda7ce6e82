"""Loading a causal language model and its tokenizer from a Hub id, a folder, a GGUF file or an installed package."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from dar.config.model import LoraSpec, ModelSourceSpec
from dar.errors import ConfigError
from dar.files.hub import require_source
from dar.files.intake import parse_json, read_text
from dar.files.paths import resolve_path
from dar.policies.text.gguf import converted
from dar.policies.text.rotary import fixed_length
from dar.policies.text.toy import TOY, toy_folder
from dar.shown import first_line, one_line

log = logging.getLogger(__name__)

_COUNT = re.compile(
    r"(num|n|d)_\w+|(encoder|decoder)_layers|(hidden|intermediate|vocab)_size|max_position_\w+|head_dim|r"
)
"""Keys of a model's or an adapter's configuration that say how many or how large."""
_NUMBER = re.compile(r"temperature|top_[hkp]|(min|typical)_p|num_beams|\w+_penalty|(min|max)_(length|new_tokens|time)")
"""Keys of a generation configuration that hold a number."""
_BASE = ("base_model_name_or_path", "revision")
_MOST, _MOST_LAYERS = 1 << 31, 4096


def resolve_model(spec: ModelSourceSpec) -> str:
    """The folder or Hub id to give to transformers: of a run folder its `model/` (GGUF files are converted into the
    cache first).

    Raises:
        ConfigError: it is neither here nor on the Hub, a run that has no model yet, or a GGUF file that cannot be used.
    """
    if spec.path == TOY:
        return str(toy_folder())
    path = resolve_path(spec.path)
    if path.endswith(".gguf"):
        return str(converted(Path(path), sha256=spec.sha256))
    if spec.sha256:
        raise ConfigError("model.sha256 is for .gguf files; pin a Hub model with model.revision")
    require_source(path, "model")
    if Path(path).is_file():
        raise ConfigError(f"the model path {path} is a file: name the folder it is in")
    if Path(path, "config.yaml").is_file() and not Path(path, "config.json").is_file():
        if not Path(path, "model").is_dir():
            raise ConfigError(
                f"{path} is the folder of a run that has no model yet (its checkpoints are none): finish it with "
                f"--resume, or name {path}/best, the best policy so far, if the recipe's checkpoint.best keeps one"
            )
        path = str(Path(path, "model"))
    if Path(path, "diffusion_pytorch_model.safetensors").is_file():
        raise ConfigError(
            f"{path} is a model of diffusers, which writes no text: only recipes take it, with model.type flow"
        )
    # An adapter names its base by this: from another folder, a relative path would lead nowhere.
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def followed(spec: ModelSourceSpec) -> tuple[ModelSourceSpec, list[str]]:
    """The model that an adapter such as the `model` folder of a LoRA run belongs to, and the sources of the adapters to
    put on it, the first first: there is one for every run on top of another's.

    Raises:
        ConfigError: an adapter does not name its base, or the names go round in a circle.
    """
    adapters: list[str] = []
    while True:
        with explained(spec, adapters):
            source = resolve_model(spec)
            described = _read_json(source, "adapter_config.json", spec)
            if described is None:
                return spec, adapters
            file, base, revision = f"{source}/adapter_config.json", *map(described.get, _BASE)
            if not (isinstance(base, str) and base and isinstance(revision, str | None)):
                raise ConfigError(f"{file} does not name the adapter's base model: {_BASE[0]} is {base!r}")
            if not Path(source).is_dir():
                raise ConfigError(f"{source} is an adapter on the Hub: download it, and name the folder it is in")
            if str(Path(source).resolve()) in adapters:
                raise ConfigError(f"{file}: {_BASE[0]} leads round in a circle, back to this adapter")
        adapters.insert(0, str(Path(source).resolve()))
        spec = spec.model_copy(update={"path": base, "revision": revision, "sha256": None})


def load_config(spec: ModelSourceSpec, what: str = "causal language model") -> Any:
    """The model's configuration alone (no weights); of an adapter, its base's.

    Raises:
        ConfigError: it cannot be had, or is not that of a model.
    """
    spec, adapters = followed(spec)
    with explained(spec, adapters, what):
        source = resolve_model(spec)
        # Checked before transformers makes lists of that many entries.
        _read_json(source, "config.json", spec)
        return AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def load_model(spec: ModelSourceSpec, *, as_saved: bool = False) -> Any:
    """The causal language model, dropout off; an adapter is merged into its base.

    Dropout would make π_t a different distribution at every look, so that no log-probability could be compared.
    `as_saved` is that of `load_weights`.

    Raises:
        ConfigError: it cannot be had, or is no causal language model.
    """
    load_generation_config(spec)
    model, missing = load_weights(spec, AutoModelForCausalLM, as_saved=as_saved)
    if missing:
        # transformers would fill them with random numbers and say so in a log line.
        raise ConfigError(
            f"{spec.path} is not a whole causal language model: {len(missing)} of its weights are missing, the first "
            f"is {missing[0]}"
        )
    return model


def load_weights(
    spec: ModelSourceSpec, auto: Any, what: str = "causal language model", *, as_saved: bool = False, **changes: Any
) -> tuple[Any, list[str]]:
    """A model, dropout off, adapters merged, and the names of the weights that nothing held.

    Args:
        spec: where it comes from.
        auto: transformers' class for models of its kind.
        what: that kind, for messages.
        as_saved: in the precision that its configuration names; else, and where adapters are merged, fp32.
        changes: of its configuration, and further arguments of `from_pretrained`.

    Raises:
        ConfigError: it cannot be had, or is not of the kind.
    """
    config = load_config(spec, what)
    spec, adapters = followed(spec)
    with explained(spec, adapters, what):
        source = resolve_model(spec)
        _require_weights_for(config, source, auto, spec)
        # With output_loading_info the call returns a pair, which its annotation does not say.
        model, found = auto.from_pretrained(
            source,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype="auto" if as_saved and not adapters else torch.float32,
            output_loading_info=True,
            **changes,
        )
    # Constants that an architecture computes (a scale, say) were rounded to the weights' precision.
    if any(buffer.dtype in (torch.bfloat16, torch.float16) for buffer in model.buffers()):
        return load_weights(spec, auto, what, **changes)
    missing = set(found["missing_keys"])
    for adapter in adapters:
        try:
            adapted = put_on(model, adapter)
            # A part that is trained whole, such as a new head, comes with the adapter.
            whole = {name.removesuffix(".original_module") for name, _ in adapted.get_base_model().named_modules()
                     if name.endswith(".original_module")}  # fmt: skip
            missing = {name for name in missing if name.rpartition(".")[0] not in whole}
            model = adapted.merge_and_unload()
        except Exception as error:
            raise ConfigError(
                f"{adapter}: the adapter does not fit its base {spec.path} or cannot be merged ({first_line(error)})"
            ) from error
        # An adapter trained on top of this model must name this folder, not its base, as what it belongs to.
        model.name_or_path = adapter
        model.requires_grad_(True)
    disable_dropout(model)
    return model, sorted(missing)


def put_on(model: Any, adapter: str) -> Any:
    """The model with a saved adapter on it. Raises whatever peft raises, and where one of its weights is missing."""
    config = PeftConfig.from_pretrained(adapter)
    if config.task_type == TaskType.CAUSAL_LM:
        # peft would ask for a way to generate, which the layers under a reward model's head have not.
        config.task_type = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return PeftModel.from_pretrained(model, adapter, config=config, low_cpu_mem_usage=True)


def _require_weights_for(config: Any, source: str, auto: Any, spec: ModelSourceSpec) -> None:
    """Raises ConfigError where a configuration has far more weights than there are: transformers would make them up."""
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in Path(source).glob(kind))
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config, trust_remote_code=spec.trust_remote_code).parameters())
    if 0 < 8 * size < count:
        raise ConfigError(f"{source}/config.json describes {count:,} weights, but its files hold {size:,} bytes")


def _read_json(source: str, name: str, spec: ModelSourceSpec) -> dict[str, Any] | None:
    """A model's file of settings, its numbers checked; None where it has none.

    Raises:
        ConfigError: it is not a JSON object, or a number in it cannot be meant.
    """
    file = cached_file(
        source, name, revision=spec.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if file is None:
        return None
    found = parse_json(read_text(Path(file), max_bytes=1 << 26), file)
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is not a JSON object, but {type(found).__name__}")
    pattern = _NUMBER if name == "generation_config.json" else _COUNT
    parts = [found]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            most = _MOST_LAYERS if "layer" in key or "label" in key else _MOST
            is_count = pattern is _COUNT and isinstance(value, int | float)
            if pattern.fullmatch(key) and (isinstance(value, str | bool) or (is_count and not 0 <= value <= most)):
                raise ConfigError(f"{file}: {key} is {one_line(repr(value), 60)}, which no model can have")
    return found


def load_tokenizer(spec: ModelSourceSpec) -> Any:
    """The model's tokenizer; of an adapter, the one beside it, or else its base's.

    Raises:
        ConfigError: there is none.
    """
    base, adapters = followed(spec)
    own = [adapter for adapter in adapters if _read_json(adapter, "tokenizer_config.json", spec) is not None]
    source = own[-1] if own else resolve_model(base)
    try:
        _read_json(source, "config.json", base)
        return AutoTokenizer.from_pretrained(source, revision=base.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ConfigError(f"no tokenizer can be loaded from {spec.path}: {first_line(error)}") from error


def add_lora(model: Any, lora: LoraSpec | PeftConfig, task: TaskType = TaskType.CAUSAL_LM, *, seed: int = 0) -> Any:
    """Wraps the model with a trainable fp32 adapter, its first weights a function of the seed alone; a classifier's
    head is trained whole.

    Raises:
        ConfigError: peft finds no module of the given names, or cannot make the adapter.
    """
    if isinstance(lora, LoraSpec):
        lora = LoraConfig(
            task_type=task,
            r=lora.first_rank,
            # peft annotates an int and computes alpha / r; a whole number is all that is lost here.
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=lora.target_modules,
        )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, lora)
    except Exception as error:
        raise ConfigError(f"model.lora cannot be applied to {type(model).__name__}: {first_line(error)}") from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    disable_dropout(wrapped)
    return wrapped


def checkpoint_layers(model: Any) -> None:
    """Has activations computed again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "disable_adapter"):
        # Without a gradient at the input, checkpointing would find nothing to recompute for.
        model.enable_input_require_grads()


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, in modules and in attention's own setting."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType] - a plain number on these modules


def load_generation_config(spec: ModelSourceSpec) -> Any:
    """The model's generation config alone, of an adapter its base's; else what its configuration implies.

    Raises:
        ConfigError: the model cannot be had, or its generation_config.json cannot be used.
    """
    base, adapters = followed(spec)
    with explained(base, adapters):
        source = resolve_model(base)
        found = _read_json(source, "generation_config.json", base)
        if found is None:
            return GenerationConfig.from_model_config(load_config(base))
        try:
            config = GenerationConfig.from_dict(found)
            _token_ids(config.eos_token_id)
        except Exception as error:
            raise ConfigError(f"{source}/generation_config.json cannot be used: {first_line(error)}") from error
        return config


def eos_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's and the tokenizer's, which comes first.

    Raises:
        ConfigError: there is none, so no completion could ever end by itself, or one is no token id.
    """
    found = [*_token_ids(tokenizer.eos_token_id), *_token_ids(getattr(generation_config, "eos_token_id", None))]
    if not found:
        raise ConfigError(
            "the model has no end-of-sequence token: neither its generation config nor its tokenizer names one, so no "
            "completion could end by itself. Set tokenizer.eos_token before saving the model."
        )
    return tuple(dict.fromkeys(found))


def _token_ids(given: Any) -> list[int]:
    found = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if wrong := [each for each in found if type(each) is not int or not 0 <= each < _MOST]:
        raise ConfigError(f"eos_token_id is or holds {one_line(repr(wrong[0]), 60)}, which is no token's number")
    return found


@contextlib.contextmanager
def explained(spec: ModelSourceSpec, adapters: list[str], what: str = "causal language model") -> Iterator[None]:
    """Whatever is raised inside as a ConfigError: what could not be loaded from where, and what to do about it.

    Args:
        spec: of the model, or of an adapter's base.
        adapters: that need it.
        what: the model is meant to be.
    """
    try:
        yield
    except Exception as error:
        message = str(error)
        if not isinstance(error, ConfigError):
            hint = ""
            if "trust_remote_code" in message:
                hint = " It comes with its own Python code: read it, then set model.trust_remote_code: true."
            elif isinstance(error, OSError):
                weights = (
                    " does it have safetensors weights (pickled ones are not read)," if what == "reward model" else ""
                )
                hint = f" Is the name right,{weights} and can this machine reach the Hub (HF_HUB_OFFLINE is honoured)?"
            message = f"no {what} can be loaded from {spec.path}: {first_line(error)}{hint}"
        if adapters:
            message = (
                f"{adapters[-1]} holds only an adapter, and its base cannot be used: {message}. Put the base back, or "
                "correct base_model_name_or_path in the folder's adapter_config.json; or merge the two where both are: "
                f"dar export {adapters[-1]} OUT --merge"
            )
        raise ConfigError(message) from error


def context_length(config: Any) -> int | None:
    """Most tokens a model reads with the rotary factors of short rows, or None when its configuration does not say."""
    text = config.get_text_config()
    told = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return fixed_length(config) or told
