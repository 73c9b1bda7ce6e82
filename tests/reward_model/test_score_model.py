"""Scores of whole conversations: the packed and the padded pass against the model's own, one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.reward_models import make_classifier
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from dar.policies.precision import Precision
from dar.reward_model.score_model import ScoreModel, common_prefix

CPU = Precision(torch.device("cpu"), torch.float32)
PROMPT = (10, 11, 12, 13)
UNITS = [
    [(*PROMPT, 20, 21, 22), (*PROMPT, 30)],
    [(5, 6), (7, 8, 9)],  # nothing in common
    [(40, 41, 42), (40, 41, 42)],  # nothing of its own
    [(*PROMPT,), (*PROMPT, 50, 51)],  # one is the other's beginning
    [(60,)],
]


def small(kind: str) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 1, "num_labels": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    match kind:
        case "llama":
            return make_classifier()
        case "gpt2":
            return GPT2ForSequenceClassification(
                GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0, bos_token_id=0)
            ).eval()
        case _:
            return BertForSequenceClassification(
                BertConfig(**sizes, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
            ).eval()


@torch.no_grad()
def one_by_one(model: Any, units: list[Any]) -> list[float]:
    return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for unit in units for row in unit]


@pytest.mark.parametrize(
    ("kind", "packed", "way"),
    [("llama", True, "packed"), ("llama", False, "padded"), ("gpt2", True, "packed"), ("bert", True, "whole")],
)
@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_scores_are_the_models_own_whatever_the_batches(kind: str, packed: bool, way: str, max_tokens: int):
    model = small(kind)
    expected = one_by_one(model, UNITS)
    module = ScoreModel(model, packed=packed)
    assert module.way == way
    found = module.score(UNITS, CPU, max_tokens=max_tokens)
    assert [len(scores) for scores in found] == [len(unit) for unit in UNITS]
    assert [score for scores in found for score in scores] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_padding_at_the_end_of_a_row_is_not_its_last_token(packed: bool):
    """transformers takes the rightmost token that is not padding, also where the text itself ends with such tokens."""
    model = make_classifier()
    (own,) = one_by_one(model, [[(10, 11, 12, 1, 1)]])
    module = ScoreModel(model, packed=packed)
    ((score,),) = module.score([[(10, 11, 12, 1, 1)]], CPU, max_tokens=100)
    ((trimmed,),) = module.score([[(10, 11, 12)]], CPU, max_tokens=100)
    assert score == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert score == trimmed


@pytest.mark.parametrize("packed", [True, False])
def test_gradient_is_that_of_the_plain_forward(packed: bool):
    units = UNITS[:2]
    plain, model = make_classifier(), make_classifier()
    expected = torch.stack([plain(input_ids=torch.tensor([row])).logits[0, 0] for unit in units for row in unit])
    (expected * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    scores = ScoreModel(model, packed=packed)(units)
    (scores * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_batches_hold_every_unit_once_within_the_budget():
    packed, padded = ScoreModel(make_classifier()), ScoreModel(make_classifier(), packed=False)
    for module in (packed, padded):
        batches = module.batches(UNITS, 12)
        assert sorted(index for batch in batches for index in batch) == list(range(len(UNITS)))
        for batch in batches:
            rows = [row for index in batch for row in UNITS[index]]
            # Padded: rows times the longest. Packed: the shared beginning counted once.
            cost = len(rows) * max(map(len, rows))
            if module is packed:
                cost = sum(packed_tokens(UNITS[index]) for index in batch)
            assert cost <= 12 or len(batch) == 1
    assert len(packed.batches(UNITS, 1)) == len(UNITS)
    assert len(packed.batches(UNITS, 1000)) == 1


def packed_tokens(unit: Any) -> int:
    shared = common_prefix(unit)
    return shared + sum(len(row) - shared for row in unit)


def test_score_in_bf16_is_not_rounded_to_bf16():
    model = make_classifier()
    module = ScoreModel(model)
    found = module.score(UNITS, Precision(torch.device("cpu"), torch.bfloat16), max_tokens=1000)
    values = torch.tensor([score for scores in found for score in scores])
    assert not torch.equal(values, values.bfloat16().float())
    assert values.tolist() == pytest.approx(one_by_one(make_classifier(), UNITS), rel=0.1, abs=0.2)
