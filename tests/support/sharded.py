"""Run by every rank: what sharded weights compute, and runs that stop, go on, idle and fail with them."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer

from dar.assembly.loop import build_loop
from dar.collective import from_main, num_ranks, own_rank, whole_tensor
from dar.config.model import LoraSpec
from dar.config.recipe import load_recipe
from dar.errors import NonFiniteError
from dar.learn.ranks import own_groups
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text.loading import add_lora
from dar.policies.text.policy import Policy
from dar.trainer import run_loop
from support.builders import make_groups


def policy_of(kind: str) -> Policy:
    model: Any = make_model(tie_word_embeddings=kind != "untied")
    if kind == "lora":
        model = add_lora(model.bfloat16(), LoraSpec(rank=2)).float()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            if not parameter.requires_grad:  # what is frozen may be of another precision than what is trained
                parameter.data = parameter.data.bfloat16()
    precision = Precision(torch.device("cpu"), torch.bfloat16 if kind == "lora" else torch.float32)
    return Policy(model, make_tokenizer(), precision, temperature=0.9)


def compare(kind: str, sharding: Any) -> None:
    """Log-probabilities bit for bit, gradients to rounding; one rank has more portions than the other."""
    groups = make_groups([3, 5, 2, 7, 4, 6], [2, 2, 2], [4, 1, 9])
    groups = replace(groups, completion_ids=groups.completion_ids.clamp(min=0) % 261)
    torch.manual_seed(0)
    alone = policy_of(kind)
    torch.manual_seed(0)
    shared = policy_of(kind)
    shared.share(sharding)
    parameters = shared.trainable()
    mine = groups.rows_of(*own_groups(3))
    own = groups.select(mine)
    for pass_of in (Policy.logprobs, Policy.ref_logprobs):
        expected, found = pass_of(alone, groups, max_tokens=1), pass_of(shared, own, max_tokens=1)
        assert torch.equal(found, expected[mine, : found.shape[1]]), f"{kind} {sharding} {pass_of.__name__}"
    alone.outputs(groups, Wants()).logprobs.sum().backward()
    with shared.training():
        (shared.outputs(own, Wants()).logprobs.sum() * num_ranks()).backward()
    limit = 0.02 if kind == "lora" else 2e-6
    for name, parameter in alone.trainable().items():
        grads: Any = parameters[name].grad, parameter.grad
        got, want = map(whole_tensor, grads)
        gap = float((got - want).norm() / want.norm().clamp(min=1e-12))
        assert gap < limit, f"{kind} {sharding} {name}: {gap}"


def run(folder: str, *overrides: str, resume: bool = False) -> None:
    loop = build(folder, *overrides, resume=resume)
    run_loop(loop, resume=resume, command="")


def build(folder: str, *overrides: str, resume: bool = False) -> Any:
    spec = load_recipe(sys.argv[1], [f"output_dir={folder}", "runtime.sharding=full", *overrides])
    return build_loop(spec, resume=resume, allow_changed_recipe=True, quiet=True)


def fail(folder: str) -> None:
    """The loss of one rank is not finite in step 2."""
    loop = build(folder, "checkpoint.every=0")
    terms, calls = loop.algorithm.terms, iter(range(99))

    def poisoned(outputs: Any, batch: Any) -> Any:
        found = terms(outputs, batch)
        # Each rank asks for step's loads and then, in two or three portions, for its losses.
        bad = own_rank() == 1 and loop.learner.updater.optimizer.state and next(calls) == 1
        return replace(found, losses=found.losses * math.nan) if bad else found

    loop.algorithm.terms = poisoned
    try:
        run_loop(loop, resume=False, command="")
    except NonFiniteError as error:
        print(f"failed together: {error}\n", end="")


Accelerator(cpu=True)
for kind in ("tied", "untied", "lora"):
    compare(kind, "full")
compare("tied", "none")
run("whole", "steps=4")
run("cut", "steps=2")
from_main(lambda: shutil.copytree("cut", "moved"))
run("cut", "steps=4", resume=True)
run("idle", "algorithm={type: grpo, beta: 0.0}", "rewards=[choosy:choosy]", "prompts_per_step=2", "steps=4")
fail("failing")
print("all done\n", end="")
