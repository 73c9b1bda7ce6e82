"""Whole runs on a tiny model: learning, determinism, resuming after a kill, ranks."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from support.compilers import needs_compiler, no_compiler
from support.ranks import on_ranks
from support.rows import write_rows

from dar.assembly.loop import build_loop
from dar.config.recipe import load_recipe
from dar.errors import CheckpointError, ConfigError, DarError, DataError, NonFiniteError, RewardError
from dar.trainer import run_loop

UNREPEATABLE = ("time/", "step_time", "memory/", "eval/time")
LOGPROBS = ["logprobs", "ref_logprobs", "kl_ref"]
"""Columns that differ by rounding."""
WriteRecipe = Callable[..., Path]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings and memory, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)} for row in rows]


def train(recipe: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    spec = load_recipe(recipe, overrides)
    run_loop(build_loop(spec, resume=resume, quiet=True), resume=resume, command="test")
    return metrics_of(Path(spec.output_dir))


def final_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("algorithm", ["dar", "rloo", "grpo"])
def test_reward_rises(write_recipe: WriteRecipe, algorithm: str) -> None:
    recipe = write_recipe(algorithm=algorithm, steps=40, rewards=[{"type": "length", "target": 3}], num_generations=8)
    rows = train(recipe, "optim.learning_rate=3e-3", "checkpoint.every=0")
    early = sum(row["reward"] for row in rows[:5]) / 5
    late = sum(row["reward"] for row in rows[-5:]) / 5
    assert late > early + 0.5


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    first = train(recipe, f"output_dir={tmp_path / 'a'}")
    second = train(recipe, f"output_dir={tmp_path / 'b'}")
    assert first == second
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert train(recipe, f"output_dir={tmp_path / 'c'}", "seed=1") != first


def test_every_promised_metric_is_there(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(data={"train": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")})
    spec = load_recipe(recipe)
    run_loop(build_loop(spec, quiet=True), resume=False, command="test")
    rows = [json.loads(line) for line in (Path(spec.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    kl = [f"kl/{name}{suffix}" for name in ("ref", "old") for suffix in
          ("", "_k3", "_per_token", "_k3_per_token")]  # fmt: skip
    weights = ("clip_fraction", "zero_fraction", "ess_fraction", "mean", "log_w_reg_mean", "neg_log_mean_w_reg")
    promised = {
        *("reward", "reward_std", "rewards/length/mean", "rewards/length/std", "frac_reward_zero_std", "entropy", "kl"),
        *("completions/mean_length", "completions/clipped_ratio", "loss", "grad_norm", "learning_rate", "num_tokens"),
        *("step_time", "time/rollout", "time/reward", "time/reference", "time/update", "memory/peak_gb", "epoch"),
        *("tokens/prompt", "tokens/completion", "rollout/logprob_gap", "rows/skipped_fraction"),
        *kl,
        *(f"weights/{name}" for name in weights),
    }
    assert promised <= rows[1].keys()
    assert {"eval/reward", "eval/kl/ref", "eval/completions/distinct_2", "eval/entropy"} <= rows[0].keys()
    # Before the first step the policy is its own reference, to the last bit.
    assert rows[0]["eval/kl/ref"] == 0.0
    assert rows[0]["eval/kl/ref_k3"] == 0.0


def test_microbatches_change_nothing_but_rounding(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    whole = train(recipe, f"output_dir={tmp_path / 'a'}", "runtime.max_tokens_per_microbatch=100000")
    parts = train(recipe, f"output_dir={tmp_path / 'b'}", "runtime.max_tokens_per_microbatch=1")
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@needs_compiler
def test_a_compiled_update_changes_nothing_but_rounding(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(steps=2)
    plain = train(recipe, f"output_dir={tmp_path / 'plain'}")
    compiled = train(recipe, f"output_dir={tmp_path / 'compiled'}", "runtime.compile_layers=true")
    assert plain != compiled, "nothing was compiled"
    for one, other in zip(plain, compiled, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_run_without_the_compiler_it_needs_ends_before_it_begins(write_recipe: WriteRecipe) -> None:
    spec = load_recipe(write_recipe(), ["runtime.compile_layers=true"])
    with no_compiler(), pytest.raises(ConfigError, match=r"torch\.compile does not work here"):
        build_loop(spec, quiet=True)
    assert not Path(spec.output_dir).exists()


def test_rows_of_weight_zero_are_left_out_exactly(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Without a KL term, a tied group's rows have a loss of 0 whatever the policy does."""
    algorithm = {"type": "grpo", "beta": 0.0}
    recipe = write_recipe(algorithm=algorithm, rewards=[{"type": "regex", "pattern": "^[!-~]"}], num_generations=2)
    rows = train(recipe, "runtime.negligible_share=0.0", "prompts_per_step=5", "steps=4")
    for row in rows:
        assert row["rows/skipped_fraction"] == pytest.approx(row["frac_reward_zero_std"])
    assert any(0 < row["rows/skipped_fraction"] < 1 for row in rows)


