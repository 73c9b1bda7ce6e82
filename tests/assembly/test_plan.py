"""The plan counts what a run will do, before any weight is loaded, and refuses what the run would refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from support.compilers import no_compiler

from dar.assembly.plan import Plan, make_plan
from dar.config.hardware import HardwareSpec
from dar.config.recipe import load_recipe
from dar.errors import ConfigError, DataError

Write = Callable[..., Path]


def plan(write_recipe: Write, **changes: Any) -> Plan:
    return make_plan(load_recipe(write_recipe(**changes)))


def test_plan_needs_no_weights_and_writes_nothing(write_recipe: Write, tiny_folder: Path, tmp_path: Path):
    recipe = write_recipe()
    (tiny_folder / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert make_plan(load_recipe(recipe)).num_parameters == sum(p.numel() for p in make_model().parameters())
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_counts_rows_and_tokens(write_recipe: Write):
    found = plan(write_recipe)
    # "<|user|>say WORD<eos><|assistant|>": 3 special tokens and 4 + |WORD| bytes, for WORD = a, bee, sea, dee, eh
    lengths = [3 + 4 + len(word) for word in ("a", "bee", "sea", "dee", "eh")]
    assert found.num_train_prompts == 5
    assert (found.mean_prompt_length, found.longest_prompt) == (sum(lengths) / 5, 10)
    assert found.rows_per_step == 2 * 4
    assert found.max_completion_tokens_per_step == 8 * 8
    assert found.epochs == 3 * 2 / 5
    assert (found.device, found.compute_dtype) == ("cpu", "float32")


def test_plan_counts_dropped_and_held_out_prompts(write_recipe: Write, tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    data = {
        "train": prompts,
        "heldout": {"path": prompts, "max_rows": 2},
        "max_prompt_length": 9,
        "long_prompts": "drop",
    }
    found = plan(write_recipe, data=data)
    assert (found.num_train_prompts, found.num_dropped) == (2, 3)
    assert found.num_heldout_prompts == 1  # of "a" and "bee"
    assert found.longest_prompt == 9


@pytest.mark.parametrize(
    ("algorithm", "reference_pass", "updates"),
    [
        ("dar", True, 1),
        ({"type": "dar", "alpha": 0.0}, False, 1),
        ({"type": "grpo", "beta": 0.0, "updates": 3}, False, 3),
        ({"type": "rloo", "beta": 0.1}, True, 1),
    ],
)
def test_plan_lists_the_passes(write_recipe: Write, algorithm: Any, reference_pass: bool, updates: int):
    found = plan(write_recipe, algorithm=algorithm)
    reference = ["forward pass of the reference"] if reference_pass else []
    assert found.passes == (
        "sample 8 completions",
        "score them",
        *reference,
        f"{updates} × forward and backward pass of the policy",
    )


def test_reference_takes_memory_only_where_it_is_read(write_recipe: Write, tmp_path: Path):
    held = plan(write_recipe)
    free = plan(write_recipe, algorithm={"type": "dar", "alpha": 0.0})
    bytes_of_weights = held.num_parameters * 4 / 1e9
    assert free.memory_gb["weights"] == pytest.approx(bytes_of_weights)
    assert held.memory_gb["weights"] == pytest.approx(2 * bytes_of_weights)
    assert "reference" in held.memory_gb
    assert "reference" not in free.memory_gb


def test_moments_are_those_of_what_is_trained(write_recipe: Write, tiny_folder: Path):
    full, small = plan(write_recipe), plan(write_recipe, optim="adafactor")
    moments = full.num_parameters * 8 / 1e9
    assert full.memory_gb["rollout"] - small.memory_gb["rollout"] == pytest.approx(moments)
    lora, small = (plan(write_recipe, model={"path": str(tiny_folder), "lora": {"rank": 2}}, optim=optim)
                   for optim in ("adamw", "adafactor"))  # fmt: skip
    # Seven linear maps in each of two layers: q and o 32→32, k and v 32→16, gate and up 32→48, down 48→32.
    adapter = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert lora.memory_gb["weights"] == pytest.approx((lora.num_parameters + adapter) * 4 / 1e9)
    assert lora.memory_gb["rollout"] - small.memory_gb["rollout"] == pytest.approx(adapter * 8 / 1e9)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/no/such/model"}, ConfigError, "the model path /no/such/model does not exist"),
        ({"data": "/no/such/rows.jsonl"}, DataError, "the data file /no/such/rows.jsonl does not exist"),
        ({"rewards": ["no_such_module:score"]}, ConfigError, "the module no_such_module cannot be imported"),
        ({"sampling": {"max_completion_length": 250}}, DataError, "5 of 5 prompts are longer than 6 tokens"),
        ({"runtime": {"device": "gpu"}}, ConfigError, "'gpu' is not a device"),
        (
            {"algorithm": "awr", "reference_sync": {"every": 1}},
            ConfigError,
            "reference_sync moves π₀, but awr as it is set does not read it",
        ),
        (
            {
                "algorithm": "awr",
                "alerts": [{"type": "kl", "max": 1.0, "window": 1, "samples": "train", "action": "log"}],
            },
            ConfigError,
            "the kl alert watches the training steps, but awr as it is set does not read π₀",
        ),
    ],
)
def test_plan_refuses_what_the_run_would(
    write_recipe: Write, changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        plan(write_recipe, **changes)


def test_plan_tries_the_compiler_a_run_would_need(write_recipe: Write):
    with no_compiler(), pytest.raises(ConfigError, match=r"torch\.compile does not work here"):
        plan(write_recipe, runtime={"device": "cpu", "compile_layers": True})


def test_plan_refuses_a_tokenizer_of_another_model(write_recipe: Write, tiny_folder: Path):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"token id \d+, but the model knows 100 tokens"):
        plan(write_recipe)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_plan_for_a_gpu_that_is_not_there_is_refused(write_recipe: Write):
    with pytest.raises(ConfigError, match=r"runtime\.device is cuda, but torch .* sees 0 CUDA devices"):
        plan(write_recipe, runtime={"device": "cuda"})


def test_plan_of_an_offline_method_counts_the_datas_completions(write_recipe: Write, tmp_path: Path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    found = plan(write_recipe, data=str(rows), algorithm="dpo", rewards=[])
    # Two prompts a step with a pair each, whatever num_generations says.
    assert found.rows_per_step == 2 * 2
    assert found.passes == (
        "read 4 completions",
        "forward pass of the reference",
        "1 × forward and backward pass of the policy",
    )


def test_plan_counts_what_a_method_adds(write_recipe: Write):
    plain = plan(write_recipe, algorithm={"type": "ppo", "critic": "head"})
    with_model = plan(write_recipe, algorithm={"type": "ppo", "critic": "model"})
    assert "forward pass of the critic" in plain.passes
    # A critic of its own is weights and two moments more, and gradients beside them.
    weights, sampling = (with_model.memory_gb[phase] - plain.memory_gb[phase] for phase in ("weights", "rollout"))
    assert weights == pytest.approx(plain.num_parameters * 4 / 1e9)
    assert sampling == pytest.approx(plain.num_parameters * 12 / 1e9)
    assert "1 × forward pass of the policy to set its bounds" in plan(write_recipe, algorithm="bapo").passes
    replayed = plan(write_recipe, algorithm={"type": "r2vpo", "replay": 2})
    assert "2 × forward and backward pass on earlier batches" in replayed.passes


def test_plan_of_a_cluster_says_who_takes_part_and_what_moves(write_recipe: Write):
    cluster = {"address": "ray://nowhere:1", "learners": 2, "samplers": 3, "reward_workers": 4}
    found = plan(write_recipe, cluster=cluster, prompts_per_step=6, runtime={"device": "cpu", "sharding": "full"})
    learner, sampler, worker = found.cluster
    assert learner.startswith("2 × learner: at most 3 prompts")
    assert re.fullmatch(r"3 × sampler: about 2 prompts a step, engine in_process, [\d.]+ GB", sampler)
    assert worker == "4 × reward worker: length"
    weights, tokens = 4 * found.num_parameters / 1e6, 6 * 4 * 8
    assert found.moved_mb["weights, into the object store and to each sampler"] == weights
    assert found.moved_mb["rewards, back"] == 6 * 4 * 8 / 1e6
    assert found.moved_mb["completions, from all samplers"] == 17 * tokens / 1e6
    # Sharded: weights gathered twice (those of no layer once), gradients added up, half of each by each of two.
    assert 2 * weights / 2 < found.moved_mb["weights and gradients, by each learner"] < 3 * weights / 2


def test_plan_on_paper_takes_the_model_of_the_file(write_recipe: Write, tmp_path: Path):
    make_model(num_hidden_layers=7).config.save_pretrained(tmp_path / "other")
    hardware = HardwareSpec(devices=2, memory_gb=1, bf16_tflops=1, memory_gb_per_s=1, link_gb_per_s=1,
                            network_gb_per_s=1, model=str(tmp_path / "other" / "config.json"))  # fmt: skip
    spec = load_recipe(write_recipe(algorithm={"type": "grpo", "beta": 0.1, "updates": 3}))
    found = make_plan(spec, hardware)
    paper = found.on_paper
    assert paper is not None
    assert paper.num_parameters == sum(p.numel() for p in make_model(num_hidden_layers=7).parameters())
    assert found.num_parameters < paper.num_parameters
    assert (paper.learners, paper.samplers, paper.rows_at_once) == (2, 2, 4)
    assert paper.sampled_per_second == pytest.approx(2 * 4 * 8 / paper.seconds)
    # Three updates read and write 28 bytes of each weight and its moments, at 0.6 GB/s.
    assert paper.phases["optimizer"].seconds == pytest.approx(3 * 28 * paper.num_parameters / 0.6e9)
