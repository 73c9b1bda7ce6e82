"""DAR in TRL's loop is DAR: its loss, gradients and metrics are those of the library's own functions."""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("trl", reason="the extra dar-rlhf[trl] is not installed")

from conftest import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support import trl_runs
from support.ranks import on_ranks
from support.trl_runs import CASES, NUM_ROWS, ON_RANKS, PROMPTS, Step
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, HfArgumentParser, TrainerCallback
from trl.trainer import grpo_config

import dar.integrations.trl as face
from dar.algorithms.base import kl_metrics
from dar.assembly.loop import build_loop
from dar.config.recipe import RECIPES, load_recipe
from dar.config.regression import DARSpec, TargetKLSpec
from dar.errors import EXTRAS, ConfigError, NonFiniteError, RewardError
from dar.integrations import TESTED
from dar.integrations.trl import DARConfig, DARTrainer
from dar.policies.text.toy import toy_folder


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


def distance(found: Step, wanted: Step) -> float:
    """The larger of the relative errors of the loss and of the gradient."""
    gradient = (found.gradient - wanted.gradient).norm() / wanted.gradient.norm()
    return max(abs(found.loss - wanted.loss) / abs(wanted.loss), float(gradient))


def batch_logprobs(*models: Any) -> list[torch.Tensor]:
    """What the plain models say of each completion alone, [B, T] of each, and where a token is."""
    rows = [(PROMPTS[row // 4], trl_runs.completion_of(row), 1.0) for row in range(NUM_ROWS)]
    with torch.no_grad():
        found = [pad_sequence([trl_runs.row_logprobs(model, *row) for row in rows], True) for model in models]
    return [*found, found[0] != 0]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_librarys_functions(folder: Path, case: str):
    _, found = trl_runs.train(folder, **CASES[case])
    wanted = trl_runs.expected(folder, **CASES[case])
    if case == "two steps on one generation":
        # At a learning rate of 0 the two halves of the generation batch are of one policy, and their mean is the whole.
        found = [Step(sum(step.loss for step in found) / 2, (found[0].gradient + found[1].gradient) / 2)]
    assert max(distance(*pair) for pair in zip(found, wanted, strict=True)) < 1e-6


def test_two_processes_have_the_gradient_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    script = Path(trl_runs.__file__)
    trl_runs.policy(folder / "model")
    monkeypatch.setenv("PYTHONPATH", f"{script.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    ranks = on_ranks(str(script), str(folder), cwd=folder)
    assert ranks.returncode == 0, ranks.stdout.decode()
    for case in ON_RANKS:
        (found,) = (Step(**each) for each in torch.load(folder / f"{case}.pt"))
        assert distance(found, trl_runs.expected(folder, **CASES[case])[0]) < 1e-6, case


def test_metrics_have_our_names_and_values(folder: Path):
    trainer, _ = trl_runs.train(folder, has_gaps=True)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    names = {"weights/mean", "weights/clip_fraction", "weights/zero_fraction", "weights/ess_fraction"}
    assert names <= logged.keys()
    assert {"entropy", "completions/mean_length", "reward_std", "num_tokens"} <= logged.keys()
    assert not [name for name in logged if "clip_ratio" in name]
    policy, initial = trl_runs.policy(folder / "model"), trl_runs.initial(folder / "model")
    for name, value in kl_metrics(*batch_logprobs(policy, initial), name="ref").items():
        assert logged[name] == pytest.approx(value, rel=1e-3), name
    assert logged["kl"] == logged["kl/ref_k3_per_token"]
    # The table of completions has DAR's advantages, centred on the batch, and its weights, 0 where there is no reward.
    unrewarded = [trl_runs.reward_of(trl_runs.completion_of(row), has_gaps=True) is None for row in range(NUM_ROWS)]
    advantages, weights = torch.tensor(trainer._logs["advantages"]), torch.tensor(trainer._logs["extra"]["weight"])
    assert any(unrewarded)
    assert advantages.mean().abs() < 1e-6
    assert advantages.square().sum() / (NUM_ROWS - sum(unrewarded)) == pytest.approx(1.0)
    assert weights[torch.tensor(unrewarded)].eq(0).all()
    assert weights.sum() / (NUM_ROWS - sum(unrewarded)) == pytest.approx(logged["weights/mean"])


def test_lora_takes_the_policy_without_its_adapter_for_the_reference(folder: Path):
    adapters = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, model: torch.nn.Module, **others: Any) -> None:
            adapters.append(copy.deepcopy(get_peft_model_state_dict(model)))

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    trainer, _ = trl_runs.train(folder, Look(), peft_config=lora, max_steps=3, learning_rate=1.0)
    logged = [entry["kl/ref_k3"] for entry in trainer.state.log_history if "loss" in entry]
    base, policy = trl_runs.policy(folder / "model"), get_peft_model(trl_runs.policy(folder / "model"), lora).eval()
    for adapter, value in zip(adapters, logged, strict=True):
        set_peft_model_state_dict(policy, adapter)
        assert value == pytest.approx(kl_metrics(*batch_logprobs(policy, base), name="ref")["kl/ref_k3"], rel=1e-3)
    assert logged[0] == 0
    assert logged[2] > 1e-4


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count("a") - text.count("z")) for text in completions]


def sampling_trainer(folder: Path, output: str, **changes: Any) -> DARTrainer:
    """One that samples for itself."""
    model = folder / "sampling"
    if not model.exists():
        make_model().save_pretrained(model)
    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4,
             "max_completion_length": 8, "learning_rate": 1e-2}  # fmt: skip
    # As many prompts as an epoch has room for: TRL begins another one's order anew where a run is resumed.
    data = Dataset.from_list([{"prompt": f"say {number}"} for number in range(8)])
    args = trl_runs.settings(folder, **{**small, **changes})
    args.output_dir = str(folder / output)
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": make_tokenizer()}
    return DARTrainer(str(model), letters, args, **options)


