"""Whole runs of TRACE on a tiny model: it realigns, is the same after a stop, and refuses what it cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from support.handmade import make_spec
from torch import Tensor

from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.assembly.plan import make_plan
from dar.config.recipe import load_recipe
from dar.data.logged import token_groups
from dar.errors import CheckpointError, ConfigError, DarError, DataError, RewardError
from dar.run.loop import Loop
from dar.run.stopping import Control
from dar.trainer import run_loop

# (prompt, chosen, rejected): the new rule is not to say "no" or "never".
PAIRS = [("a", "no", "yes"), ("bee", "no", "never"), ("sea", "yes", "no"), ("dee", "okay", "yes"), ("eh", "no", "well")]
FORBIDDEN = {"no", "never"}
ACTIONS = ["invert", "punish", "retain", "retain", "invert"]


def rows(*, verdicts: bool = False) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for prompt, chosen, rejected in PAIRS:
        row: dict[str, Any] = {"prompt": f"say {prompt}: ", "chosen": chosen, "rejected": rejected}
        if verdicts:
            row |= {"chosen_complies": chosen not in FORBIDDEN, "rejected_complies": rejected not in FORBIDDEN}
        found.append(row)
    return found


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a module of oracles; each call leaves a line in calls.txt."""
    (tmp_path / "new_rules.py").write_text(
        "def polite(completions, prompts):\n"
        "    with open('calls.txt', 'a') as stream:\n"
        "        stream.write(f'{len(completions)} {prompts[0]}\\n')\n"
        f"    return [completion not in {sorted(FORBIDDEN)} for completion in completions]\n"
        "def allows_all(completions):\n"
        "    return [True] * len(completions)\n"
        "def unsure(completions):\n"
        "    return [0.5] * len(completions)\n"
        "def fails(completions):\n"
        "    raise RuntimeError('no network')\n"
    )
    gold = [{"prompt": "say x: ", "chosen": "yes", "rejected": "no"}]
    (tmp_path / "gold.jsonl").write_text("\n".join(json.dumps(row) for row in gold) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def make_loop(
    folder: Path,
    *,
    resume: bool = False,
    allow: bool = False,
    data: list[dict[str, Any]] | None = None,
    callbacks: Any = (),
    **keys: Any,
) -> Loop:
    settings: dict[str, Any] = {
        "algorithm": {"type": "trace", "oracle": "new_rules:polite"},
        "rewards": [],
        "sampling": {"max_completion_length": 8},
        "optim": {"learning_rate": 1e-3},
        "prompts_per_step": 5,
        "steps": 20,
        "output_dir": str(folder),
        "checkpoint": {"every": 2},
        "logging": {"old_kl_prompts": 0, "completions_every": 0},
        "runtime": {"device": "cpu", "precision": "fp32"},
    }
    objects = Objects(model=make_model(), tokenizer=make_tokenizer(), train_rows=data or rows(), callbacks=callbacks)
    return build_loop(make_spec(**settings | keys), objects, resume=resume, allow_changed_recipe=allow, quiet=True)


def triage_of(folder: Path) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(folder / "triage.parquet").to_pydict()


# --- what it does ----------------------------------------------------------------------------------------------------


def sequence_logprobs(loop: Loop) -> Tensor:
    """[5, 2] under the policy, in the order of the data."""
    by_prompt = {prompt: index for index, (prompt, _, _) in enumerate(PAIRS)}
    groups = sorted(
        loop.collector.logged.groups,  # pyright: ignore[reportAttributeAccessIssue] - it reads logged data
        key=lambda group: by_prompt[str(group.prompt.content).removeprefix("say ").removesuffix(": ")],
    )
    return loop.learner.policy.logprobs(token_groups(groups), max_tokens=4096).sum(1).reshape(-1, 2)


def test_old_pairs_are_realigned(rules: Path):
    loop = make_loop(rules / "run", steps=40, algorithm={"type": "trace", "oracle": "new_rules:polite", "kl_coef": 1.0})
    before = sequence_logprobs(loop)
    metrics = [loop.step(step) for step in range(1, 41)]
    change = sequence_logprobs(loop) - before
    # Inverted: what was rejected gains on what was chosen. Punished: both fall.
    assert (change[[0, 4], 1] - change[[0, 4], 0] > 3).all()
    assert (change[1] < -3).all()
    assert metrics[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert metrics[0]["trace/retain_kl"] == 0.0
    assert metrics[-1]["rewards/margins"] > 1
    assert metrics[-1]["rewards/accuracies"] == 1.0
    assert metrics[-1]["trace/punish_log_ratio"] < -3
    assert [metrics[0][f"trace/{action}_fraction"] for action in ("invert", "punish", "retain")] == pytest.approx(
        [0.4, 0.2, 0.4]
    )


def test_retained_pairs_stay_near_the_reference_for_their_kl(rules: Path):
    drift = []
    for kl_coef in (1e-6, 3.0):
        algorithm = {"type": "trace", "oracle": "new_rules:polite", "kl_coef": kl_coef}
        loop = make_loop(rules / f"run-{kl_coef}", algorithm=algorithm)
        drift.append([loop.step(step) for step in range(1, 21)][-1]["trace/retain_kl"])
    assert drift[0] > 0.02
    assert drift[1] < drift[0] / 3


def test_only_conflicting_pairs_move_the_first_step(rules: Path):
    """At π_θ = π₀ the KL has no gradient at all: without it the step is the same but for rounding."""
    found = []
    for kl_coef in (0.0, 5.0):
        loop = make_loop(
            rules / f"run-{kl_coef}", algorithm={"type": "trace", "oracle": "new_rules:polite", "kl_coef": kl_coef}
        )
        loop.step(1)
        found.append(sequence_logprobs(loop))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


def test_columns_are_as_good_as_an_oracle(rules: Path):
    loops = make_loop(rules / "oracle"), make_loop(rules / "columns", data=rows(verdicts=True), algorithm="trace")
    for loop in loops:
        loop.start(False)
    by_oracle, by_columns = (loop.step(1) for loop in loops)
    assert by_oracle["loss"] == by_columns["loss"]
    assert triage_of(rules / "oracle") == triage_of(rules / "columns")


def test_oracle_is_asked_once_about_everything(rules: Path):
    loop = make_loop(rules / "run")
    loop.step(1)
    assert (rules / "calls.txt").read_text() == "10 say a: \n"


def test_triage_is_written_down(rules: Path):
    make_loop(rules / "run").start(False)
    assert triage_of(rules / "run") == {
        "row": [0, 1, 2, 3, 4],
        "action": ACTIONS,
        "chosen_complies": [False, False, True, True, False],
        "rejected_complies": [True, False, False, True, True],
        "agreement": [None] * 5,
        "weight": pytest.approx([1 / 3, 1 / 3, 0.0, 0.0, 1 / 3]),
    }


def test_gold_pairs_weigh_the_conflicting_ones(rules: Path):
    make_loop(rules / "run", algorithm={"type": "trace", "oracle": "new_rules:polite", "gold": "gold.jsonl"}).start(
        False
    )
    table = triage_of(rules / "run")
    assert [agreement is None for agreement in table["agreement"]] == [False, False, True, True, False]
    agreement = [each or 0.0 for each in table["agreement"]]
    positive = [max(each, 0.0) for each in agreement]
    # "yes" over "no" is what the gold pair says, too.
    assert positive[0] > 0
    assert table["weight"] == pytest.approx([each / sum(positive) for each in positive])
    assert sum(table["weight"]) == pytest.approx(1.0)


def test_gold_pairs_that_agree_with_nothing_leave_all_weights_equal(rules: Path, caplog: pytest.LogCaptureFixture):
    (rules / "gold.jsonl").write_text(json.dumps({"prompt": "say a: ", "chosen": "no", "rejected": "yes"}) + "\n")
    algorithm = {"type": "trace", "oracle": "new_rules:polite", "gold": "gold.jsonl"}
    make_loop(rules / "run", data=rows()[:1] + rows()[2:3], prompts_per_step=2, algorithm=algorithm).start(False)
    assert triage_of(rules / "run")["weight"] == [1.0, 0.0]
    assert "no conflicting pair's gradient agrees with that of the gold pairs" in caplog.text


def test_weight_and_verdicts_reach_the_completions(rules: Path):
    algorithm = {"type": "trace", "oracle": "new_rules:polite", "gold": "gold.jsonl"}
    loop = make_loop(rules / "run", algorithm=algorithm, steps=1, logging={"completions_every": 1})
    run_loop(loop, resume=False, command="test")
    table = pyarrow.parquet.read_table(rules / "run" / "completions" / "step-1.parquet").to_pydict()
    weights = dict(zip([f"say {prompt}: " for prompt, _, _ in PAIRS], triage_of(rules / "run")["weight"]))
    assert table["reward"] == [float(text not in FORBIDDEN) for text in table["completion"]]
    assert table["reward/impact"] == pytest.approx([3 * weights[prompt] for prompt in table["prompt"]], rel=1e-6)


def test_plan_says_what_is_done_once(rules: Path, write_recipe: Callable[..., Path]):
    (rules / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows()) + "\n")
    algorithm = {"type": "trace", "oracle": "new_rules:polite", "gold": "gold.jsonl"}
    plan = make_plan(load_recipe(write_recipe(data="pairs.jsonl", rewards=[], algorithm=algorithm)))
    assert plan.passes == (
        "once: ask new_rules:polite about 10 completions",
        "once: the gradient of 1 gold pairs, and of each conflicting pair by itself",
        "read 4 completions",
        "forward pass of the reference",
        "1 × forward and backward pass of the policy",
        "forward pass of the reference beside it, where pairs are retained",
    )
    assert not (rules / "calls.txt").exists()


# --- stopping and going on -------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


class StopAfter:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_metrics(self, step: int, metrics: Any, control: Control) -> None:
        if step == self.step:
            raise Stop


GOLDEN = {"type": "trace", "oracle": "new_rules:polite", "gold": "gold.jsonl"}


def test_a_killed_run_goes_on_with_the_weights_it_began_with(rules: Path):
    keys: dict[str, Any] = {"algorithm": GOLDEN, "steps": 4, "prompts_per_step": 2}
    run_loop(make_loop(rules / "whole", **keys), resume=False, command="test")
    with pytest.raises(Stop):
        run_loop(make_loop(rules / "killed", callbacks=[StopAfter(3)], **keys), resume=False, command="test")
    triage = (rules / "killed" / "triage.parquet").read_bytes()
    calls = (rules / "calls.txt").read_text()
    run_loop(make_loop(rules / "killed", resume=True, **keys), resume=True, command="test")
    # Neither asked nor measured again, and the same to the bit.
    assert (rules / "calls.txt").read_text() == calls
    assert (rules / "killed" / "triage.parquet").read_bytes() == triage
    whole, killed = (load_file(rules / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())


def test_a_run_killed_before_its_triage_was_written_makes_it(rules: Path):
    run_loop(make_loop(rules / "run", steps=2), resume=False, command="test")
    expected = triage_of(rules / "run")
    (rules / "run" / "triage.parquet").unlink()
    make_loop(rules / "run", steps=2, resume=True).start(True)
    assert triage_of(rules / "run") == expected


def test_other_data_than_the_runs_is_refused(rules: Path):
    run_loop(make_loop(rules / "run", steps=2), resume=False, command="test")
    with pytest.raises(CheckpointError, match=r"data\.train \(its rows\)"):
        make_loop(rules / "run", steps=2, resume=True, data=rows()[:4])
    # A triage cannot be taken over to other rows, even where they are allowed.
    with pytest.raises(CheckpointError, match=r"triage.parquet was made of 5 pairs and the data now has 4"):
        make_loop(rules / "run", steps=2, resume=True, allow=True, data=rows()[:4])
    (rules / "run" / "triage.parquet").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"triage.parquet cannot be read"):
        make_loop(rules / "run", steps=2, resume=True)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "error", "message"),
    [
        (
            {"type": "trace"},
            DataError,
            r"row 0 has no column 'chosen_complies'; verdicts need prompt, chosen, rejected, chosen_complies, "
            r"rejected_complies \(or name a function that gives them: algorithm.oracle\), and it has prompt, chosen, ",
        ),
        ({"type": "trace", "oracle": "no_such_rules:ask"}, ConfigError, "oracle no_such_rules:ask: the module"),
        ({"type": "trace", "oracle": "new_rules:ask"}, ConfigError, "the module new_rules has no callable 'ask'"),
        ({"type": "trace", "oracle": "new_rules:fails"}, RewardError, "'new_rules:fails' raised RuntimeError: no netw"),
        ({"type": "trace", "oracle": "new_rules:unsure"}, RewardError, "returned 0.5 for completion 0; every verdict"),
        (
            {"type": "trace", "oracle": "new_rules:allows_all"},
            DataError,
            r"by the verdicts of new_rules:allows_all the chosen completion of every pair complies .* \(5 pairs\)",
        ),
        ({**GOLDEN, "gold": "missing.jsonl"}, DataError, r"the data file missing.jsonl does not exist"),
        ({**GOLDEN, "gold": "half.jsonl"}, DataError, r"half.jsonl: row 0 has no column 'rejected'; preferences need"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(
    rules: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    algorithm: dict[str, Any],
    error: type[DarError],
    message: str,
):
    (rules / "half.jsonl").write_text('{"prompt": "say x: ", "chosen": "yes"}\n')
    (rules / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows()) + "\n")
    monkeypatch.setattr("dar.assembly.text.TextParts.build", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(error, match=message):
        build_loop(load_recipe(write_recipe(data="pairs.jsonl", rewards=[], algorithm=algorithm)), quiet=True)


def test_a_verdict_must_be_true_or_false(rules: Path):
    data = rows(verdicts=True)
    data[3]["rejected_complies"] = 1
    with pytest.raises(DataError, match=r"row 3: 'rejected_complies' must be true .* or false, found 1"):
        make_loop(rules / "run", data=data, algorithm="trace")


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"type": "trace", "oracle": "polite"}, "expected 'package.module:function', got 'polite'"),
        ({"type": "trace", "kl_coef": -0.1}, "kl_coef"),
        ({"type": "trace", "beta": 0.0}, "beta"),
        ({"type": "trace", "alpha": 0.1}, "trace has no alpha; these methods do"),
    ],
)
def test_impossible_settings_are_refused(algorithm: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_spec(algorithm=algorithm, rewards=[])
