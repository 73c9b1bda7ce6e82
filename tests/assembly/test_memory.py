"""What `dar plan` says a step takes, against what torch's allocator gave to one of the real loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from support.builders import make_groups
from support.ranks import as_if_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dar.assembly.loop import build_loop
from dar.assembly.memory import StepShape, memory_of, shape_of
from dar.assembly.plan import make_plan
from dar.batch import Weighted
from dar.config.recipe import load_recipe
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text.loading import checkpoint_layers
from dar.policies.text.policy import Policy

WIDE: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "vocab_size": 4096}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (WIDE | {"num_hidden_layers": 5}, {}),
    "checkpointed": (WIDE | {"num_hidden_layers": 6}, {"gradient_checkpointing": True}),
    "a large vocabulary of its own head": (
        {"vocab_size": 20000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}, {}),
    "a narrow residual": (
        {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6}, {}),
    "adapters on a bf16 base": (WIDE | {"num_hidden_layers": 6, "dtype": torch.bfloat16}, {"lora": {"rank": 8}}),
    "adapters, checkpointed": (WIDE | {"num_hidden_layers": 5, "dtype": torch.bfloat16},
                               {"lora": {"rank": 8}, "gradient_checkpointing": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_plan_predicts_the_peak_of_every_phase(
    case: str, write_recipe: Callable[..., Path], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    shape, training = CASES[case]
    tied = "head" not in case
    model: Any = make_model(**{"initializer_range": 0.02, "tie_word_embeddings": tied} | shape)
    model.to(shape.get("dtype"))
    model.save_pretrained(tiny_folder)
    recipe = write_recipe(
        model={"path": str(tiny_folder), **training},
        sampling={"max_completion_length": 12}, prompts_per_step=4, logging={"old_kl_prompts": 0},
        runtime={"device": "cpu", "precision": "fp32", "max_tokens_per_microbatch": 130},
    )  # fmt: skip
    spec = load_recipe(recipe)
    predicted = make_plan(spec).memory_gb
    loop = build_loop(spec, quiet=True)
    loop.begin()
    monkeypatch.setattr(Weighted, "carries_weight", lambda self, *_: torch.ones(len(self.weights), dtype=torch.bool))
    policy: Any = loop.learner.policy
    weights = [*policy.module.parameters(), *([] if policy._reference is None else policy._reference.parameters())]
    for parameter in loop.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    moments = [each for state in loop.optimizer.state.values() for each in state.values()]
    measured = {"weights": allocated(weights)}
    plain = loop._phase

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with plain(name), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
            yield
        measured[name] = allocated([*weights, *moments]) + most_at_once(found)

    monkeypatch.setattr(loop, "_phase", phase)
    loop.step(1)
    found = {name: measured[name] / 1e9 for name in predicted if name != "libraries"}
    expected = {name: predicted[name] for name in found}
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_rank_of_sharded_weights_holds_its_part_and_three_layers(dtype: torch.dtype, is_checkpointed: bool):
    model: Any = make_model(**WIDE | {"num_hidden_layers": 8, "vocab_size": 261}, initializer_range=0.02)
    if is_checkpointed:
        checkpoint_layers(model)
    shape = shape_of(model.config)
    groups = make_groups([3, 5], [2], [4])
    groups = replace(groups, completion_ids=groups.completion_ids.clamp(min=0))
    step = StepShape(tokens=12, last=12, microbatches=1, rows=0, length=0, prompts=0, trained=shape.total,
                     compute=dtype.itemsize, is_checkpointed=is_checkpointed)  # fmt: skip
    with as_if_of(4):
        policy = Policy(model, make_tokenizer(), Precision(torch.device("cpu"), dtype), temperature=1.0,
                        with_reference=False)  # fmt: skip
        policy.share("full")
        found = {}
        for phase in ("reference", "update"):
            with (
                policy.training(),
                torch.set_grad_enabled(phase == "update"),
                profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen,
            ):
                logprobs = policy.outputs(groups, Wants()).logprobs.sum()
                if phase == "update":
                    logprobs.backward()
            found[phase] = 12 * shape.total / 4 + most_at_once(seen)
    predicted = memory_of(shape, replace(step, shards=4))
    assert predicted["weights"] == 4 * shape.total / 4
    assert {phase: predicted[phase] for phase in found} == pytest.approx(found, rel=0.1)


def allocated(tensors: Iterable[Tensor]) -> int:
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in tensors}.values())


def most_at_once(profiled: Any) -> int:
    """Bytes of the CPU's allocator, above what was there before."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
