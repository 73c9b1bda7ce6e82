"""The command line: what it prints, its exit codes, and errors as one paragraph without a traceback."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import PeftModel
from support.run_folders import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from dar.cli.app import main
from dar.config.model import ModelSourceSpec
from dar.config.recipe import RECIPES, build_spec, read_yaml
from dar.config.reward_model import RewardModelSpec
from dar.policies.text.loading import load_model
from dar.record.folder import RunFolder
from dar.shown import visible

Write = Callable[..., Path]


@dataclass(frozen=True)
class Outcome:
    code: int | str | None
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs `dar` in this process, as its entry point would."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # the command sets them; set here, they are put back
    monkeypatch.setenv("COLUMNS", "200")
    disable_progress_bar()  # what the command does by these variables, before anything is imported

    def dar(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dar", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        found = capsys.readouterr()
        return Outcome(caught.value.code, found.out, found.err)

    yield dar
    enable_progress_bar()


Run = Callable[..., Outcome]


def dar_process(*arguments: str | Path, after: str = "pass") -> subprocess.CompletedProcess[str]:
    """Runs `dar` in a process of its own, and a line of Python afterwards."""
    code = f"import sys\nfrom dar.cli import main\ntry:\n    main()\nfinally:\n    {after}\n"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_without_importing_torch():
    found = dar_process("--help", after="print('heavy:', {'torch', 'transformers', 'datasets'} & set(sys.modules))")
    assert found.returncode == 0
    for command in ("train", "plan", "sample"):
        assert f" {command} " in found.stdout
    assert "heavy: set()" in found.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["recipe", "--resume", "--allow-changed-recipe", "--quiet"]),
        ("plan", ["recipe", "without loading any weights"]),
        (
            "sample",
            ["model", "prompt", "--num", "--max-tokens", "--temperature", "--seed", "--plain"],
        ),
        (
            "sample",
            ["--min-tokens", "--greedy", "--top-k", "--top-p", "--stop"],
        ),
    ],
)
def test_help_of_a_command_names_its_options(run: Run, command: str, words: list[str]):
    found = run(command, "--help")
    assert found.code == 0
    assert all(word in found.out for word in words)


@pytest.mark.parametrize("command", ["", "compare", "sample", "report", "eval", "eval win-rate", "eval mt-bench"])
def test_help_fits_80_columns_and_cuts_no_word_off(run: Run, monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.setenv("COLUMNS", "80")
    found = run(*command.split(), "--help")
    assert max(map(len, found.out.splitlines())) <= 80
    assert not re.search(r"\w(…|\.\.\.)$", found.out, flags=re.MULTILINE)
    assert "\\[" not in found.out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tarin x.yaml", "No such command 'tarin'. Did you mean 'train'?\nSee dar --help"),
        ("train x.yaml --resum", "there is no option --resum (did you mean '--resume'?)\nSee dar train --help"),
        ("train", "Missing argument 'recipe'. (A recipe: "),
        ("sample m p --nmu", "there is no option --nmu (did you mean '--num'?)\n"),
        ("sample m p --steps", "there is no option --steps"),
        ("train x.yaml --steps 3", "there is no option --steps: keys of the recipe are written steps=3\n"),
        ("plan x.yaml --output-dir=y", "no option --output-dir: keys of the recipe are written output_dir=y\n"),
        ("reward-model x.yaml --optim.beta1", "keys of the recipe are written optim.beta1=…\n"),
        ("train recipe steps 3", "override 'steps' is not of the form key.path=value, such as steps=3\n"),
        ("train recipe.yaml", "there is no recipe recipe.yaml here (did you mean 'recipe.yml'?). Name a YAML file"),
        ("train recips/a.yaml", "there is no recipe recips/a.yaml here. Name a YAML file"),
        ("train .", ". is a folder. Name a YAML file, or a recipe that dar brings along: "),
        ("train runs/a", "runs/a is a run folder, and its recipe is runs/a/config.yaml; the run goes on with "),
        ("plan rewards.yaml", "rewards.yaml is a recipe of another kind: it is for dar reward-model\n"),
        ("reward-model recipe.yml", "recipe.yml is a recipe of another kind: it is for dar train\n"),
        ("sample bsae p", "model path bsae does not exist (did you mean 'base'?). On the Hub it would be "),
        ("sample ./runs/b p", "the model path ./runs/b does not exist"),
        ("sample org/name p", "org/name does not exist: there is no org, and the Hub, where it may be"),
        ("sample runs/a p", "runs/a is the folder of a run that has no model yet (its checkpoints are none): finish"),
        ("train toy data=promts", "dataset path promts does not exist (did you mean 'prompts'?)"),
        ("train toy data=./promts", "file promts does not exist (did you mean 'prompts'?)"),
    ],
)  # fmt: skip
def test_line_that_cannot_be_meant_says_what_to_write(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "prompts", "recipes", "runs/a"):
        (tmp_path / name).mkdir(parents=True)
    keys = "model: m\ndata: d.jsonl\nsteps: 1\noutput_dir: run\n"
    for name in ("recipe.yml", "recipe", "runs/a/config.yaml"):
        (tmp_path / name).write_text(keys + "rewards: [sentiment]\n")
    (tmp_path / "rewards.yaml").write_text(keys + "pairs_per_step: 4\n")
    toy = keys.replace("model: m", "model: toy:letters\nsampling: {max_completion_length: 8}\nrewards: [sentiment]")
    (tmp_path / "toy").write_text(toy)
    found = run(*line.split())
    assert (found.code, found.out) == (2, "")
    assert said in found.err


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def misspelt(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A real process with a recipe that has a misspelt key; it ends by saying which heavy packages it imported."""
    recipe = tmp_path_factory.mktemp("misspelt") / "recipe.yaml"
    recipe.write_text("model: m\ndata: d.jsonl\nrewards: [sentiment]\nsteps: 1\noutput_dir: run\nnum_generation: 4\n")
    return dar_process("train", recipe, after="print({'torch', 'transformers', 'datasets'} & set(sys.modules))")


