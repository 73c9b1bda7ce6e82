"""Shared fixtures: a tiny model and tokenizer, built on the spot."""

from __future__ import annotations

import json
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Tiny tensors: a second thread costs more than it brings, and far more on a busy machine.
torch.set_num_threads(1)

# A shell starts what runs in its background with Ctrl-C ignored; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, plus <eos>, <pad> and three role markers: 261 entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers and a vocabulary of 261, with weights that make logits far from uniform."""
    settings: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 1,
    }
    return LlamaConfig(**(settings | changes))


def make_model(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama that shares its embedding with its head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**{"tie_word_embeddings": True, **changes})).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder with the tiny model and tokenizer, as a user would point a recipe at."""
    folder = tmp_path / "tiny-model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_folder: Path) -> Callable[..., Path]:
    """Writes a small, fast recipe (fp32, the tiny model) and returns its path; keyword arguments replace keys."""

    def write(**changes: Any) -> Path:
        rows = [{"prompt": [{"role": "user", "content": f"say {word}"}]} for word in ("a", "bee", "sea", "dee", "eh")]
        (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        recipe: dict[str, Any] = {
            "model": str(tiny_folder),
            "data": str(tmp_path / "prompts.jsonl"),
            "algorithm": "dar",
            "rewards": [{"type": "length", "target": 4}],
            "sampling": {"max_completion_length": 8},
            "optim": {"type": "adamw", "learning_rate": 1e-3},
            "prompts_per_step": 2,
            "num_generations": 4,
            "steps": 3,
            "output_dir": str(tmp_path / "run"),
            "checkpoint": {"every": 1},
            "runtime": {"device": "cpu", "precision": "fp32"},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes))
        return path

    return write