def test_several_updates_move_away_from_the_behaviour_policy(write_recipe: WriteRecipe) -> None:
    algorithm = {"type": "grpo", "updates": 3, "beta": 0.0}
    recipe = write_recipe(algorithm=algorithm, rewards=[{"type": "regex", "pattern": "^[!-~]"}], num_generations=8)
    rows = train(recipe, "optim.learning_rate=1e-2")
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows)


def kill_when(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("moment", ["between saves", "during a save"])
def test_killed_run_resumes_to_the_same_bytes(write_recipe: WriteRecipe, tmp_path: Path, moment: str) -> None:
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    from conftest import make_model, make_tokenizer  # noqa: PLC0415 - a larger model, so that a save takes a while

    make_model(**size).save_pretrained(tmp_path / "larger")
    make_tokenizer().save_pretrained(tmp_path / "larger")
    recipe = write_recipe(model=str(tmp_path / "larger"), steps=8, checkpoint={"every": 2, "keep": 2})
    uninterrupted = train(recipe, f"output_dir={tmp_path / 'whole'}")
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dar", "train", str(recipe), f"output_dir={run}", "--quiet"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    checkpoints = run / "checkpoints"

    def between_saves() -> bool:
        file = run / "metrics.jsonl"
        return (checkpoints / "step-2").exists() and file.exists() and file.read_text().count("\n") >= 3

    def during_a_save() -> bool:
        return (checkpoints / "step-2").exists() and any(checkpoints.glob(".writing-step-*"))

    kill_when(between_saves if moment == "between saves" else during_a_save, process)
    assert not (run / "model").exists()
    resumed = train(recipe, f"output_dir={run}", resume=True)
    assert resumed == uninterrupted
    assert_same_weights(run, tmp_path / "whole")


def shrinking(folder: Path) -> dict[str, Any]:
    """A model with adapters whose ranks are cut after steps 2 and 4."""
    return {"path": str(folder), "lora": {"rank": {"start": 6, "energy": 0.9, "every": 2}}}


def test_a_run_resumes_to_the_same_bytes_before_at_and_after_a_cut_of_its_ranks(
    write_recipe: WriteRecipe, tmp_path: Path, tiny_folder: Path
) -> None:
    optim = {"learning_rate": 6e-3, "warmup_steps": 6}
    recipe = write_recipe(
        model=shrinking(tiny_folder), optim=optim, steps=5, checkpoint={"every": 1, "keep": 5}, algorithm="ppo"
    )
    rows, run = train(recipe), tmp_path / "run"
    assert [row["lora/cut"] > 0 for row in rows] == [False, True, False, True, False]
    # Four updates a step; after a cut the warm-up begins again.
    assert [row["learning_rate"] for row in rows] == pytest.approx([4e-3, 6e-3, 4e-3, 6e-3, 4e-3])
    weights = (run / "model" / "adapter_model.safetensors").read_bytes()
    for step in 1, 2, 3:
        shutil.rmtree(run / "model")
        for later in range(step + 1, 6):
            shutil.rmtree(run / "checkpoints" / f"step-{later}")
        assert train(recipe, resume=True) == rows
        assert (run / "model" / "adapter_model.safetensors").read_bytes() == weights


def test_ranks_cut_adapters_as_one_process_does(write_recipe: WriteRecipe, tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(model=shrinking(tiny_folder), steps=4, checkpoint={"every": 0})
    alone = train(recipe)
    ranks = train_on_ranks(recipe, tmp_path / "two")
    assert ranks.returncode == 0, ranks.stdout.decode()
    for one, other in zip(alone, metrics_of(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert alone[1]["lora/cut"] > 0


def test_ctrl_c_finishes_the_step_saves_and_can_be_continued(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(steps=400, checkpoint={"every": 0})
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "dar", "train", str(recipe)],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"continue with --resume" in output
    done = len(metrics_of(run))
    assert (run / "checkpoints" / f"step-{done}").is_dir()
    spec = load_recipe(recipe, [f"steps={done + 2}"])
    loop = build_loop(spec, resume=True, allow_changed_recipe=True, quiet=True)
    assert run_loop(loop, resume=True, command="test").steps == done + 2
    assert len(metrics_of(run)) == done + 2


def train_on_ranks(
    recipe: Path, folder: Path, *overrides: str, num_ranks: int = 2
) -> subprocess.CompletedProcess[bytes]:
    arguments = ("-m", "dar", "train", str(recipe), f"output_dir={folder}", *overrides, "--quiet")
    return on_ranks(*arguments, cwd=recipe.parent, num_ranks=num_ranks)


def test_ranks_do_what_one_process_does(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # About a third of the completions have no score: which, only they decide.
    (tmp_path / "choosy_reward.py").write_text(
        "import zlib\n"
        "from dar.rewards import Failed\n"
        "async def choosy(completions):\n"
        "    marks = [zlib.crc32(str(text).encode()) for text in completions]\n"
        "    return [float(mark % 5) if mark % 3 else Failed('unlucky') for mark in marks]\n"
    )
    monkeypatch.chdir(tmp_path)
    choosy = {"type": "function", "function": "choosy_reward:choosy", "on_failure": "drop", "max_failed_share": 0.99}
    prompts, rewards = str(tmp_path / "prompts.jsonl"), [{"type": "length", "target": 4}, choosy]
    recipe = write_recipe(
        data={"train": prompts, "heldout": prompts},
        evaluation={"rewards": [{"type": "length", "target": 2}]},
        checkpoint={"best": "eval/gold"},
        # Of five prompts two ranks have three and two.
        prompts_per_step=5,
        steps=3,
        rewards=rewards,
        logging={"completions_every": 3},
        runtime={"device": "cpu", "precision": "fp32", "max_tokens_per_microbatch": 1},
    )
    alone = train(recipe, f"output_dir={tmp_path / '1'}")
    assert any(0 < row["rewards/choosy/failed_fraction"] < 1 for row in alone if "loss" in row)
    exact = ("reward", "/std", "length", "tokens", "gold", "distinct", "clipped", "zero_std")
    for num_ranks, sharding in (2, "none"), (2, "full"), (4, "full"):
        run = f"{num_ranks}-{sharding}"
        ranks = train_on_ranks(recipe, tmp_path / run, f"runtime.sharding={sharding}", num_ranks=num_ranks)
        assert ranks.returncode == 0, ranks.stdout.decode()
        together = metrics_of(tmp_path / run)
        assert [row.keys() for row in together] == [row.keys() for row in alone]
        for one, other in zip(alone, together, strict=True):
            for key, value in one.items():
                is_exact = any(part in key for part in exact) and not key.endswith("failed_fraction")
                assert other[key] == (value if is_exact else pytest.approx(value, rel=1e-3, abs=1e-5)), key
        best = [json.loads((tmp_path / folder / "best" / "best.json").read_text()) for folder in ("1", run)]
        assert best[0] == best[1]
        for table in "heldout-step-0", "step-3":
            files = [tmp_path / folder / "completions" / f"{table}.parquet" for folder in ("1", run)]
            one, other = (pd.read_parquet(file).drop(columns=LOGPROBS) for file in files)
            pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-5)
        weights = final_weights(tmp_path / run)
        for name, tensor in final_weights(tmp_path / "1").items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_sharded_ranks_compute_stop_go_on_idle_and_fail_as_one(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The completions of every other prompt are tied, which without a KL term leaves a rank nothing to train on.
    (tmp_path / "choosy.py").write_text(
        "def choosy(prompts, completions):\n"
        "    tied = ['bee' in str(prompt) or 'sea' in str(prompt) for prompt in prompts]\n"
        "    return [0.0 if each else float(len(str(text))) for each, text in zip(tied, completions)]\n"
    )
    runtime = {"device": "cpu", "precision": "fp32", "max_tokens_per_microbatch": 1, "negligible_share": 0.0}
    recipe = write_recipe(prompts_per_step=5, runtime=runtime, checkpoint={"every": 2})
    script = Path(__file__).parents[1] / "support" / "sharded.py"
    monkeypatch.setenv("PYTHONPATH", f"{script.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    ranks = on_ranks(str(script), str(recipe), cwd=tmp_path)
    said = ranks.stdout.decode()
    assert ranks.returncode == 0, said
    assert said.count("all done") == said.count("failed together: the loss is not finite at step 2") == 2
    assert [path.name for path in (tmp_path / "failing" / "checkpoints").iterdir()] == ["step-1"]
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    assert 0.5 in [row["rows/skipped_fraction"] for row in metrics_of(tmp_path / "idle")]
    # One process goes on with what two have saved, from the very weights that were gathered then.
    spec = load_recipe(recipe, ["steps=4", f"output_dir={tmp_path / 'moved'}"])
    loop = build_loop(spec, resume=True, allow_changed_recipe=True, quiet=True)
    assert loop._restored() == 2
    saved = load_file(tmp_path / "moved" / "model" / "model.safetensors")
    own = loop.trainable()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items() if name in own)
    assert run_loop(loop, resume=True, command="test").steps == 4
    for one, other in zip(metrics_of(tmp_path / "moved"), metrics_of(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 0])
def test_ddp_has_let_go_of_the_process_group_before_it_is_destroyed(
    write_recipe: WriteRecipe, tmp_path: Path, steps: int
) -> None:
    # Its reducer frees the group with the interpreter's lock held, and now and then the ranks never ended.
    recipe = write_recipe(steps=1, rewards=["fails:fails" if steps == 0 else {"type": "length", "target": 4}])
    (tmp_path / "fails.py").write_text("def fails(completions):\n    return [float('nan')] * len(completions)\n")
    (tmp_path / "ranks.py").write_text(
        "import sys, weakref\n"
        "import torch.distributed\n"
        "from dar.assembly.loop import build_loop\n"
        "from dar.errors import DarError\n"
        "from dar.config.recipe import load_recipe\n"
        "from dar.trainer import run_loop\n"
        "loop = build_loop(load_recipe(sys.argv[1]), quiet=True)\n"
        "wrapper = weakref.ref(loop.learner.policy.trained)\n"
        "print(f'{type(wrapper()).__name__}\\n', end='')\n"
        "destroy = torch.distributed.destroy_process_group\n"
        "def destroy_and_tell():\n"
        "    print(f'at the end: {wrapper()}\\n', end='')\n"
        "    destroy()\n"
        "torch.distributed.destroy_process_group = destroy_and_tell\n"
        "try:\n"
        "    print(f'done: {run_loop(loop, resume=False, command=str()).steps}\\n', end='')\n"
        "except DarError:\n"
        "    print('done: 0\\n', end='')\n"
    )
    ranks = on_ranks("ranks.py", str(recipe), cwd=tmp_path)
    said = ranks.stdout.decode()
    assert ranks.returncode == 0, said
    assert said.count("DistributedDataParallel") == said.count("at the end: None") == said.count(f"done: {steps}") == 2


def test_ranks_train_a_second_time(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With fewer held-out rows than ranks; the second time, an offline method's."""
    pairs = [{"prompt": f"say {word}: ", "chosen": word, "rejected": f"no {word}"} for word in ("a", "bee", "sea")]
    file = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    data = {"train": file, "heldout": file}
    recipe = write_recipe(steps=1, data=data, evaluation={"max_prompts": 1})
    dpo = ["algorithm=dpo", "rewards=[]"]
    (tmp_path / "twice.py").write_text(
        "import sys\n"
        "from dar import DARConfig, Trainer\n"
        "from dar.config.recipe import load_recipe\n"
        "class OfRecipe(Trainer):\n"
        "    def __init__(self, spec):\n"
        "        args = DARConfig(output_dir='unused', max_steps=1)\n"
        "        super().__init__(spec.model.path, 'sentiment', args, spec.data.train.path)\n"
        "        self.spec = spec\n"
        "for run, changes in ('dar', []), ('dpo', sys.argv[2:]):\n"
        "    trainer = OfRecipe(load_recipe(sys.argv[1], [*changes, f'output_dir={run}']))\n"
        "    print(f'done: {trainer.train().steps} {trainer.loop.accelerator.num_processes}\\n', end='')\n"
        "    assert trainer.evaluate().items() <= trainer.loop.folder.metrics()[-1].items(), trainer.evaluate()\n"
        "    trainer.save_model('saved')\n"
    )
    ranks = on_ranks("twice.py", str(recipe), *dpo, cwd=tmp_path)
    said = ranks.stdout.decode()
    assert ranks.returncode == 0, said
    assert said.count("done: 1 2") == 4
    assert "Traceback" not in said
    for run, changes in ("dar", []), ("dpo", dpo):
        for one, other in zip(train(recipe, *changes), metrics_of(tmp_path / run), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        shutil.rmtree(tmp_path / "run")


LONELY = (
    "import os, signal, time\n"
    "calls = []\n"
    "def second(completions, then):\n"
    "    calls.append(1)\n"
    "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
    "        return then(completions)\n"
    "    return [float(len(str(text))) for text in completions]\n"
    "def fails(completions):\n"
    "    return second(completions, lambda given: [None] * len(given))\n"
    "def hangs(completions):\n"
    "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
    "    return second(completions, lambda given: time.sleep(600))\n"
    "def dies(completions):\n"
    "    return second(completions, lambda given: os.kill(os.getpid(), signal.SIGKILL))\n"
)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("fails", "dar (RewardError): no reward applies to row 0 at step 2"),
        ("hangs", "dar (RankError): another rank did not answer for 20 s (runtime.rank_timeout)"),
        ("dies", "dar (RankError): another rank has ended"),
    ],
)
def test_what_stops_one_rank_ends_all_of_them_with_one_message_and_a_checkpoint(
    write_recipe: WriteRecipe, tmp_path: Path, reward: str, said: str
) -> None:
    (tmp_path / "lonely.py").write_text(LONELY)
    runtime = {"device": "cpu", "precision": "fp32", "rank_timeout": 20}
    # Only what all ranks know of is a reason to save, which takes all of them.
    every = 0 if reward == "fails" else 1
    recipe = write_recipe(rewards=[f"lonely:{reward}"], checkpoint={"every": every}, runtime=runtime)
    two = train_on_ranks(recipe, tmp_path / "run")
    output = two.stdout.decode()
    assert two.returncode != 0
    # Of a rank that was killed the launcher tells, and may end the other before it has said a word.
    assert output.count("dar (") == output.count(said), output
    assert output.count(said) == 1 or (reward == "dies" and "exitcode  : -9" in output), output
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0], output  # the launcher's own
    assert len(metrics_of(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()


def test_only_one_rank_says_what_is_wrong_with_a_recipe(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    two = on_ranks("-m", "dar", "train", str(write_recipe(stepps=1)), cwd=tmp_path)
    assert two.stdout.count(b"unknown key 'stepps'") == 1, two.stdout.decode()


def test_changed_recipe_is_refused_with_its_differences(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    train(recipe)
    with pytest.raises(CheckpointError, match=r"algorithm\.alpha: 0\.1 → 0\.5"):
        train(recipe, "algorithm.alpha=0.5", resume=True)


def test_other_initial_model_is_refused(write_recipe: WriteRecipe, tiny_folder: Path) -> None:
    from conftest import make_model  # noqa: PLC0415

    recipe = write_recipe(steps=2)
    train(recipe)
    make_model(seed=7).save_pretrained(tiny_folder)
    with pytest.raises(CheckpointError, match="another initial model"):
        train(recipe, resume=True)


def test_failing_reward_stops_the_run_and_keeps_what_was_saved(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flaky_reward.py").write_text(
        "calls = []\n"
        "def fail_third(completions):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 3 else 1.0 * len(str(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_recipe(rewards=["flaky_reward:fail_third"], steps=5)
    with pytest.raises(RewardError, match=r"'fail_third' returned nan for row 0 at step 3.*completion was"):
        train(recipe)
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()
    assert len(metrics_of(tmp_path / "run")) == 2


def disturb(owner: Any, name: str, call: int, disturbed: Callable[[Any], Any]) -> None:
    """Replaces what one call of a method returns."""
    original, calls = getattr(owner, name), iter(range(1000))

    def method(*arguments: Any, **others: Any) -> Any:
        found = original(*arguments, **others)
        return disturbed(found) if next(calls) == call else found

    setattr(owner, name, method)


def unreadable(_: Any) -> Any:
    raise DataError("row 3 cannot be read")


def without_a_number(terms: Any) -> Any:
    return replace(terms, losses=terms.losses * math.nan)


@pytest.mark.parametrize(
    ("owner", "name", "call", "disturbed"),
    [
        ("algorithm", "weigh", 2, unreadable),
        # The first call is the self-test's.
        ("engine", "generate", 3, lambda rollouts: replace(rollouts, logprobs=rollouts.logprobs - 1.0)),
        # Each step asks once what its rows move, and once for the loss.
        ("algorithm", "terms", 5, without_a_number),
    ],
    ids=["data", "gap", "loss"],
)
def test_every_error_before_a_step_changes_anything_saves_the_step_before(
    write_recipe: WriteRecipe, tmp_path: Path, owner: str, name: str, call: int, disturbed: Callable[[Any], Any]
) -> None:
    recipe = write_recipe(steps=4, checkpoint={"every": 0})
    undisturbed = train(recipe, f"output_dir={tmp_path / 'undisturbed'}")
    loop = build_loop(load_recipe(recipe), quiet=True)
    disturb(getattr(loop, owner), name, call, disturbed)
    with pytest.raises(DarError):
        run_loop(loop, resume=False, command="test")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert train(recipe, resume=True) == undisturbed
    assert_same_weights(tmp_path / "run", tmp_path / "undisturbed")


def test_an_error_in_the_midst_of_a_step_saves_no_half_of_it(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    algorithm = {"type": "grpo", "updates": 2}
    loop = build_loop(load_recipe(write_recipe(algorithm=algorithm, checkpoint={"every": 0})), quiet=True)
    # The fourth loss is that of the second update of step 2.
    disturb(loop.algorithm, "terms", 3, without_a_number)
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 2"):
        run_loop(loop, resume=False, command="test")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_last_step_that_overflows_leaves_no_model_and_keeps_the_checkpoint_before(
    write_recipe: WriteRecipe, tmp_path: Path, tiny_folder: Path, lora: bool
) -> None:
    model: Any = {"path": str(tiny_folder), "lora": {"rank": 2}} if lora else str(tiny_folder)
    recipe = write_recipe(model=model, steps=1)
    train(recipe)
    shutil.rmtree(tmp_path / "run" / "model")
    spec = load_recipe(recipe, ["steps=2", "optim.learning_rate=3e38", "optim.weight_decay=3e38"])
    loop = build_loop(spec, resume=True, allow_changed_recipe=True, quiet=True)
    with pytest.raises(NonFiniteError, match="the update at step 2 overflowed"):
        run_loop(loop, resume=True, command="test")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_resumed_run_sweeps_what_a_kill_left_half_removed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(steps=1)
    train(recipe)
    rests = [tmp_path / "run" / name for name in (".removing-best", "checkpoints/.removing-step-0", ".writing-model")]
    for rest in rests:
        rest.mkdir()
    train(recipe, resume=True)
    assert not any(rest.exists() for rest in rests)


@pytest.mark.parametrize(
    ("call", "error"),
    [(5, "ConnectionError"), (4, "ConnectionError"), (5, "KeyboardInterrupt"), (4, "SystemExit")],
)
def test_a_run_continues_exactly_after_its_reward_failed(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: str
) -> None:
    # Calls: the evaluation before step 1, steps 1 and 2, the evaluation after 2, steps 3 and 4, the evaluation after 4.
    (tmp_path / "away.py").write_text(
        "fails_at, calls = None, 0\n"
        "def judge(completions):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == fails_at:\n"
        f"        raise {error}('away')\n"
        "    return [1.0 * len(str(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    away: Any = importlib.import_module("away")
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(
        rewards=["away:judge"],
        steps=4,
        data={"train": prompts, "heldout": prompts},
        evaluation={"every": 2},
        checkpoint={"every": 0},
    )
    undisturbed = train(recipe, f"output_dir={tmp_path / 'undisturbed'}")
    away.calls, away.fails_at = 0, call
    with pytest.raises(RewardError, match=rf"reward 'judge' raised {error} at .*: away"):
        train(recipe)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert train(recipe, resume=True) == undisturbed
    assert_same_weights(tmp_path / "run", tmp_path / "undisturbed")
    sys.modules.pop("away")


def test_dropped_completions_train_nothing(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flaky.py").write_text(
        "from dar.rewards import Failed\n"
        "def judge(completions):\n"
        "    return [Failed('no answer')] + [1.0 * len(str(c)) for c in completions[1:]]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = {"function": "flaky:judge", "on_failure": "drop", "max_failed_share": 0.5}
    recipe = write_recipe(rewards=[reward], logging={"completions_every": 1})
    rows = train(recipe)
    assert all(0 < row["rewards/judge/failed_fraction"] <= 0.5 for row in rows)
    table = pd.read_parquet(tmp_path / "run" / "completions" / "step-1.parquet")
    assert table["reward"].isna().tolist() == [True] + [False] * (len(table) - 1)
    assert table["weight"].tolist()[0] == 0


def test_non_finite_loss_raises_and_leaves_the_weights(write_recipe: WriteRecipe) -> None:
    loop = build_loop(load_recipe(write_recipe()), quiet=True)
    before = {name: p.detach().clone() for name, p in loop.learner.policy.trainable().items()}
    terms = loop.algorithm.terms

    def poisoned(logprobs: Any, batch: Any) -> Any:
        result = terms(logprobs, batch)
        result.losses[0] = float("nan")
        return result

    loop.algorithm.terms = poisoned  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(NonFiniteError, match=r"loss is not finite at step 1, in rows \[0\]"):
        loop.step(1)
    for name, parameter in loop.learner.policy.trainable().items():
        assert torch.equal(before[name], parameter), name
