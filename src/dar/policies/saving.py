"""Saving a trained policy as an ordinary folder of its library: safetensors, tokenizer and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dar.errors import NonFiniteError
from dar.files.atomic import written


def save_model(model: Any, tokenizer: Any, folder: Path, *, card: str, notes: Mapping[str, str] | None = None) -> None:
    """Writes model (or adapter), tokenizer and README.md; written beside and renamed.

    Args:
        model, tokenizer: what to save; a model that reads no texts has no tokenizer, None.
        folder: replaced if it exists.
        card: the text of README.md.
        notes: further small files, by name.

    Raises:
        CheckpointError: the disk is full or not writable.
        NonFiniteError: a weight is NaN or infinite; a folder that is there stays.
    """
    # Finite steps may still come to this: merging an adapter multiplies two of its matrices.
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"the model is not saved to {folder}: {name} is not finite. Lower optim.learning_rate")
    with written(folder) as scratch:
        for part in filter(None, (model, tokenizer)):
            part.save_pretrained(scratch)
        for name, text in {"README.md": card, **(notes or {})}.items():
            (scratch / name).write_text(text, encoding="utf-8")