def test_a_resumed_run_is_the_one_that_was_not_stopped(folder: Path):
    whole = sampling_trainer(folder, "whole", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = sampling_trainer(folder, "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    entries = [[{k: v for k, v in entry.items() if "time" not in k and "per_second" not in k and k != "train_loss"}
                for entry in trainer.state.log_history] for trainer in (whole, resumed)]  # fmt: skip
    assert entries[0] == entries[1]


def test_an_evaluation_is_measured_too(folder: Path):
    trainer = sampling_trainer(folder, "evaluated", per_device_eval_batch_size=4, dar_beta={"target_ess": 0.5})
    found = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_weights/beta", "eval_kl/ref", "eval_entropy"} <= found.keys()
    assert found["eval_kl/ref"] == pytest.approx(0.0, abs=1e-5)


def test_three_steps_with_a_tool(folder: Path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (Path(grpo_config.__file__).parents[1] / "chat_templates" / "qwen3.jinja").read_text()
    model = folder / "tools"
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048}
    make_model(**sizes).save_pretrained(model)
    asked = []

    def multiply(a: int, b: int) -> int:
        """Multiplies two numbers.

        Args:
            a: the first.
            b: the second.
        """
        asked.append((a, b))
        return a * b

    call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'

    def reward(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
        return [float(messages[-1]["content"] == "12") for messages in completions]

    small = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 512, "max_steps": 3}
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "3 * 4?"}]}])
    args = trl_runs.settings(folder, learning_rate=1e-2, **small)
    trainer = DARTrainer(str(model), reward, args, train_dataset=data, processing_class=tokenizer, tools=[multiply])

    def say(prompt_ids: list[list[int]], *_: Any, **others: Any) -> tuple[list[list[int]], None]:
        """Two of the policy's completions ask the tool, and what follows its answer is 12; the others say 7."""
        answered = "<tool_response>" in tokenizer.decode(prompt_ids[0])
        texts = ["12<|im_end|>" if answered else call if row % 2 else "7<|im_end|>" for row in range(len(prompt_ids))]
        return [tokenizer.encode(text) for text in texts], None

    trainer._generate_single_turn = say
    masks, before = [], copy.deepcopy(trainer.model.state_dict())
    plain = trainer._generate_and_score_completions

    def look(inputs: Any) -> dict[str, Any]:
        output = plain(inputs)
        masks.append((output["completion_ids"], output["completion_mask"] * (1 - output["tool_mask"])))
        return output

    trainer._generate_and_score_completions = look
    trainer.train()
    assert asked == [(3, 4)] * 6
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tools/call_frequency"] for entry in logged] == [0.5] * 3
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in logged)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    # What the tool said is not among what is learned.
    ids, said = masks[0]
    assert "12" in tokenizer.decode(ids[said.bool()])
    assert [bool(row.any()) for row in said] == [False, True, False, True]


def test_settings_are_those_of_the_spec(tmp_path: Path):
    assert trl_runs.settings(tmp_path).spec == DARSpec()
    args = trl_runs.settings(tmp_path, dar_beta=TargetKLSpec(target_kl=0.5), num_iterations=2, w_clip=math.inf)
    assert args.spec == DARSpec(beta=TargetKLSpec(target_kl=0.5), updates=2, w_clip=math.inf)
    assert args.to_dict()["dar_beta"] == {"target_kl": 0.5}
    line = (
        f"--output_dir {tmp_path} --use_cpu --bf16 no --alpha 0.5 --dar_beta 0.1 --w_clip inf --baseline leave_one_out"
    )
    (parsed,) = HfArgumentParser(cast(Any, DARConfig)).parse_args_into_dataclasses(line.split())
    assert parsed.spec == DARSpec(alpha=0.5, beta=0.1, w_clip=math.inf, baseline="leave_one_out")


