"""Tiny sequence classifiers with one output, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer, tiny_config
from transformers import LlamaForSequenceClassification


def make_classifier(*, seed: int = 0, **changes: Any) -> LlamaForSequenceClassification:
    """A tiny Llama with a head that says something."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(tiny_config(**{"num_labels": 1, **changes})).eval()


def save_classifier(folder: Path, *, chat: bool = True, **changes: Any) -> Path:
    """A folder with a tiny classifier and its tokenizer, as a user would point a recipe at."""
    make_classifier(**changes).save_pretrained(folder)
    make_tokenizer(chat=chat).save_pretrained(folder)
    return folder