def test_error_is_one_paragraph_and_exit_code_2(misspelt: subprocess.CompletedProcess[str]):
    assert misspelt.returncode == 2
    paragraph = misspelt.stderr.strip()
    assert paragraph.startswith("dar: ")
    assert "recipe.yaml cannot be run as written:" in paragraph
    assert "unknown key 'num_generation' (did you mean 'num_generations'?)" in paragraph
    assert "\n\n" not in paragraph
    assert "Traceback" not in paragraph


def test_misspelt_key_is_found_without_waiting_for_torch(misspelt: subprocess.CompletedProcess[str]):
    assert misspelt.stdout.strip() == "set()"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_malformed_override_is_refused(run: Run, write_recipe: Write, command: str):
    found = run(command, write_recipe(), "algorithm..alpha=1")
    assert (found.code, found.out) == (2, "")
    assert found.err == "dar: override 'algorithm..alpha=1' is not of the form key.path=value, such as steps=3\n"


def test_missing_recipe_is_refused(run: Run, tmp_path: Path):
    found = run("train", tmp_path / "absent.yaml")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"dar: there is no recipe {tmp_path / 'absent.yaml'} here. Name a YAML file, or ")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=/no/such/model", "dar: the model path /no/such/model does not exist: there is no /no\n"),
        ("data=/no/such.jsonl", "dar (DataError): the data file /no/such.jsonl does not exist: there is no /no\n"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_cannot_be_had_is_said_in_one_line(
    run: Run, write_recipe: Write, command: str, override: str, expected: str
):
    found = run(command, write_recipe(), override)
    assert (found.code, found.err) == (2, expected)


def test_failing_reward_is_said_with_its_completion(run: Run, write_recipe: Write, tmp_path: Path, in_folder: None):
    (tmp_path / "scores_nan.py").write_text("def score(completions):\n    return [float('nan')] * len(completions)\n")
    found = run("train", write_recipe(rewards=["scores_nan:score"]))
    assert found.code == 2
    assert found.err.startswith(
        "dar (RewardError): reward 'score' returned nan for row 0 at step 1; every value must be"
    )
    assert "Traceback" not in found.out + found.err


def test_text_in_square_brackets_is_printed_as_it_is(run: Run, tmp_path: Path):
    found = run("train", tmp_path / "[red]absent.yaml")
    assert "[red]absent.yaml" in found.err


CRASHES = "def score(completions):\n    return [1 / 0 for _ in completions]\n"


def test_error_of_ones_own_code_has_its_line(run: Run, write_recipe: Write, tmp_path: Path, in_folder: None):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "crashes.py").write_text(CRASHES)
    found = run("train", write_recipe(rewards=["own/crashes.py:score"]))
    said = "reward 'score' raised ZeroDivisionError at step 1: division by zero (own/crashes.py, line 2, in "
    assert (found.code, found.err.startswith(f"dar (RewardError): {said}")) == (2, True)
    assert found.err.endswith(")\n--debug shows the traceback.\n")
    # What failed before its first step is in nobody's way.
    assert "own/crashes.py" in (tmp_path / "run" / "config.yaml").read_text()
    found = run("train", write_recipe(), "steps=1", "--resume")
    assert (found.code, found.err) == (0, "")
    assert "run holds no step to continue from: starting" in found.out
    assert "own/crashes.py" not in (tmp_path / "run" / "config.yaml").read_text()


