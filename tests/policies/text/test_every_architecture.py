"""Rows longer than a window that is longer than what `can_pack` tries: packed or not, the plain model's numbers.

One architecture for each way of hiding keys; with EVERY_ARCHITECTURE=1 in the environment, all that transformers has.
"""

from __future__ import annotations

import os

import pytest
import torch
from support.architectures import CONFIG_CLASSES, UNBUILT, tiny
from support.handmade import plain_logprobs

from dar.batch import TokenGroups
from dar.errors import ConfigError
from dar.policies.text.head import check_head
from dar.policies.text.logprobs import LogprobModel

WINDOW, LENGTH = 30, 60

PACKED = {
    "phimoe": "a window in the mask alone",
    "qwen2": "full and windowed layers",
    "gemma4_text": "windowed layers with heads of another size",
    "ministral3": "queries that grow with their position",
}
PADDED = {
    "bloom": "biases in the mask",
    "deepseek_v32": "an indexer that keeps some keys",
    "diffllama": "two attentions a layer",
    "doge": "a mask made of the keys",
    "gpt_neo": "local attention of its own",
    "gpt_oss": "sinks",
    "lfm2": "convolutions",
    "llama4_text": "queries that grow with their place in the input",
    "minimax_m3_vl_text": "an indexer that keeps some blocks of keys",
}
REFUSED = {
    "bert": "more than a linear head",
    "cpmant": "padding changes its rows",
    "modernbert-decoder": "more than a linear head",
}
WAYS = dict.fromkeys(PACKED, "packed") | dict.fromkeys(PADDED, "padded") | dict.fromkeys(REFUSED, "refused")
EVERY = bool(os.environ.get("EVERY_ARCHITECTURE"))


def long_groups() -> TokenGroups:
    """Prompts of 7, 1 and 28 tokens, completions of up to 30."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([30, 1, 20, 5, 2, 30])
    ids = torch.randint(3, 64, (6, 30), generator=generator)
    prompts = tuple(tuple(torch.randint(3, 64, (n,), generator=generator).tolist()) for n in (7, 1, 28))
    return TokenGroups(prompts, (3, 1, 2), ids, torch.arange(30) < lengths.unsqueeze(1))


@pytest.mark.parametrize("name", sorted(CONFIG_CLASSES.keys() - UNBUILT.keys()) if EVERY else WAYS)
@torch.no_grad()
def test_long_rows_have_the_plain_models_logprobs_or_are_refused(name: str) -> None:
    model = tiny(name, window=WINDOW, length=LENGTH + 4)
    expected = plain_logprobs(model, long_groups(), 1.0)
    try:
        check_head(model)
    except ConfigError:
        way = "refused"
    else:
        module = LogprobModel(model, temperature=1.0)
        way = "packed" if module.is_packed else "padded"
        found = module(long_groups()).logprobs
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert way == WAYS.get(name, way)


def test_what_is_left_out_exists() -> None:
    assert UNBUILT.keys() <= CONFIG_CLASSES.keys()