def test_what_would_not_be_dar_is_refused_in_one_message(tmp_path: Path):
    with pytest.raises(ConfigError) as raised:
        trl_runs.settings(
            tmp_path, beta=0.04, loss_type="grpo", scale_rewards=False, epsilon_high=0.28, entropy_coef=0.1, top_p=0.9,
            disable_dropout=False, generation_kwargs={"top_k": 5}, alpha=2, dar_beta={"target_kl": -1},
            num_iterations=0, baseline="leave_one_out", num_generations_eval=1, normalize_weights="group",
            center_weights=True, mask_truncated_completions=True,
        )  # fmt: skip
    lines = str(raised.value).splitlines()[1:]
    assert [line.split("=")[0].split(":")[0].strip() for line in lines] == [
        "beta", "loss_type", "entropy_coef", "scale_rewards", "epsilon_high", "top_p", "normalize_weights",
        "disable_dropout", "generation_kwargs", "num_generations_eval", "mask_truncated_completions",
        "alpha", "dar_beta.target_kl", "num_iterations",
    ]  # fmt: skip
    assert "dar_beta" in lines[0]
    with pytest.raises(ConfigError, match="center_weights is for one update per batch, not 2"):
        trl_runs.settings(tmp_path, center_weights=True, num_iterations=2)
    with pytest.raises(ConfigError, match="must be a DARConfig, and a GRPOConfig was given"):
        DARTrainer(make_model(), letters, cast(Any, grpo_config.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)))


def test_rewards_that_are_none_or_infinite_and_a_loss_that_is_not_finite_stop_the_run(folder: Path):
    trainer = sampling_trainer(folder, "stopped", max_steps=2)
    for value, message in ((None, "no completion has a reward"), (math.inf, "infinite rewards from letters")):
        trainer.reward_funcs = [lambda completions, value=value, **columns: [value] * len(completions)]
        with pytest.raises(RewardError, match=f"step 1: {message}"):
            trainer.train()
    trainer.reward_funcs = [letters]
    trainer._get_per_token_logps_and_entropies = lambda *_, **others: tuple(
        each if each is None else each * torch.nan
        for each in DARTrainer._get_per_token_logps_and_entropies(trainer, *_, **others)
    )
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        trainer.train()


def test_another_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, versions in TESTED.items():
        assert f"{EXTRAS[package]}{versions}" in extras[EXTRAS[package]]
    monkeypatch.setattr("dar.integrations.version", lambda name: "1.17.0")
    with pytest.raises(
        ConfigError, match=r"tested with trl>=1.16,<1.17, and trl 1.17.0 .* pip install 'dar-rlhf\[trl\]'"
    ):
        importlib.reload(face)


def test_rewards_rise_alike_in_both_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "cache"))
    steps = 30
    changes = [f"steps={steps}", f"output_dir={tmp_path / 'run'}", "data.heldout=null", "logging.old_kl_prompts=0"]
    spec = load_recipe(RECIPES / "toy.yaml", changes)
    loop = build_loop(spec, quiet=True)
    loop.run(resume=False)
    ours = [row["reward"] for row in loop.folder.metrics()]
    tokenizer = AutoTokenizer.from_pretrained(toy_folder(), padding_side="left")

    def good_pairs(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(re.findall("(?=ab|bc|cd|da)", text))) for text in completions]

    args = trl_runs.settings(
        tmp_path, dar_beta=0.5, learning_rate=spec.optim.learning_rate, num_generations=4,
        per_device_train_batch_size=128, max_completion_length=24, max_steps=steps, lr_scheduler_type="constant",
        seed=spec.seed,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "abcd"[index % 4]} for index in range(32)])
    trainer = DARTrainer(str(toy_folder()), good_pairs, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    theirs = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(ours) == len(theirs) == steps
    # Measured: from 0.8 to 3.77 here and 3.86 there. Another seed of either moves the last five steps' mean by 5 %.
    start, (here, there) = sum(ours[:2] + theirs[:2]) / 4, (sum(rewards[-5:]) / 5 for rewards in (ours, theirs))
    assert min(here, there) > 3 * start
    assert here == pytest.approx(there, rel=0.2)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    script = str(Path(__file__).parents[2] / "examples" / "trl_dar.py")
    monkeypatch.setattr("sys.argv", [script, "--steps", "5", "--lora", "2", "--out", str(tmp_path / "out")])
    runpy.run_path(script, run_name="__main__")
    assert re.search(r"^step   5  reward \d\.\d\d  KL to π₀ \S+ nats$", capsys.readouterr().out, re.MULTILINE)
