"""A language model so small that anybody can align it in a minute: four letters and an end, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dar.policies.cached import made_once

TOY = "toy:letters"
"""What a recipe calls it."""


def toy_folder() -> Path:
    """The folder with the toy model and its tokenizer, made now unless it was before.

    Untrained, it says a, b, c, d and the end with about equal probability: five tokens a completion on average.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    return made_once("toy/letters-1", _make)


def _make(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