def test_error_of_ones_own_method_has_its_line(run: Run, write_recipe: Write, tmp_path: Path, in_folder: None):
    (tmp_path / "method.py").write_text(
        "from dar import Algorithm\n"
        "class Mine(Algorithm):\n"
        "    def __init__(self, spec):\n        pass\n"
        "    def weigh(self, batch):\n        return batch.nothing\n"
        "    def terms(self, outputs, batch):\n        pass\n"
    )
    found = run("train", write_recipe(algorithm={"type": "./method.py:Mine"}))
    said = "AttributeError: 'Batch' object has no attribute 'nothing' (method.py, line 6, in weigh)"
    assert (found.code, found.err) == (2, f"dar: {said}\n--debug shows the traceback.\n")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(run: Run, write_recipe: Write, place: int):
    line = ["plan", write_recipe(steps=0)]
    found = run(*line[:place], "--debug", *line[place:])
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith("Traceback (most recent call last):\n")
    assert "dar.errors.ConfigError: " in found.err
    assert "steps: Input should be greater than or equal to 1" in found.err


def test_debug_of_one_call_does_not_last(run: Run, write_recipe: Write):
    recipe = write_recipe(steps=0)
    assert run("--debug", "plan", recipe).code == 1
    assert run("plan", recipe).code == 2


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_what_a_step_will_do_and_writes_nothing(run: Run, write_recipe: Write, tmp_path: Path):
    found = run("plan", write_recipe(), "algorithm.alpha=0.25", "num_generations=6")
    assert found.code == 0
    assert "alpha 0.25" in found.out
    assert "2 prompts × 6 completions = 12 rows" in found.out
    assert "forward pass of the reference" in found.out
    assert "memory (estimate)" in found.out
    assert not (tmp_path / "run").exists()


def test_plan_as_json(run: Run, write_recipe: Write):
    found = run("plan", write_recipe(), "num_generations=6", "--json")
    assert found.code == 0
    plan = json.loads(found.out)
    assert (plan["rows_per_step"], plan["num_train_prompts"]) == (12, 5)
    assert "forward pass of the reference" in plan["passes"]


def test_plan_tries_the_step_that_training_begins_with_and_leaves_nothing(
    run: Run, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, logging={"trackers": ["tensorboard"]})
    trial = json.loads(run("plan", recipe, "--try", "--json", "evaluation.every=1").out)["trial"]
    assert (list((tmp_path / "temporary").iterdir()), (tmp_path / "run").exists()) == ([], False)
    assert run("train", recipe, "-q").code == 0
    first = next(row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if "loss" in row)
    assert {key: trial["step"][key] for key in ("reward", "loss", "grad_norm")}.items() <= first.items()
    assert re.fullmatch(r"<\|user\|>say \w+<eos><\|assistant\|>", trial["prompt"])
    assert all(row["reward"] == -abs(row["length"] - 4) / 4 for row in trial["completions"])
    assert len(trial["completions"]) == trial["num_evaluations"] == 4  # before, and after each of three steps
    assert trial["run_seconds"] == 3 * trial["step"]["step_time"] + 4 * trial["evaluation_seconds"]
    checkpoints = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints").rglob("*.*"))
    model = (tmp_path / "run/model/model.safetensors").stat().st_size
    assert trial["disk_gb"] * 1e9 == pytest.approx(1.5 * checkpoints + model, rel=0.15)  # three where two are kept
    shown = run("plan", recipe, "--try").out
    assert "The first prompt, as the model reads it:\n<|user|>say " in shown
    assert re.search(r"the run: about \d+ s \(3 steps and 2 evaluations of \d+ s\), ", shown)


def test_plan_counts_dropped_prompts(run: Run, write_recipe: Write):
    found = run("plan", write_recipe(), "data.max_prompt_length=9", "data.long_prompts=drop")
    assert "2 to train on, 3 dropped, 0 held out" in found.out


