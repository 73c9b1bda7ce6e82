"""The completion tables: what they say of each token is what the metrics of the same step are means of."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import make_tokenizer
from PIL import Image
from support.builders import make_groups
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dar.assembly.loop import build_loop
from dar.config.recipe import load_recipe
from dar.record.completions import pngs, token_columns
from dar.trainer import run_loop


def trained(recipe: Path) -> tuple[list[dict[str, Any]], Path]:
    result = run_loop(build_loop(load_recipe(recipe), quiet=True), resume=False, command="")
    return result.metrics, Path(result.output_dir)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(file).to_pylist()


@pytest.mark.parametrize(("file", "prefix"), [("step-2", ""), ("heldout-step-2", "eval/")])
def test_tokens_and_their_log_ratio_add_up_to_the_step_s_metrics(
    write_recipe: Callable[..., Path], tmp_path: Path, file: str, prefix: str
) -> None:
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(steps=2, data={"train": prompts, "heldout": prompts}, logging={"completions_every": 1})
    metrics, folder = trained(recipe)
    rows = rows_of(folder / "completions" / f"{file}.parquet")
    (found,) = [row for row in metrics if row["step"] == 2 and f"{prefix}reward" in row]
    sums = []
    for row in rows:
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["ref_logprobs"]) == row["length"]
        sums.append(math.fsum(new - old for new, old in zip(row["logprobs"], row["ref_logprobs"], strict=True)))
        assert row["kl_ref"] == pytest.approx(sums[-1], abs=1e-4)
        assert (row["tokens"][-1] == "<eos>") == (row["finish_reason"] == "eos")
    assert math.fsum(sums) / len(sums) == pytest.approx(found[f"{prefix}kl/ref"], abs=1e-4)


def test_nothing_is_said_of_log_probabilities_that_nobody_knows(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": "say ", "chosen": f"yes {n}", "rejected": "no"}) + "\n" for n in "abc")
    )
    recipe = write_recipe(steps=1, algorithm="dpo", data=str(pairs), rewards=[], logging={"completions_every": 1})
    _, folder = trained(recipe)
    rows = rows_of(folder / "completions" / "step-1.parquet")
    assert {"tokens", "ref_logprobs"} <= rows[0].keys()
    assert not {"logprobs", "kl_ref"} & rows[0].keys()


def test_padding_is_no_token() -> None:
    groups = make_groups([2, 1], [2], [3], extra=1)
    groups.completion_ids[:] = torch.tensor([[70, 0, 71, 71], [72, 0, 71, 71]])[:, : groups.completion_ids.shape[1]]
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]])
    tokenizer = make_tokenizer()
    columns = token_columns(groups, logprobs, None, tokenizer)
    assert columns["tokens"] == [[tokenizer.decode([70]), "<eos>"], [tokenizer.decode([72])]]
    assert columns["logprobs"].to_pylist() == [[-1.0, -2.0], [-3.0]]
    assert columns.keys() == {"tokens", "logprobs"}


def test_tokens_keep_the_space_they_begin_with():
    model = BPE({"a": 0, "\u2581": 1, "\u2581a": 2, "b": 3, "<unk>": 4}, [("\u2581", "a")], unk_token="<unk>")
    metaspace = Tokenizer(model)
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=metaspace)
    ids = torch.tensor([[2, 2, 3]])
    assert (tokenizer.decode([2]), tokenizer.decode(ids[0])) == ("a", "a ab")
    groups = make_groups([3], [1], [2])
    groups.completion_ids[:] = ids
    assert token_columns(groups, None, None, tokenizer)["tokens"] == [[" a", " a", "b"]]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        # (x + 1) · 127.5, and what is outside [−1, 1] is the nearest there is
        ([[-1.5, -1.0, 0.0, 0.5, 1.0, 2.0]], [[0, 0, 128], [191, 255, 255]]),
        ([[-1.0] * 6, [0.0] * 6, [1.0] * 6], [[[0, 128, 255]] * 3] * 2),
        ([[-1.0] * 6, [1.0] * 6], [[128] * 3] * 2),
    ],
)
def test_images_are_kept_as_png(channels: list[list[float]], expected: list[Any]) -> None:
    images = torch.tensor([channels, [[1.0] * 6] * len(channels)]).view(2, -1, 2, 3)
    first, second = (Image.open(io.BytesIO(png)) for png in pngs(images))
    assert np.asarray(first).tolist() == expected
    assert np.asarray(second).min() == 255
