"""Loading velocity models from diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dar.config.model import ModelSourceSpec
from dar.errors import ConfigError, require_package
from dar.files.hub import require_source
from dar.files.paths import resolve_path


def load_flow(spec: ModelSourceSpec) -> Any:
    """A class-conditional diffusers model, fp32, that predicts velocities; of a run folder its `model/`.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    require_package("diffusers", "a flow-matching policy")
    from diffusers.models.auto_model import AutoModel  # noqa: PLC0415 - an extra

    path = resolve_path(spec.path)
    path = f"{path}/model" if Path(path, "model", "config.json").is_file() else path
    require_source(path, "model")
    try:
        model: Any = AutoModel.from_pretrained(path, revision=spec.revision)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"no diffusers model can be loaded from {path}: {type(error).__name__}: {first}") from error
    if not num_classes(model.config):
        raise ConfigError(f"{path} holds a {type(model).__name__} without class labels: only class-conditional ones do")
    if model.config.get("out_channels") not in (None, model.config.in_channels):
        raise ConfigError(
            f"{path} gives {model.config.out_channels} channels for images of {model.config.in_channels}: it predicts "
            "more than a velocity (a variance, say), so it is no flow-matching model"
        )
    return model


def num_classes(config: Any) -> int:
    """How many labels a model knows; 0 where it knows none."""
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0)


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of an image; D is their product."""
    size = config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return config.in_channels, height, width