def test_plan_of_a_cluster_and_of_hardware_that_need_not_exist(run: Run, write_recipe: Write, tmp_path: Path):
    hardware = tmp_path / "hardware.yaml"
    hardware.write_text("{devices: 2, memory_gb: 8, bf16_tflops: 1, memory_gb_per_s: 1, link_gb_per_s: 1, "
                        "network_gb_per_s: 1}")  # fmt: skip
    line = ["plan", write_recipe(), "--cluster", "ray://nowhere:1", "--cluster-spec", hardware]
    found = run(*line, "cluster.samplers=2")
    assert found.code == 0
    assert "2 × sampler: about 1 prompts a step, engine in_process" in found.out
    assert re.search(r"a step: [\d.]+ s, [\d,]+ tokens/s; bottleneck \w+, \d+% of the seconds, by ", found.out)
    plan = json.loads(run(*line, "--json").out)
    assert len(plan["cluster"]) == 3
    assert plan["on_paper"]["phases"].keys() == {"rollout", "weights", "reference", "update", "optimizer"}
    for change, message in (("devices: 2", "devices_per_sampler makes no whole samplers"),
                            ("memory_gb: 8", "cannot be trained on 2 of these devices")):  # fmt: skip
        text = {"devices: 2": "devices: 3, devices_per_sampler: 2", "memory_gb: 8": "memory_gb: 1.0e-4"}[change]
        (tmp_path / "other.yaml").write_text(hardware.read_text().replace(change, text))
        refused = run("plan", write_recipe(), "--cluster-spec", tmp_path / "other.yaml")
        assert (refused.code, message in refused.err) == (2, True)


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in the temporary folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    # A package half imported is looked for in the interpreter's own table, so all of ours come first.
    importlib.import_module("dar.assembly.loop")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_train_makes_a_run_folder_and_says_where_the_model_is(run: Run, write_recipe: Write, tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(
        data={"train": prompts, "heldout": {"path": prompts, "max_rows": 2}}, logging={"completions_every": 1}
    )
    found = run("train", recipe, "steps=2")
    assert (found.code, found.err) == (0, "")
    assert re.search(r"\nstep +reward .*\n 1/2 +[+-]\d\.\d{3} ", found.out)
    assert "held-out" in found.out  # the table of before and after
    assert f"the trained model is in {tmp_path / 'run' / 'model'}" in found.out
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "completions",
        "checkpoints",
        "model",
    }
    assert steps_of(tmp_path / "run") == [0, 1, 2, 2]  # held out, two steps, held out
    assert f"dar train {recipe} steps=2" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_what_training_says_to_do_next_can_be_done(run: Run, tmp_path: Path):
    found = run("train", "toy", "steps=1", f"output_dir={tmp_path / 'run'}")
    commands = [shlex.split(line)[1:] for line in re.findall(r"dar (?:report|sample) .*", found.out)]
    assert [command[0] for command in commands] == ["report", "sample"]
    assert [run(*command).code for command in commands] == [0, 0]


def test_quiet_training_prints_nothing(write_recipe: Write, tmp_path: Path):
    found = dar_process("train", write_recipe(), "steps=1", "--quiet")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_train_does_not_overwrite_a_run(run: Run, write_recipe: Write, tmp_path: Path):
    assert run("train", write_recipe(), "steps=1", "-q").code == 0
    found = run("train", write_recipe(), "steps=1", "-q")
    assert found.code == 2
    assert found.err.startswith(
        f"dar (CheckpointError): {tmp_path / 'run'} already holds a run: continue it with --resume"
    )
    # What fails its checks leaves the old run as it is.
    assert run("train", write_recipe(), "model=/no/such", "--overwrite").code == 2
    assert steps_of(tmp_path / "run") == [1]
    assert run("train", write_recipe(), "steps=2", "-q", "--overwrite").code == 0
    assert steps_of(tmp_path / "run") == [1, 2]


def test_resume_needs_a_run(run: Run, write_recipe: Write, tmp_path: Path):
    found = run("train", write_recipe(), "--resume")
    assert found.code == 2
    assert found.err.startswith(f"dar (CheckpointError): there is no run to resume: {tmp_path / 'run'} does not exist")


