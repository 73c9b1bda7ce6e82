"""What is checked while a run is put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

from dar.build import build_loop
from dar.errors import ConfigError
from dar.recipe import load_recipe


def test_a_tokenizer_of_another_model_is_refused_before_weights_are_loaded(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    # "say a" is made of byte tokens between 5 and 260; this model has embeddings for 40.
    folder = tmp_path / "small"
    make_model(vocab_size=40).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"token id \d+, but the model knows 40 tokens"):
        build_loop(load_recipe(write_recipe(model=str(folder))), quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_logged_completion_of_another_tokenizer_is_refused_too(write_recipe: Callable[..., Path], tmp_path: Path):
    # "!" is byte 33, and the alphabet is in order of its characters: token 5. "z" is beyond the model's 40.
    folder, rows = tmp_path / "small", tmp_path / "rows.jsonl"
    make_model(vocab_size=40).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rows.write_text('{"prompt": "!", "completion": "z"}\n')
    recipe = write_recipe(model=str(folder), data=str(rows), algorithm="sft", rewards=[])
    with pytest.raises(ConfigError, match=r"token id \d+, but the model knows 40 tokens"):
        build_loop(load_recipe(recipe), quiet=True)


def test_a_gold_pair_of_another_tokenizer_is_refused_too(write_recipe: Callable[..., Path], tmp_path: Path):
    folder, rows, gold = tmp_path / "small", tmp_path / "rows.jsonl", tmp_path / "gold.jsonl"
    make_model(vocab_size=40).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    verdicts = '"chosen_complies": true, "rejected_complies": false'
    rows.write_text(f'{{"prompt": "!", "chosen": "!", "rejected": "\\"", {verdicts}}}\n')
    gold.write_text('{"prompt": "!", "chosen": "z", "rejected": "!"}\n')
    trace = {"type": "trace", "gold": str(gold)}
    recipe = write_recipe(model=str(folder), data=str(rows), algorithm=trace, rewards=[], prompts_per_step=1)
    with pytest.raises(ConfigError, match=r"token id \d+, but the model knows 40 tokens"):
        build_loop(load_recipe(recipe), quiet=True)


def test_an_offline_method_needs_no_rewards(write_recipe: Callable[..., Path], tmp_path: Path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    loop = build_loop(
        load_recipe(write_recipe(data=str(rows), algorithm="dpo", rewards=[], prompts_per_step=1)), quiet=True
    )
    assert loop.heldout is None
    assert "loss" in loop.step(1)
