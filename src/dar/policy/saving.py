"""Saving a trained policy as an ordinary Hugging Face folder: safetensors, tokenizer and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from dar.errors import CheckpointError
from dar.policy.policy import Policy


def save_policy(policy: Policy, folder: Path, *, card: str) -> None:
    """Writes model (or adapter), tokenizer and README.md; written beside and renamed.

    Args:
        policy: what to save.
        folder: replaced if it exists.
        card: the text of README.md.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    scratch = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        policy.model.save_pretrained(scratch)
        policy.tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"the model cannot be written to {folder}: {error}") from error