def test_finished_run_may_be_extended_when_the_change_is_allowed(run: Run, write_recipe: Write, tmp_path: Path):
    recipe = write_recipe()
    assert run("train", recipe, "steps=1", "-q").code == 0
    refused = run("train", recipe, "steps=2", "-q", "--resume")
    assert refused.code == 2
    assert "  steps: 1 → 2\n" in refused.err
    assert steps_of(tmp_path / "run") == [1]
    assert run("train", recipe, "steps=2", "-q", "--resume", "--allow-changed-recipe").code == 0
    assert steps_of(tmp_path / "run") == [1, 2]
    assert run("train", recipe, "steps=2", "-q", "--resume").code == 0  # the run is now that of the new recipe


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(
    run: Run, write_recipe: Write, tmp_path: Path, in_folder: None
):
    (tmp_path / "scores_stop.py").write_text(
        "import os, signal\n\n"
        "calls = []\n\n"
        "def score(completion_ids):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    recipe = write_recipe(rewards=["scores_stop:score"], checkpoint={"every": 0})
    before = signal.getsignal(signal.SIGINT)
    found = run("train", recipe)
    assert found.code == 130
    assert "SIGINT: finishing this step, then saving (again to stop at once)" in found.out
    assert "stopped after step 2 of 3; continue with --resume" in found.out
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert not (tmp_path / "run" / "model").exists()
    found = run("train", recipe, "--resume")
    assert found.code == 0
    assert "continuing after step 2" in found.out
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_interrupt_outside_a_step_ends_with_its_own_exit_code(
    run: Run, write_recipe: Write, tmp_path: Path, in_folder: None
):
    (tmp_path / "scores_interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    found = run("plan", write_recipe(rewards=["scores_interrupted:score"]))
    assert (found.code, found.err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [("raise KeyboardInterrupt", "KeyboardInterrupt: no message"), ("import sys\nsys.exit(7)", "SystemExit: 7")],
)
def test_a_module_that_exits_or_interrupts_is_an_error_like_any_other(
    run: Run, write_recipe: Write, tmp_path: Path, in_folder: None, source: str, said: str
):
    (tmp_path / "scores_leaving.py").write_text(source)
    found = run("plan", write_recipe(rewards=["scores_leaving:score"]))
    sys.modules.pop("scores_leaving", None)
    assert found.code == 2
    assert f"the module scores_leaving cannot be imported: {said}" in " ".join(found.err.split())


# --- sample ----------------------------------------------------------------------------------------------------------


def test_same_seed_samples_the_same_completions(run: Run, tiny_folder: Path):
    arguments = ("sample", tiny_folder, "say a", "--num", "2", "--max-tokens", "6")
    first = run(*arguments, "--seed", "3")
    assert first.code == 0
    assert first.out.count("── ") == 2
    assert "── 2 (" in first.out
    assert run(*arguments, "--seed", "3").out == first.out
    assert run(*arguments, "--seed", "4").out != first.out


def test_prompt_is_a_user_message_unless_plain(run: Run, tiny_folder: Path):
    arguments = ("sample", tiny_folder, "say a", "--max-tokens", "6")
    chat, plain = run(*arguments), run(*arguments, "--plain")
    assert chat.code == plain.code == 0
    assert chat.out != plain.out
    assert run("sample", tiny_folder, "<|user|>say a<eos><|assistant|>", "--max-tokens", "6", "--plain").out == chat.out


def test_samples_as_json(run: Run, tiny_folder: Path):
    arguments = ("sample", tiny_folder, "say a", "--max-tokens", "6")
    shown, found = run(*arguments), json.loads(run(*arguments, "--json").out)
    assert found["prompt"] == [{"role": "user", "content": "say a"}]
    assert len(found["completions"]) == 3
    for number, row in enumerate(found["completions"], start=1):
        # A tab is shown as the columns it moves on.
        text = visible(row["completion"]).expandtabs()
        assert f"── {number} ({row['finish_reason']}) ──\n{text}\n" in shown.out


def test_prompt_is_read_from_standard_input(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    expected = run("sample", tiny_folder, "say a", "--max-tokens", "6").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("say a"))
    assert run("sample", tiny_folder, "-", "--max-tokens", "6").out == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature", "0"], "dar: --temperature is 0, and must be above 0"),
        (["--max-tokens", "256"], "dar: --max-tokens is 256, but "),
        (["--top-p", "1.5"], "dar: dar sample: top_p: Input should be less than or equal to 1 (found 1.5)"),
        (
            ["--greedy", "--top-k", "5"],
            "dar: dar sample: greedy takes the likeliest token every time: top_k",
        ),
        (["--stop", ""], "dar: dar sample: stop: a stop string is empty"),
        (["--min-tokens", "9", "--max-tokens", "8"], "dar: --min-tokens is 9, but --max-tokens is 8"),
    ],
)
def test_impossible_sampling_is_refused(run: Run, tiny_folder: Path, arguments: list[str], expected: str):
    found = run("sample", tiny_folder, "say a", *arguments)
    assert (found.code, found.out) == (2, "")
    assert expected in found.err


def test_model_that_does_not_exist_cannot_be_sampled(run: Run, tmp_path: Path):
    found = run("sample", tmp_path / "absent", "say a")
    assert (found.code, found.err) == (2, f"dar: the model path {tmp_path / 'absent'} does not exist\n")


def test_model_without_a_chat_template_asks_for_plain(run: Run, tiny_folder: Path):
    os.remove(tiny_folder / "chat_template.jinja")
    make_tokenizer(chat=False).save_pretrained(tiny_folder)
    found = run("sample", tiny_folder, "say a")
    assert found.code == 2
    assert "--plain" in found.err


