"""Sequence-classification models with one output: loading one to use, or making one of a language model to train."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftConfig, TaskType
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from dar.config.model import ModelSourceSpec
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.text.loading import disable_dropout, followed, load_config, load_tokenizer, load_weights
from dar.reward_model.score_model import reads_last_token

log = logging.getLogger(__name__)

PAD_TOKEN = "<|padding|>"
"""What is added to a tokenizer that has no padding token of its own."""


def load_classifier_config(spec: ModelSourceSpec) -> Any:
    """The configuration of a reward model (no weights).

    Raises:
        ConfigError: it cannot be had, is not that of a sequence classifier, or has more than one output.
    """
    config = _config(spec)
    if not _is_classifier(config):
        kind = ", ".join(config.architectures or ["a model of unknown kind"])
        raise ConfigError(
            f"{spec.path} is {kind}, not a reward model: a sequence-classification model with one output is needed. "
            "Train one with dar reward-model"
        )
    _require_one_output(config, spec)
    return config


def load_classifier(spec: ModelSourceSpec) -> Any:
    """A reward model with fp32 weights, dropout off, frozen.

    Raises:
        ConfigError: as `load_classifier_config`, or weights are missing or not in safetensors.
    """
    load_classifier_config(spec)
    model, missing = _load(spec)
    if missing:
        raise ConfigError(
            f"{spec.path} is not a whole reward model: {len(missing)} of its weights are missing, the first is "
            f"{missing[0]}"
        )
    if followed(spec)[1] and (padding := load_tokenizer(spec).pad_token_id) is not None:
        # An adapter's folder has no configuration of its own in which this would stand.
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
    return model.requires_grad_(False)


def make_classifier(spec: ModelSourceSpec, tokenizer: Any, given: Any | None = None) -> Any:
    """A sequence classifier with one output to train: as it is, or a language model's layers under a new head.

    A new head is 0, so that every score is 0 at the start and the first differences are learnt ones.

    Args:
        spec: a causal language model, or a sequence classifier with one output.
        tokenizer: its tokenizer; gets a padding token of its own where it has none, for in a batch transformers takes
            the last token that is not padding for the end, and an end-of-sequence token that is padding too is none.
        given: a sequence classifier to train instead of loading.

    Raises:
        ConfigError: it cannot be had, or it is a classifier with several outputs.
    """
    config = _config(spec) if given is None else given.config
    if given is not None or _is_classifier(config):
        _require_one_output(config, spec)
        model, missing = _load(spec) if given is None else (given.float(), [])
        disable_dropout(model)
    else:
        model, missing = _load(spec)
        head = [name for name in missing if name.startswith("score.")]
        missing = [name for name in missing if name not in head]
        if not head or not isinstance(getattr(model, "score", None), nn.Module):
            raise ConfigError(f"{type(model).__name__} has no layer 'score' that could be trained as a new head")
        if not reads_last_token(model):
            raise ConfigError(f"{type(model).__name__} does not score the state of the last token; please report it")
        for parameter in model.score.parameters():
            nn.init.zeros_(parameter)
    if missing:
        raise ConfigError(f"{spec.path} lacks {len(missing)} of its weights, the first is {missing[0]}")
    _give_padding(model, tokenizer)
    return model.train()


def freeze_in(model: Any, precision: Precision) -> None:
    """Puts the model on its device, and its linear layers but the head into the compute precision."""
    model.eval().to(precision.device)
    head = {id(layer) for layer in getattr(model, "score", nn.Identity()).modules()}
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and id(layer) not in head:
            layer.to(precision.dtype)


def _give_padding(model: Any, tokenizer: Any) -> None:
    config = model.config.get_text_config()
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        known = config.vocab_size
        if len(tokenizer) > known:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            # Nothing reads the new rows, for padding is masked; at random they would make another model every time.
            with torch.no_grad():
                model.get_input_embeddings().weight[known:] = 0.0
    config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _config(spec: ModelSourceSpec) -> Any:
    config = load_config(spec, "reward model")
    if any(PeftConfig.from_pretrained(adapter).task_type == TaskType.SEQ_CLS for adapter in followed(spec)[1]):
        # Whatever the base is, the adapter brings a head.
        config.architectures, config.num_labels = ["ForSequenceClassification"], 1
    return config


def _require_one_output(config: Any, spec: ModelSourceSpec) -> None:
    if config.num_labels != 1:
        raise ConfigError(
            f"{spec.path} has {config.num_labels} outputs (num_labels), but a reward model has one: which of them, or "
            "which sum, would be the reward, nobody said"
        )


def _load(spec: ModelSourceSpec) -> tuple[Any, list[str]]:
    # transformers would report a head that is to come, or to be made, as missing. Pickled weights could run code.
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return load_weights(
            spec, AutoModelForSequenceClassification, "reward model", use_safetensors=True, num_labels=1
        )
    finally:
        transformers_logging.set_verbosity(before)
