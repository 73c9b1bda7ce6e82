"""Loading a causal language model and its tokenizer from a Hub id, a folder, a GGUF file or an installed package."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dar.config import LoraSpec, ModelSourceSpec
from dar.errors import ConfigError
from dar.paths import resolve_path
from dar.policy.gguf import converted
from dar.policy.toy import TOY, toy_folder
from dar.shown import words

log = logging.getLogger(__name__)


def resolve_model(spec: ModelSourceSpec) -> str:
    """The folder or Hub id to give to transformers (GGUF files are converted into the cache first).

    Raises:
        ConfigError: a local path that does not exist, or a GGUF file that cannot be used.
    """
    if spec.path == TOY:
        return str(toy_folder())
    path = resolve_path(spec.path)
    if path.startswith("~"):
        path = str(Path(path).expanduser())
    if path.endswith(".gguf"):
        return str(converted(Path(path), sha256=spec.sha256))
    if spec.sha256:
        raise ConfigError("model.sha256 is for .gguf files; pin a Hub model with model.revision")
    if (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).exists():
        raise ConfigError(f"the model path {path} does not exist")
    return path


def load_config(spec: ModelSourceSpec) -> Any:
    """The model's configuration alone (no weights); of a folder with an adapter, its base's.

    Raises:
        ConfigError: it cannot be had, or is not that of a model.
    """
    source = resolve_model(spec)
    if base := _base_of_adapter(source):
        with _adapter_needs(base, source):
            return load_config(spec.model_copy(update={"path": base}))
    try:
        return AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise _not_loadable(spec, error) from error


def load_model(spec: ModelSourceSpec) -> Any:
    """The causal language model with fp32 weights, dropout off; an adapter is merged into its base.

    Dropout would make π_t a different distribution at every look, so that no log-probability could be compared.

    Raises:
        ConfigError: it cannot be had, or is no causal language model.
    """
    source = resolve_model(spec)
    if base := _base_of_adapter(source):
        with _adapter_needs(base, source):
            return _merged(load_model(spec.model_copy(update={"path": base})), source)
    try:
        # With output_loading_info the call returns a pair, which its annotation does not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
        )
        model, found = loaded
    except Exception as error:
        raise _not_loadable(spec, error) from error
    if missing := sorted(found["missing_keys"]):
        # transformers would fill them with random numbers and say so in a log line.
        raise ConfigError(
            f"{spec.path} is not a whole causal language model: {len(missing)} of its weights are missing, the first "
            f"is {missing[0]}"
        )
    disable_dropout(model)
    return model


def _base_of_adapter(source: str) -> str | None:
    """What a folder with only an adapter, such as the `model` folder of a LoRA run, names as its base; else None."""
    description = Path(source) / "adapter_config.json"
    if not description.is_file() or (description.parent / "config.json").exists():
        return None
    try:
        return json.loads(description.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{description} does not name the adapter's base model: {first_line(error)}") from error


@contextlib.contextmanager
def _adapter_needs(base: str, source: str) -> Iterator[None]:
    """Says what a folder with only an adapter is missing when its base cannot be had."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"{source} holds only an adapter, and its base cannot be used: {error}. Put the base back, or correct "
            "base_model_name_or_path in the folder's adapter_config.json; or merge the two where both are: "
            f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{source}')"
            ".merge_and_unload().save_pretrained('merged')"
        ) from error


def _merged(model: Any, source: str) -> Any:
    """The base with the adapter of a folder merged into its weights, all of them trainable."""
    try:
        model = cast(Any, PeftModel.from_pretrained(model, source)).merge_and_unload()
    except Exception as error:
        raise ConfigError(f"the adapter does not fit or cannot be merged ({first_line(error)})") from error
    # An adapter trained on top of this model must name this folder, not its base, as what it belongs to.
    model.name_or_path = source
    return model.requires_grad_(True)


def load_tokenizer(spec: ModelSourceSpec) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none.
    """
    source = resolve_model(spec)
    try:
        return AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ConfigError(f"no tokenizer can be loaded from {spec.path}: {first_line(error)}") from error


def add_lora(model: Any, lora: LoraSpec | LoraConfig, task: TaskType = TaskType.CAUSAL_LM) -> PeftModel:
    """Wraps the model with trainable low-rank adapters; a classifier's head is trained whole.

    Raises:
        ConfigError: peft finds no module of the given names.
    """
    if isinstance(lora, LoraSpec):
        lora = LoraConfig(
            task_type=task,
            r=lora.rank,
            # peft annotates an int and computes alpha / r; a whole number is all that is lost here.
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=lora.target_modules,
        )
    try:
        wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"model.lora cannot be applied to {type(model).__name__}: {first_line(error)}") from error
    disable_dropout(wrapped)
    return wrapped  # pyright: ignore[reportReturnType] - a mixed model only comes from mixed=True


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, in modules and in attention's own setting."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType] - a plain number on these modules


def load_generation_config(spec: ModelSourceSpec) -> Any:
    """The model's generation config alone; where it has none, what its configuration implies.

    Raises:
        ConfigError: the model cannot be had.
    """
    try:
        return GenerationConfig.from_pretrained(resolve_model(spec), revision=spec.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(load_config(spec))


def eos_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's and the tokenizer's, which comes first.

    Raises:
        ConfigError: there is none, so no completion could ever end by itself.
    """
    found: list[int] = []
    for ids in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        if ids is not None:
            found += [ids] if isinstance(ids, int) else ids
    if not found:
        raise ConfigError(
            "the model has no end-of-sequence token: neither its generation config nor its tokenizer names one, so no "
            "completion could end by itself. Set tokenizer.eos_token before saving the model."
        )
    return tuple(dict.fromkeys(found))


def _not_loadable(spec: ModelSourceSpec, error: Exception) -> ConfigError:
    hint = ""
    if "trust_remote_code" in str(error):
        hint = " It comes with its own Python code: read it, then set model.trust_remote_code: true."
    elif isinstance(error, OSError):
        hint = " Is the name right, and can this machine reach the Hub (HF_HUB_OFFLINE is honoured)?"
    return ConfigError(f"no causal language model can be loaded from {spec.path}: {first_line(error)}{hint}")


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its message."""
    return f"{type(error).__name__}: {words(error).splitlines()[0]}"