def completions_of(found: Outcome) -> list[tuple[str, str]]:
    """(finish reason, text) of every completion `dar sample` printed."""
    parts = re.split(r"^── \d+ \((\w+)\) ──\n", found.out, flags=re.MULTILINE)[1:]
    return [(reason, text.removesuffix("\n")) for reason, text in zip(parts[::2], parts[1::2])]


def test_greedy_prints_one_completion_whatever_the_seed(run: Run, tiny_folder: Path):
    arguments = ("sample", tiny_folder, "say a", "--max-tokens", "6", "--greedy")
    first = run(*arguments)
    assert first.code == 0
    assert len(completions_of(first)) == 1
    assert run(*arguments, "--seed", "9").out == first.out
    # Asked for more, it prints them, all the same; and the likeliest token alone is what a top-k of 1 leaves.
    assert completions_of(run(*arguments, "-n", "2")) == completions_of(first) * 2
    top_1 = run("sample", tiny_folder, "say a", "--max-tokens", "6", "--top-k", "1", "-n", "1")
    assert top_1.out == first.out
    tiny_p = run("sample", tiny_folder, "say a", "--max-tokens", "6", "--top-p", "1e-9", "-n", "1")
    assert tiny_p.out == first.out


def test_stop_strings_cut_the_text(run: Run, tiny_folder: Path):
    arguments = ("sample", tiny_folder, "say a", "-n", "6", "--max-tokens", "20")
    plain = completions_of(run(*arguments))
    text = next(text for _, text in plain if re.search(r"[a-zA-Z].*[a-zA-Z]", text))
    letters = re.findall(r"[a-zA-Z]", text)
    stopped = completions_of(run(*arguments, "--stop", letters[1], "--stop", letters[0]))
    cut = [re.split(f"[{letters[0]}{letters[1]}]", text)[0] for _, text in plain]
    assert [text for _, text in stopped] == cut
    assert [reason == "stop" for reason, _ in stopped] == [short != text for short, (_, text) in zip(cut, plain)]
    assert {reason for reason, _ in stopped} > {"stop"}


def test_minimum_length_is_kept(run: Run, tiny_folder: Path):
    arguments = ("sample", tiny_folder, "say a", "-n", "40", "--max-tokens", "12")
    assert "eos" in {reason for reason, _ in completions_of(run(*arguments))}
    assert {reason for reason, _ in completions_of(run(*arguments, "--min-tokens", "12"))} == {"length"}


def test_speed_stands_apart_from_the_completions(run: Run, tiny_folder: Path):
    found = run("sample", tiny_folder, "say a", "-n", "4", "--max-tokens", "5", "--min-tokens", "5")
    assert re.fullmatch(r"20 tokens in \d+\.\d\d s: \d+ tokens per second\n", found.err)
    assert "per second" not in found.out


# --- init ---


