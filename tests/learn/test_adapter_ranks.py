"""Adapters whose ranks shrink: what is kept of them, what a plain peft reads back, and what the optimizer forgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import PeftModel
from support.handmade import make_spec

from dar.config.model import LoraSpec, RankScheduleSpec
from dar.errors import ConfigError
from dar.learn.adapter_ranks import AdapterRanks
from dar.learn.update import Updater
from dar.policies.precision import Precision
from dar.policies.text.loading import add_lora
from dar.policies.text.policy import Policy

TOKENS = torch.arange(40).view(2, 20)


def adapted(*, rank: int = 6, true_rank: int = 6, target_modules: str | list[str] = "all-linear") -> Any:
    """The tiny model with adapters of 14 layers that count, BA of each of some true rank."""
    model = add_lora(make_model(), LoraSpec(rank=rank, alpha=3.0, target_modules=target_modules))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(len(parameter), true_rank) @ torch.randn(true_rank, rank) / 4
    return model


def ranks_of(model: Any, **schedule: Any) -> AdapterRanks:
    return AdapterRanks(RankScheduleSpec(**{"start": 6, "energy": 0.9, "every": 2} | schedule), model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def test_a_cut_to_the_rank_of_the_product_changes_no_logit_and_a_deeper_one_is_the_nearest_product():
    model = adapted(true_rank=2)
    before, ranks = logits(model), ranks_of(model)
    layer = ranks.layers["model.layers.1.mlp.up_proj"]
    product = layer.get_delta_weight("default")
    size = layer.lora_A["default"].weight.detach().square().sum(1).mean().sqrt()
    assert (before - logits(make_model())).abs().max() > 0.5, "the adapter does nothing"
    ranks.restore({"ranks": dict.fromkeys(ranks.ranks(), 2)})
    assert {tuple(each.lora_A["default"].weight.shape[:1]) for each in ranks.layers.values()} == {(2,)}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=2e-5)
    # The rows of A are as long as they were on average, so that a step of the optimizer is as large as before.
    torch.testing.assert_close(layer.lora_A["default"].weight.norm(dim=1), size.expand(2))
    ranks.restore({"ranks": dict.fromkeys(ranks.ranks(), 1)})
    # Eckart and Young: what is lost is the second singular value.
    lost = torch.linalg.matrix_norm(product - layer.get_delta_weight("default"))
    torch.testing.assert_close(lost, torch.linalg.svdvals(product)[1], rtol=1e-4, atol=0)


def test_plain_peft_reads_a_cut_adapter_back(tmp_path: Path):
    model = adapted()
    ranks = ranks_of(model)
    ranks.restore({"ranks": {name: 1 + index % 5 for index, name in enumerate(ranks.ranks())}})
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_model(), str(tmp_path))), logits(model))
    merged = PeftModel.from_pretrained(make_model(), str(tmp_path)).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_ranks_are_looked_at_when_due_and_never_grow():
    model = adapted()
    ranks, seen = ranks_of(model), [dict.fromkeys(ranks_of(model).ranks(), 6)]
    for step in range(1, 7):
        found = ranks.after(step)
        seen.append(ranks.ranks())
        assert all(seen[-1][name] <= before for name, before in seen[-2].items())
        assert (seen[-1] != seen[-2]) == (found["lora/cut"] > 0) == (step % 2 == 0)
        assert ranks.cut_at == step - step % 2
        assert found["lora/parameters"] == sum(
            rank * (layer.in_features + layer.out_features)
            for rank, layer in zip(seen[-1].values(), ranks.layers.values(), strict=True)
        )
    # The rule keeps at most that share, and so less than all: of five values of any size it drops one.
    assert seen[2] != seen[0]
    assert max(seen[-1].values()) <= 3


def test_an_adapter_that_has_not_moved_keeps_its_rank_and_energy_1_keeps_all():
    assert ranks_of(add_lora(make_model(), LoraSpec(rank=6))).after(2)["lora/cut"] == 0
    assert ranks_of(adapted(), energy=1.0).after(2)["lora/rank_min"] == 6


@pytest.mark.parametrize(
    ("rank", "target", "message"),
    [(33, "all-linear", r"start is 33, but model\.layers\.0\.self_attn\.q_proj has no rank above 32$"),
     (4, ["embed_tokens"], "model.embed_tokens is none")],
)  # fmt: skip
def test_layers_that_cannot_have_the_rank_are_named(rank: int, target: Any, message: str):
    model = add_lora(make_model(), LoraSpec(rank=rank, target_modules=target))
    with pytest.raises(ConfigError, match=message):
        ranks_of(model, start=rank)


def test_the_optimizer_forgets_what_was_cut_and_nothing_else():
    policy = Policy(adapted(), make_tokenizer(), Precision(torch.device("cpu"), torch.float32), temperature=1.0)
    accelerator: Any = None
    ranks = ranks_of(policy.model)
    updater = Updater(policy, accelerator, make_spec(), ranks=ranks)
    for parameter in updater.parameters:
        parameter.grad = torch.ones_like(parameter)
    updater.optimizer.step()
    name = "model.layers.0.mlp.up_proj"
    ranks.restore({"ranks": {name: 2}})
    updater.follow_parameters()
    cut = {id(getattr(ranks.layers[name], part)["default"].weight) for part in ("lora_A", "lora_B")}
    assert [id(each) for each in updater.optimizer.param_groups[0]["params"]] == [*map(id, policy.trainable().values())]
    assert {id(each) for each in updater.parameters if each not in updater.optimizer.state} == cut
    assert len(updater.optimizer.state) == len(updater.parameters) - 2, "what was replaced is still remembered"
