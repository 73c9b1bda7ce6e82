"""Loading and saving velocity models as diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dar.errors import CheckpointError, ConfigError, NonFiniteError, require_package
from dar.files.atomic import written


def load_flow(path: str) -> Any:
    """A class-conditional diffusers model, fp32, that predicts velocities.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    require_package("diffusers", "a flow-matching policy")
    from diffusers import AutoModel  # noqa: PLC0415 - an extra

    try:
        model = AutoModel.from_pretrained(path)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"no diffusers model can be loaded from {path}: {type(error).__name__}: {first}") from error
    config = model.config
    if not num_classes(model):
        raise ConfigError(f"{path} holds a {type(model).__name__} without class labels: only class-conditional ones do")
    if config.get("out_channels") not in (None, config.get("in_channels")):
        raise ConfigError(
            f"{path} gives {config['out_channels']} channels for images of {config['in_channels']}: it predicts more "
            "than a velocity (a variance, say), so it is no flow-matching model"
        )
    return model


def num_classes(model: Any) -> int:
    """How many labels it knows; 0 where it knows none."""
    config = model.config
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0)


def save_flow(model: Any, folder: Path, *, card: str, notes: Mapping[str, str] | None = None) -> None:
    """Writes the model and README.md; written beside and renamed. Raises as `dar.policies.text.saving.save_model`."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"the model is not saved to {folder}: {name} is not finite. Lower optim.learning_rate")
    try:
        with written(folder) as scratch:
            model.save_pretrained(scratch)
            for name, text in {"README.md": card, **(notes or {})}.items():
                (scratch / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the model cannot be written to {folder}: {error}") from error