def test_project_of_init_trains_as_it_is(run: Run, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    first = run("init", "mine", "--model", "tiny-model")
    assert first.out == (
        "mine has recipe.yaml, prompts.jsonl, heldout.jsonl, my_rewards.py. Next: cd mine && dar train recipe.yaml\n"
    )
    again = run("init", "mine")
    assert (again.code, "mine holds recipe.yaml, prompts.jsonl, heldout.jsonl" in again.err) == (2, True)
    monkeypatch.chdir("mine")
    done = run("train", "recipe.yaml", "steps=1", "sampling.max_completion_length=8")
    assert done.code == 0, done.err
    assert (tmp_path / "mine/runs/first/model/model.safetensors").is_file()


# --- ls ---


def test_runs_are_listed_newest_first_with_their_state(run: Run, tmp_path: Path):
    def aged(folder: Path, seconds: float, *, parts: Sequence[str] = ()) -> None:
        for name in parts:
            (folder / name).mkdir(parents=True)
        for file in folder.glob("*.*"):
            os.utime(file, (time.time() - seconds, time.time() - seconds))

    write_run(tmp_path / "now", steps=3, evaluations=(), algorithm="grpo", num_generations=2)
    aged(write_run(tmp_path / "compare/dar-seed0", evaluations=(0, 6)), 400, parts=["model"])
    aged(write_run(tmp_path / "a/stopped", steps=4), 500, parts=["model", "checkpoints/step-4"])  # it is to go further
    aged(write_run(tmp_path / "failed", steps=0, evaluations=()), 600)
    pairs = RunFolder(tmp_path / "pairs")
    recipe = {"model": "some/base", "data": "pairs.jsonl", "epochs": 1.0, "output_dir": "pairs"}
    pairs.start(build_spec(recipe, where="recipe", kind=RewardModelSpec), {})
    pairs.append_metrics({"step": 0, "eval/accuracy": 0.5})
    aged(pairs.path, 700, parts=["model"])
    (write_run(tmp_path / "damaged") / "metrics.jsonl").write_text("{\n")
    aged(tmp_path / "damaged", 800)
    write_run(tmp_path / ".hidden")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").touch()

    found = json.loads(run("ls", tmp_path, "--json").out)
    assert found[-1].pop("state").startswith("damaged: ")
    assert [(Path(row["folder"]).name, row["method"], row["done"], row["steps"], row["metric"]) for row in found] == [
        ("now", "grpo", 3, 6, "reward"),
        ("dar-seed0", "dar", 6, 6, "eval/reward"),
        ("stopped", "dar", 4, 6, "eval/reward"),
        ("failed", "dar", 0, 6, None),
        ("pairs", "reward-model", 0, None, "eval/accuracy"),
        ("damaged", "?", 0, None, None),
    ]
    assert [row["state"] for row in found[:-1]] == ["running", "finished", "stopped", "failed", "finished"]
    rewards = [row["eval/reward"] for row in RunFolder(found[1]["folder"]).metrics() if "eval/reward" in row]
    assert (found[1]["first"], found[1]["last"]) == (rewards[0], rewards[-1])
    shown = run("ls", tmp_path).out.splitlines()
    assert len(shown) == 7
    assert re.search(rf"dar +model +6/6 +finished +eval/reward \{rewards[0]:+.3f} → \{rewards[-1]:+.3f}$", shown[2])


def test_no_run_and_no_folder_are_said(run: Run, tmp_path: Path):
    assert run("ls", tmp_path).err == f"no run in {tmp_path} or below; dar train RECIPE makes one\n"
    found = run("ls", tmp_path / "absent")
    assert (found.code, found.err) == (2, f"dar: there is no folder {tmp_path / 'absent'}\n")


# --- what the shell and editors know of recipes ---


def test_shell_completes_keys_methods_and_rewards_without_torch():
    def completed(line: str, *, after: str = "pass") -> list[str]:
        words = line.split(" ")
        code = f"import sys\nsys.argv = ['dar']\nfrom dar.cli import main\ntry:\n    main()\nfinally:\n    {after}\n"
        bash = {"_DAR_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        found = subprocess.run([sys.executable, "-c", code], env={**os.environ, **bash}, capture_output=True, text=True)
        return found.stdout.split()

    heavy = "print({'torch', 'transformers'} & set(sys.modules) or 'light')"
    assert completed("dar train toy algo", after=heavy) == ["algorithm.", "light"]
    assert completed("dar plan toy algorithm.type=gr") == ["algorithm.type=grpo", "algorithm.type=grpo_guard"]
    assert completed("dar train toy rewards.0.type = sen") == ["sentiment"]  # bash has broken the word
    assert completed("dar reward-model tldr loss.la") == ["loss.label_smoothing="]
    assert completed("dar control x rank.en") == ["rank.energy="]
    assert completed("dar train quick") == ["quickstart"]


def test_schema_of_an_editor_takes_what_can_be_run_and_little_else(run: Run):
    run_schema, pair_schema = json.loads(run("schema").out), json.loads(run("schema", "--reward-model").out)
    control_schema = json.loads(run("schema", "--control").out)
    own = RECIPES.parent / "cli/project/recipe.yaml"
    for file in [*RECIPES.glob("*.yaml"), own]:
        kinds = {"model": pair_schema, "control": control_schema}
        jsonschema.validate(read_yaml(file), kinds.get(file.stem.rpartition("_")[2], run_schema))
    toy = read_yaml(RECIPES / "toy.yaml")
    for changes in (
        {"algorithm": "own.method:Mine"},
        {"algorithm": {"type": "own.method:Mine", "anything": 1}},
        {"algorithm": {"alpha": 0.5}},
        {"engine": "in_process"},
        {"rewards": ["sentiment", "my_rewards.py:on_topic", {"function": "a:b"}]},
        {"alerts": ["repetition"], "checkpoint": {"best": "eval/reward"}, "optim": {"learning_rate": 1}},
    ):
        jsonschema.validate(toy | changes, run_schema)
    for changes in (
        {"algorithm": "gpro"},
        {"algorithm": {"type": "dar", "alhpa": 0.5}},
        {"rewards": ["sentimnt"]},
        {"stepz": 3},
        {"optim": {"learning_rate": -1}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(toy | changes, run_schema)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_run(run: Run, write_recipe: Write, tmp_path: Path) -> Path:
    """The `model` folder of a short LoRA run, which learnt a lot."""
    recipe = write_recipe(
        model={"path": str(tmp_path / "tiny-model"), "lora": {"rank": 2}},
        optim={"type": "adamw", "learning_rate": 0.1},
        runtime={"device": "cpu", "precision": "fp32", "max_logprob_gap": 100.0},
    )
    assert run("train", recipe, "steps=1", "-q").code == 0
    folder = tmp_path / "run" / "model"
    assert (folder / "adapter_config.json").is_file()
    assert not (folder / "config.json").exists()
    return folder


def test_model_of_a_lora_run_can_be_sampled_and_planned_with(
    run: Run, adapter_run: Path, tiny_folder: Path, write_recipe: Write, tmp_path: Path
):
    arguments = ("say a", "--max-tokens", "6")
    found = run("sample", adapter_run, *arguments)
    assert found.code == 0
    # The adapter is really in: it is what peft gives when it merges the two, and not the base.
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    merged: Any = PeftModel.from_pretrained(base, str(adapter_run))
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    assert run("sample", tmp_path / "merged", *arguments).out == found.out
    assert run("sample", tiny_folder, *arguments).out != found.out
    planned = run("plan", write_recipe(model=str(adapter_run)))
    assert planned.code == 0
    assert f"{make_model().num_parameters():,} parameters" in planned.out


def test_exported_adapter_is_the_trained_policy_to_transformers_and_peft(
    run: Run, adapter_run: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = load_model(ModelSourceSpec(path=str(adapter_run)))(ids).logits
    assert run("export", tmp_path / "run", tmp_path / "adapter").out.startswith(
        f"{tmp_path / 'adapter'} has an adapter of "
    )
    assert run("export", tmp_path / "run", tmp_path / "whole", "--merge", "--dtype", "bf16").code == 0
    assert run("export", adapter_run, tmp_path / "fp32", "--merge").code == 0
    monkeypatch.chdir("/")
    base = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    whole = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("fp32", "whole")]
    with torch.no_grad():
        assert torch.allclose(adapter(ids).logits, expected, atol=1e-4)
        assert torch.equal(whole[0](ids).logits, expected)
    rounded = whole[1].state_dict()
    assert all(torch.equal(each.bfloat16(), rounded[name]) for name, each in whole[0].state_dict().items())
    assert {each.dtype for each in rounded.values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
    assert (tmp_path / "whole/README.md").read_text() == (adapter_run / "README.md").read_text()
    assert len({file.stat().st_mode for name in ("whole", "adapter") for file in (tmp_path / name).iterdir()}) == 1


def test_export_overwrites_nothing_and_says_what_holds_no_model(run: Run, tiny_folder: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    for source, out, said in (
        (tiny_folder, tmp_path / "run", "run is there already, and nothing is overwritten: name a new folder"),
        (tmp_path / "run", tmp_path / "out", "run is the folder of a run that has no model yet"),
        (tmp_path / "absent", tmp_path / "out", "absent does not exist"),
        (tmp_path, tmp_path / "out", f"{tmp_path} holds no model: name the folder of a run"),
    ):
        found = run("export", source, out)
        assert (found.code, said in found.err) == (2, True), found.err
    found = run("export", tiny_folder, tmp_path / "out", "--push", "me/mine")
    assert (found.code, "nothing was uploaded to me/mine (" in found.err) == (2, True)
    assert found.err.endswith(f"{tmp_path / 'out'} is written: later, hf upload me/mine {tmp_path / 'out'}\n")


def test_adapter_whose_base_is_gone_says_how_to_merge(
    run: Run, adapter_run: Path, tiny_folder: Path, write_recipe: Write
):
    tiny_folder.rename(tiny_folder.with_name("moved"))
    for found in (run("sample", adapter_run, "say a"), run("plan", write_recipe(model=str(adapter_run)))):
        assert found.code == 2
        assert found.err.startswith(
            f"dar: {adapter_run} holds only an adapter, and its base cannot be used: the model path {tiny_folder} does "
            "not exist. Put the base back, or correct base_model_name_or_path"
        )
        assert f"dar export {adapter_run} OUT --merge" in found.err


def test_train_with_json_prints_its_result_and_nothing_else(run: Run, write_recipe: Write, tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    found = run("train", write_recipe(data={"train": prompts, "heldout": prompts}, steps=1), "--json")
    assert found.code == 0, found.err
    record = json.loads(found.out)
    assert (record["steps_done"], record["is_finished"]) == (1, True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record["heldout"]["reward"]["after"] == rows[-1]["eval/reward"]
    assert "held-out after step 1" in found.err
