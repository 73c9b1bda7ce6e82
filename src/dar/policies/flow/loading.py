"""Velocity models from diffusers folders, and the class labels that are their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar.batch import Message
from dar.config.model import ModelSourceSpec
from dar.errors import ConfigError, DataError, require_package
from dar.files.hub import require_source
from dar.files.paths import resolve_path
from dar.policies.flow.digits import TOY, digits_folder
from dar.shown import words


def load_flow(spec: ModelSourceSpec) -> Any:
    """A class-conditional diffusers model, fp32, that predicts velocities; of a run folder its `model/`.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    require_package("diffusers", "a flow-matching policy")
    from diffusers.models.auto_model import AutoModel  # noqa: PLC0415 - an extra

    path = digits_folder() if spec.path == TOY else resolve_path(spec.path)
    path = f"{path}/model" if Path(path, "model", "config.json").is_file() else path
    require_source(path, "model")
    try:
        model: Any = AutoModel.from_pretrained(path, revision=spec.revision)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"no diffusers model can be loaded from {path}: {words(error).splitlines()[0]}") from error
    if not num_classes(model):
        raise ConfigError(f"{path} holds a {type(model).__name__} without class labels: only class-conditional ones do")
    if model.config.get("out_channels") not in (None, model.config.in_channels):
        raise ConfigError(f"{path} predicts more than a velocity (a variance, say), so it is no flow-matching model")
    return model


def num_classes(model: Any) -> int:
    """How many labels a model knows; 0 where it knows none."""
    return int(model.config.get("num_class_embeds") or model.config.get("num_embeds_ada_norm") or 0)


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of an image; D is their product."""
    size = model.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return model.config.in_channels, height, width


@dataclass(frozen=True)
class Labels:
    """What a tokenizer is to text: reads a prompt's label, and says the numbers of a completion's steps."""

    num_classes: int
    chat_template: None = None

    def read(self, content: str | Sequence[Message], *, here: str) -> tuple[int]:
        """The label, a prompt's one token. Raises DataError where it is none of the model's."""
        text = content.strip() if isinstance(content, str) else ""
        if not (text.isdecimal() and text.isascii() and len(text) < 10 and int(text) < self.num_classes):
            classes = f'"0" to "{self.num_classes - 1}"'
            raise DataError(f"{here}: the prompt {content!r:.80} is no class of the model, which knows {classes}")
        return (int(text),)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f"{token} " for token in tokens)
