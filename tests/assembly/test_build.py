"""What is checked while a run is put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer

from dar.assembly.loop import build_loop
from dar.assembly.plan import make_plan
from dar.config.recipe import load_recipe
from dar.errors import ConfigError, DataError


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


def test_rows_without_the_references_rewards_are_found_before_anything_runs(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "ref_rewards": [1, 0.5]}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match=r"row 1: 'ref_rewards' must be a list of the rewards .*, found None$"):
        build_loop(load_recipe(write_recipe(data=str(rows), algorithm="a_star_po")), quiet=True)
    assert not (tmp_path / "run").exists()


MATH = [{"type": "math"}]
IFEVAL = [{"type": "ifeval"}]
COUNT = {"instruction_id_list": ["length_constraints:number_words"]}


@pytest.mark.parametrize(
    ("rewards", "row", "message"),
    [
        (MATH, {"answer": "####"}, "row 1 cannot be scored by the reward 'math': no answer can be read"),
        (MATH, {"answer": True}, "row 1 cannot be scored by the reward 'math': no answer can be read"),
        (
            IFEVAL,
            COUNT | {"kwargs": [{}]},
            "row 1 cannot be scored by the reward 'ifeval': .* takes num_words, relation",
        ),
        (IFEVAL, {"instruction_id_list": ["no:such"], "kwargs": [{}]}, "row 1 .* unknown IFEval instruction 'no:such'"),
        (
            [{"type": "reasoning_gym"}],
            {"reasoning_gym": {"task": "x"}},
            "row 1 .* must have task, size, seed and index",
        ),
        (
            [{"type": "math", "column": "gold"}],
            {},
            "has no column 'gold', which the reward 'math' reads; it has: answer",
        ),
    ],
)
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_rows_that_cannot_be_scored_are_found_before_anything_runs(
    write_recipe: Callable[..., Path], tmp_path: Path, rewards: Any, row: dict[str, Any], message: str, part: str
):
    good = {"prompt": "a", "answer": "1", "instruction_id_list": None, "kwargs": None, "reasoning_gym": None}
    for name in ("train", "heldout"):
        rows = [good, good | (row if name == part else {})]
        if "gold" in message:
            rows = [{"prompt": "a", "answer": "1"} | ({} if name == part else {"gold": "1"})]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    recipe = write_recipe(
        data={"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")}, rewards=rewards
    )
    for build in (make_plan, lambda spec: build_loop(spec, quiet=True)):
        with pytest.raises(DataError, match=rf"{part}.jsonl\S* {message}"):
            build(load_recipe(recipe))
