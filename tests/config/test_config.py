"""A recipe that cannot run is refused before anything is loaded, in words that say where, what and what else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.handmade import make_spec

from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.base import keys_below
from dar.config.model import LoraSpec
from dar.config.other_names import INSTEAD, keys_in
from dar.config.policy_gradient import BAPOSpec, GRPOSpec, RLOOSpec
from dar.config.preference import DPOSpec
from dar.config.recipe import build_spec, dump_recipe, flatten, load_recipe
from dar.config.regression import DARSpec, TargetESSSpec, TargetKLSpec
from dar.config.reward_model import RewardModelSpec
from dar.config.rewards import FunctionRewardSpec, reward_name
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.files.hints import nearest_hint

METHODS = list(ALGORITHM_SPECS)
OFFLINE = ["sft", "var", "qrpo", "dpo", "ipo", "slic", "chi_po", "trace"]
SAMPLING = [method for method in METHODS if method not in OFFLINE]
ON_GROUPS = [
    *("best_of_n", "tpo", "rloo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo", "dppo", "maxrl"),
    *("bapo", "r2vpo", "pmd_mean", "lco"),
    *("flow_grpo", "grpo_guard"),
    *("online_dpo", "online_ipo", "online_slic"),
]


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_spec(**changes)
    return str(caught.value)


def test_minimal_recipe_gets_the_published_defaults_of_dar():
    spec = make_spec()
    assert spec.algorithm == DARSpec(alpha=0.1, beta=0.05, w_clip=20.0, baseline="group_mean", normalize="batch")
    assert spec.num_generations == 4
    assert spec.seed == 0


# --- keys, types and values ------------------------------------------------------------------------------------------


def dar(**keys: Any) -> dict[str, Any]:
    return {"algorithm": {"type": "dar", **keys}}


def reward(**keys: Any) -> dict[str, Any]:
    return {"rewards": [keys]}


SHRINKS = {"start": 8, "every": 5}
BOUNDS = "algorithm: bounds must satisfy low_start ≤ low_end ≤ 1 ≤ high_start ≤ high_end"
REFUSED: list[tuple[dict[str, Any], str]] = [
    # A misspelt key is named with its path and the nearest one.
    (dar(alhpa=0.1), "algorithm: unknown key 'alhpa' (did you mean 'alpha'?)"),
    ({"algorithm": {"type": "ppo", "kl_coeff": 0.1}}, "algorithm: unknown key 'kl_coeff' (did you mean 'kl_coef'?)"),
    ({"algorithm": {"typ": "dpo"}}, "algorithm: unknown key 'typ' (did you mean 'type'?)"),
    ({"num_generation": 4}, "unknown key 'num_generation' (did you mean 'num_generations'?)"),
    ({"optim": {"learningrate": 1.0}}, "optim: unknown key 'learningrate' (did you mean 'learning_rate'?)"),
    ({"model": {"path": "x", "lora": {"rnk": 4}}}, "model.lora: unknown key 'rnk' (did you mean 'rank'?)"),
    (reward(type="length", targt=4), "rewards.0: unknown key 'targt' (did you mean 'target'?)"),
    # Unlike any other, it gets the list of what is allowed.
    ({"sampling": {"zzz": 1}}, "sampling: unknown key 'zzz'; allowed: max_completion_length, temperature"),
    # A key of other methods is refused with those that have it.
    ({"algorithm": {"type": "grpo", "w_clip": 20.0}}, "algorithm: grpo has no w_clip; these methods do: awr, dar"),
    (dar(kl_coef=0.1), "algorithm: dar has no kl_coef; these methods do: ppo, trace"),
    ({"algorithm": {"kl_coef": 0.1}}, "algorithm: dar has no kl_coef; these methods do: ppo, trace"),
    ({"algorithm": {"type": "dpo", "max_reward": 1.0}}, "dpo has no max_reward; these methods do: chi_po"),
    ({"algorithm": {"type": "gspo", "alpha": 0.5}}, "gspo has no alpha; these methods do: dao, dar, dual_ppo"),
    ({"rewards": ["sentiment", {"type": "length"}]}, "  rewards.1.target: this key is required"),
    # Names.
    ({"algorithm": "darr"}, f"algorithm: unknown type 'darr' (did you mean 'dar'?); allowed: {', '.join(METHODS)}"),
    ({"algorithm": "reinforce"}, "algorithm: unknown type 'reinforce'; allowed: dar, awr,"),
    ({"algorithm": "gpro"}, "algorithm: unknown type 'gpro' (did you mean 'grpo'?)"),
    ({"algorithm": "onlinedpo"}, "algorithm: unknown type 'onlinedpo' (did you mean 'online_dpo'?)"),
    ({"algorithm": "dr-grpo"}, "algorithm: unknown type 'dr-grpo' (did you mean 'dr_grpo'?)"),
    ({"algorithm": "best-of-n"}, "algorithm: unknown type 'best-of-n' (did you mean 'best_of_n'?)"),
    ({"optim": "adam"}, "optim: unknown type 'adam' (did you mean 'adamw'?); allowed: adamw, adamw_8bit, adafactor"),
    ({"rewards": ["sentment"]}, "rewards.0: unknown type 'sentment' (did you mean 'sentiment'?)"),
    # Values.
    (dar(weight_scale="clip", w_clip=math.inf), "algorithm: weight_scale is 'clip', but w_clip is infinite"),
    (dar(beta={"target_kl": 0.0}), "algorithm.beta.target_kl: Input should be greater than 0 (found 0.0)"),
    (dar(beta={"target_kl": math.inf}), "algorithm.beta.target_kl: Input should be a finite number (found inf)"),
    (dar(beta={"target_ess": 0.0}), "algorithm.beta.target_ess: Input should be greater than 0 (found 0.0)"),
    (dar(beta={"target_ess": 1.0}), "algorithm.beta.target_ess: Input should be less than 1 (found 1.0)"),
    (dar(beta={"target": 1.0}), "algorithm.beta: unknown key 'target' (did you mean 'target_kl'?)"),
    (dar(beta={"target_kl": 1.0, "target_ess": 0.5}), "unknown key 'target_ess' (did you mean 'target_kl'?)"),
    *(({"algorithm": {"type": "bapo", **each}}, BOUNDS) for each in (
        {"low_start": 0.95}, {"low_end": 1.01}, {"high_start": 0.99}, {"high_end": 1.19},
    )),
    *(({"algorithm": {"type": "dppo", **each}}, f"algorithm.{where} (found ") for each, where in (
        ({"max_shift": 1.1}, "max_shift: Input should be less than or equal to 1"),
        ({"max_shift": -0.1}, "max_shift: Input should be greater than or equal to 0"),
        ({"max_ratio": 0.9}, "max_ratio: Input should be greater than or equal to 1"),
    )),
    ({"algorithm": {"type": "cispo", "clip_low": 1.1}}, "algorithm.clip_low: Input should be less than or equal to 1"),
    (dar(baseline="leave_one_out") | {"num_generations": 1}, "is 1: algorithm.baseline leave_one_out needs 2 or more"),
    (dar(normalize_weights="group") | {"num_generations": 1}, "1: algorithm.normalize_weights group needs 2 or more"),
    (dar(center_weights=True) | {"sampling": {"mask_truncated": True}},
     "mask_truncated would have the mean that algorithm.center_weights subtracts push down endings as such"),
    (dar(center_weights=True, updates=2), "center_weights is for one update per batch, not 2"),
    (dar(normalize_weights="group", weight_scale="clip"), "normalize_weights 'group' scales and centres in each"),
    *(({"runtime": {"sharding": "full"}, **each}, "runtime.sharding full keeps parts of weights, but " + reason)
      for each, reason in (
        ({"optim": "adafactor"}, "optim.type adafactor takes means over rows and columns of whole ones: use none"),
        ({"optim": "adamw_8bit"}, "optim.type adamw_8bit rounds blocks of whole ones"),
        ({"optim": {"null_space": "general.jsonl"}}, "optim.null_space projects whole ones"),
        ({"algorithm": {"type": "trace", "kl_coef": 0.1}}, "algorithm.kl_coef of trace asks π₀'s head for whole ones"),
        ({"runtime": {"sharding": "full", "compile_layers": True}}, "runtime.compile_layers compiles for whole ones"),
    )),
    # Ranks that shrink.
    *(({"model": {"path": "m", "lora": {"rank": rank}}}, expected) for rank, expected in (
        (0, "model.lora.rank: Input should be greater than or equal to 1 (found 0)"),
        ({"start": 0, "every": 5}, "model.lora.rank.start: Input should be greater than or equal to 1 (found 0)"),
        ({"start": 8, "every": 0}, "model.lora.rank.every: Input should be greater than or equal to 1 (found 0)"),
        ({"start": 8}, "model.lora.rank.every: this key is required"),
        (SHRINKS | {"energy": 0.0}, "model.lora.rank.energy: Input should be greater than 0 (found 0.0)"),
        (SHRINKS | {"energy": 1.01}, "model.lora.rank.energy: Input should be less than or equal to 1 (found 1.01)"),
        (SHRINKS | {"enregy": 0.9}, "model.lora.rank: unknown key 'enregy' (did you mean 'energy'?)"),
    )),
    *(({"model": {"path": "m", "lora": {"rank": SHRINKS}}, "runtime": runtime}, expected) for runtime, expected in (
        ({"sharding": "full"}, "but model.lora.rank as a mapping takes singular values of whole ones: use none"),
        ({"compile_layers": True}, "runtime.compile_layers needs layers of one rank: give model.lora.rank a number"),
    )),
    ({"rewards": "sentiment"}, "rewards: expected a list of rewards, for example [sentiment]"),
    ({"rewards": ["sentiment", {"type": "regex", "pattern": "a", "name": "sentiment"}]},
     "rewards share a name (sentiment): give each its own with the key 'name'"),
    (reward(type="regex", pattern="("), "rewards.0.pattern: not a regular expression: "),
    *((reward(type="function", function=path), f"rewards.0.function: expected 'package.module:function', got '{path}'")
      for path in ("score", "pkg.mod:", ":score")),
    # Numbers that no step can hold.
    ({"prompts_per_step": 99_999_999_999}, "prompts_per_step: Input should be less than or equal to 1000000"),
    ({"num_generations": 99_999_999_999}, "num_generations: Input should be less than or equal to 1000000"),
    ({"evaluation": {"num_generations": 10**7}}, "evaluation.num_generations: Input should be less than or equal"),
    ({"prompts_per_step": 10**6, "num_generations": 11}, "more than ten million completions a step"),
    ({"sampling": {"max_completion_length": 10**10}}, "sampling.max_completion_length: Input should be less"),
    ({"steps": 2**63}, "steps: no number here may be as large as"),
    ({"optim": {"warmup_steps": 10**400}}, "optim.warmup_steps: no number here may be as large as"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_impossible_recipe_is_refused_in_words(changes: dict[str, Any], expected: str):
    found = problem(**changes)
    assert expected in found
    assert ("did you mean" in expected) == ("did you mean" in found)


def test_keys_of_others_and_of_nobody_are_all_named():
    message = problem(algorithm={"type": "grpo", "w_clip": 20.0, "clp_low": 0.1})
    assert "grpo has no w_clip; these methods do: awr, dar\n  algorithm: unknown key 'clp_low' (did you" in message


def test_unknown_keys_and_wrong_values_are_told_in_one_message():
    with pytest.raises(ConfigError) as caught:
        make_spec(lr=1e-5, learning_rat=1, stpes=3, temperature=0.5, seed="x", optim={"lr": 1, "eps": 0}, rewards=[])
    _, *lines = str(caught.value).splitlines()
    allowed = ", ".join(RunSpec.model_fields)
    assert lines == [
        "  there is no 'lr': use optim.learning_rate",
        "  there is no 'temperature': use sampling.temperature",
        f"  unknown keys 'learning_rat', 'stpes' (did you mean 'steps'?); allowed: {allowed}",
        "  optim: there is no 'lr': use learning_rate",
        "  optim.eps: Input should be greater than 0 (found 0)",
        "  seed: Input should be a valid integer (found 'x')",
    ]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("num_train_epochs", "a run is counted in steps: steps = epochs × number of prompts / prompts_per_step"),
        ("vllm_gpu_memory_utilization", "engine may be a class of yours that samples elsewhere"),
        ("best_policy", None),
        ("every", None),  # the name of too many keys
    ],
)
def test_key_of_other_libraries_is_explained(name: str, written: str | None):
    found = problem(**{name: 1})
    assert f"unknown key '{name}'; allowed" in found if written is None else written in found


def test_every_key_that_is_named_instead_of_another_exists():
    known = {*keys_below(RunSpec), *keys_below(RewardModelSpec)}
    assert [(name, key) for name, text in INSTEAD.items() for key in keys_in(text) or [""] if key not in known] == []


@pytest.mark.parametrize("name", ["deepspeed", "trpo", "max_tokens"])
def test_no_name_is_taken_for_one_that_only_sounds_like_it(name: str):
    assert nearest_hint(name, ["seed", "grpo", "max_steps"]) == ""


def test_missing_keys_are_all_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build_spec({"model": "m", "rewards": ["sentiment"]}, where="recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml cannot be run as written:")
    for key in ("data", "steps", "output_dir"):
        assert f"  {key}: this key is required" in message


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"steps": "three"}, "steps", "'three'"),
        ({"steps": 3.5}, "steps", "3.5"),
        ({"steps": True}, "steps", "True"),
        ({"algorithm": {"type": "dar", "alpha": "0.1"}}, "algorithm.alpha", "'0.1'"),
        ({"output_dir": 5}, "output_dir", "5"),
        ({"model": {"path": "x", "trust_remote_code": "yes"}}, "model.trust_remote_code", "'yes'"),
        ({"model": 5}, "model", "5"),
    ],
)
def test_wrong_type_is_refused_and_shown(changes: dict[str, Any], key: str, found: str):
    message = problem(**changes)
    expected = "expected a mapping of keys to values" if key == "model" else "Input should be"
    assert f"  {key}: {expected}" in message
    assert message.endswith(f"(found {found})")


AT_LEAST_0, ABOVE_0 = "greater than or equal to 0", "greater than 0"
OUT_OF_BOUNDS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "algorithm.alpha": [
        (dar(alpha=-0.1), AT_LEAST_0), (dar(alpha=1.01), "less than or equal to 1"),
        (dar(alpha=math.nan), "(found nan)"),
    ],
    "algorithm.beta": [
        (dar(beta=0.0), ABOVE_0), (dar(beta=-1.0), ABOVE_0), (dar(beta=math.inf), "finite"),
        (dar(beta=math.nan), "finite"), ({"algorithm": {"type": "rloo", "beta": -0.1}}, AT_LEAST_0),
    ],
    "algorithm.w_clip": [(dar(w_clip=value), ABOVE_0) for value in (0.0, -1.0, math.nan)],
    "algorithm.updates": [(dar(updates=0), "greater than or equal to 1")],
    "algorithm.clip_low": [({"algorithm": {"type": "grpo", "clip_low": 1.5}}, "less than or equal to 1")],
    "algorithm.clip_high": [({"algorithm": {"type": "grpo", "clip_high": -0.1}}, AT_LEAST_0)],
    "steps": [({"steps": 0}, "")],
    "num_generations": [({"num_generations": 0}, "")],
    "prompts_per_step": [({"prompts_per_step": 0}, "")],
    "seed": [({"seed": -1}, ""), ({"seed": 2**63}, "")],
    "sampling.temperature": [({"sampling": {"temperature": 0.0}}, "")],
    "sampling.max_completion_length": [({"sampling": {"max_completion_length": 0}}, "")],
    "optim.learning_rate": [({"optim": {"learning_rate": value}}, "") for value in (0.0, math.nan)],
    "optim.max_grad_norm": [({"optim": {"max_grad_norm": 0.0}}, "")],
    "optim.beta2": [({"optim": {"beta2": 1.0}}, "")],
    "optim.warmup_steps": [({"optim": {"warmup_steps": -1}}, "")],
    "optim.schedule": [({"optim": {"schedule": "sine"}}, "")],
    "checkpoint.keep": [({"checkpoint": {"keep": 0}}, "")],
    "checkpoint.every": [({"checkpoint": {"every": -1}}, "")],
    "runtime.precision": [({"runtime": {"precision": "fp16"}}, "")],
    "runtime.max_tokens_per_microbatch": [({"runtime": {"max_tokens_per_microbatch": 0}}, "")],
    "data.long_prompts": [({"data": {"train": "x", "long_prompts": "cut"}}, "")],
    "rewards.0.weight": [(reward(type="sentiment", weight=math.inf), "")],
    "rewards.0.penalty": [(reward(type="missing_eos_penalty", penalty=0.0), "")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "changes", "bound"), [(key, *each) for key, rows in OUT_OF_BOUNDS.items() for each in rows]
)
def test_value_out_of_bounds_is_refused_with_its_path(key: str, changes: dict[str, Any], bound: str):
    message = problem(**changes)
    assert f"  {key}: Input should be" in message
    assert bound in message


def test_bounds_that_mean_something_are_allowed():
    assert make_spec(algorithm={"type": "dar", "alpha": 0.0}).algorithm == DARSpec(alpha=0.0)
    assert make_spec(algorithm={"type": "dar", "alpha": 1}).algorithm == DARSpec(alpha=1.0)
    assert make_spec(algorithm={"type": "dar", "w_clip": math.inf}).algorithm == DARSpec(w_clip=math.inf)
    assert make_spec(algorithm={"type": "rloo", "beta": 0.0}).algorithm == RLOOSpec(beta=0.0)
    assert make_spec(optim={"max_grad_norm": math.inf}).optim.max_grad_norm == math.inf


@pytest.mark.parametrize(
    ("beta", "spec"),
    [
        (0.5, 0.5),
        ({"target_kl": 1.0}, TargetKLSpec(target_kl=1.0)),
        ({"target_ess": 0.5}, TargetESSSpec(target_ess=0.5)),
    ],
)
@pytest.mark.parametrize("method", ["dar", "awr"])
def test_beta_is_a_number_or_what_it_is_chosen_for(method: str, beta: Any, spec: Any, tmp_path: Path):
    found = make_spec(algorithm={"type": method, "beta": beta})
    assert found.algorithm == ALGORITHM_SPECS[method].model_validate({"beta": spec})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(found))
    assert load_recipe(recipe) == found
    for name in beta if isinstance(beta, dict) else ():
        changed = load_recipe(recipe, [f"algorithm.beta.{name}=0.25"])
        assert changed == make_spec(algorithm={"type": method, "beta": {name: 0.25}})


@pytest.mark.parametrize(
    "method",
    [name for name, spec in ALGORITHM_SPECS.items() if "beta" in spec.model_fields and name not in ("dar", "awr")],
)
def test_beta_is_chosen_for_the_regressions_alone(method: str):
    assert "algorithm.beta: Input should be a valid number" in problem(
        algorithm={"type": method, "beta": {"target_kl": 1.0}}
    )


def test_bounds_of_bapo_may_touch():
    bounds: dict[str, Any] = {"low_start": 1.0, "low_end": 1.0, "high_start": 1.0, "high_end": 1.0}
    assert make_spec(algorithm={"type": "bapo", **bounds}).algorithm == BAPOSpec(**bounds)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_defaults_and_reads_back_as_itself(method: str, tmp_path: Path):
    spec = make_spec(algorithm=method)
    assert spec.algorithm == ALGORITHM_SPECS[method]()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(spec))
    assert load_recipe(recipe) == spec


@pytest.mark.parametrize("method", OFFLINE)
def test_offline_methods_need_no_rewards_unless_held_out_ones_are_named(method: str):
    assert [name for name, spec in ALGORITHM_SPECS.items() if spec.logged] == OFFLINE
    assert make_spec(algorithm=method, rewards=[]).rewards == []
    assert [reward_name(reward) for reward in make_spec(algorithm=method).rewards] == ["sentiment"]
    data = {"train": "pairs.jsonl", "heldout": "prompts.jsonl"}
    assert make_spec(algorithm=method, data=data, rewards=[]).rewards == []
    assert problem(algorithm=method, data=data, rewards=[], evaluation={"rewards": ["sentiment"]}).endswith(
        "evaluation.rewards stand beside rewards, but rewards is empty: name those, too"
    )
    assert make_spec(algorithm=method, data=data).data.heldout is not None
    for sampling in ({"mask_truncated": True}, {"correction": "token"}, {"max_staleness": 1},
                     {"resample_tied": {"max_rounds": 1}}):  # fmt: skip
        assert problem(algorithm=method, sampling=sampling).endswith(
            f"{method} learns from the data's completions: sampling.mask_truncated, correction, max_staleness and "
            "resample_tied do nothing"
        )


@pytest.mark.parametrize("method", SAMPLING)
def test_sampling_methods_need_rewards_and_pairs_whole_groups(method: str):
    assert problem(algorithm=method, rewards=[]).endswith(
        f"rewards is empty, but {method} learns from the rewards of its own samples"
    )
    sampling = {"mask_truncated": True, "correction": "token"}
    if method in ("online_dpo", "online_ipo", "online_slic"):
        assert f"sampling.mask_truncated would tear the pairs of {method} apart: a missing_eos_penalty" in problem(
            algorithm=method, sampling=sampling
        )
    else:
        assert make_spec(algorithm=method, sampling=sampling).sampling.mask_truncated


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_compare_completions_refuse_a_group_of_one(method: str):
    if method in ON_GROUPS:
        assert (
            f"num_generations is 1, but {method} compares the completions of one prompt: set it to 2 or more"
            in problem(algorithm=method, num_generations=1)
        )
    assert make_spec(algorithm=method, num_generations=1 + (method in ON_GROUPS))


def test_reference_that_follows_needs_weights_of_its_own():
    assert problem(reference_sync={"every": 2}, model={"path": "some/model", "lora": {}}).endswith(
        "reference_sync needs a reference of its own, but with model.lora the base model is π₀"
    )
    assert make_spec(reference_sync={"every": 2}).reference_sync is not None


# --- names and shorthands --------------------------------------------------------------------------------------------


def test_bare_names_stand_for_mappings():
    short = make_spec(
        reference="other/model", algorithm="grpo", optim="adafactor", rewards=["pkg.mod:score", "sentiment"]
    )
    long = make_spec(
        model={"path": "some/model"},
        reference={"path": "other/model"},
        data={"train": {"path": "prompts.jsonl"}},
        algorithm={"type": "grpo"},
        optim={"type": "adafactor"},
        rewards=[{"type": "function", "function": "pkg.mod:score"}, {"type": "sentiment"}],
    )
    assert short == long


def test_optimizer_is_adamw_unless_said():
    assert make_spec(optim={"learning_rate": 1e-4}).optim.type == "adamw"


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_reward_is_named_as_given_or_by_its_function_or_type():
    named = make_spec(rewards=[{"type": "sentiment", "name": "tone"}, "sentiment", "pkg.mod:score"])
    assert [reward_name(reward) for reward in named.rewards] == ["tone", "sentiment", "score"]


# --- specs as objects ------------------------------------------------------------------------------------------------


def test_specs_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        make_spec().steps = 4  # pyright: ignore[reportAttributeAccessIssue] - that it cannot be is the point


def test_specs_built_in_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"^DARSpec: unknown key 'alhpa' \(did you mean 'alpha'\?\)"):
        DARSpec(alhpa=0.1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        LoraSpec(rank=0)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        GRPOSpec(clip_low=2.0)
    with pytest.raises(ValueError, match=r"package\.module:function"):
        FunctionRewardSpec(function="nothing")


def test_letters_of_the_2025_paper_are_translated():
    # β = α₂₅ + β₂₅ = 0.05, α = α₂₅ / β = 0.1: the 2026 paper's defaults are the 2025 paper's.
    spec = DARSpec.from_2025(alpha_25=0.005, beta_25=0.045, w_clip=10.0)
    assert spec.alpha == pytest.approx(0.1)
    assert spec.beta == pytest.approx(0.05)
    assert spec.w_clip == 10.0


@pytest.mark.parametrize(("alpha_25", "beta_25"), [(0.0, 0.0), (-0.1, 0.2), (0.2, -0.1)])
def test_impossible_letters_of_the_2025_paper_are_refused(alpha_25: float, beta_25: float):
    with pytest.raises(ValueError, match="must be ≥ 0 and not both 0"):
        DARSpec.from_2025(alpha_25=alpha_25, beta_25=beta_25)


# --- judges ----------------------------------------------------------------------------------------------------------


def judge(endpoint: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A judge among the rewards."""
    where = {"base_url": "http://127.0.0.1:8000/v1/", "model": "m"}
    return {"type": "judge", "endpoint": where | (endpoint or {}), **changes}


def test_a_judge_reward_survives_the_run_folder(tmp_path: Path):
    written = judge({"api_key_env": "MY_KEY", "parameters": {"seed": 1}}, scale=[0, 5], budget={"requests": 9})
    spec = make_spec(rewards=[written, judge(name="pairs", mode="pairwise", opponents="first", cache=None)])
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(spec))
    assert load_recipe(path) == spec
    assert "http://127.0.0.1:8000/v1\n" in dump_recipe(spec), "without the slash at the end"


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (
            judge({"base_url": "127.0.0.1:8000"}),
            "rewards.0.endpoint.base_url: expected a URL such as http://127.0.0.1:8000/v1",
        ),
        (judge({"base_url": "http://ho st/v1"}), "expected a URL such as http://127.0.0.1:8000/v1"),
        (judge({"base_url": "http://host:99999/v1"}), "rewards.0.endpoint.base_url: Port out of range"),
        (judge({"base_url": "http://me:pw@host/v1"}), "put the key into an environment variable"),
        (judge({"base_url": "http://host/v1?key=pw"}), "put the key into an environment variable"),
        (judge({"api_key_env": "sk-pw"}), "expected the name of an environment variable, such as OPENAI_API_KEY"),
        (judge({"parameters": {"stream": True}}), "rewards.0.endpoint.parameters: stream cannot be set here"),
        (judge(opponents="all"), "rewards.0: mode pointwise has no opponents: remove it"),
        (judge(mode="pairwise", scale=[1, 5]), "rewards.0: mode pairwise has no scale: remove it"),
        (judge(scale=[5, 1]), "rewards.0.scale: expected two whole numbers from 0 to 100, the lower one first"),
        (judge(budgt={}), "rewards.0: unknown key 'budgt' (did you mean 'budget'?)"),
        (judge(price={"prompt": 1.0}), "rewards.0.price.completion: this key is required"),
    ],
)
def test_judges_that_cannot_be(reward: dict[str, Any], expected: str):
    said = problem(rewards=[reward])
    assert expected in said
    assert "pw" not in said, "what may be a secret is not repeated"


# --- what no run can hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\0b", "a\ud83d"])
@pytest.mark.parametrize(
    ("place", "key"),
    [
        (lambda text: {"output_dir": text}, "output_dir"),
        (lambda text: {"data": {"train": {"path": text}}}, "data.train.path"),
        (lambda text: {"model": {"path": "m", "lora": {"target_modules": ["q", text]}}}, "model.lora.target_modules"),
        (lambda text: {"rewards": [JUDGED | {"parameters": {"stop": [{"x": text}]}}]}, "rewards.0.endpoint.parameters"),
        (lambda text: {"rewards": [JUDGED | {"parameters": {text: 1}}]}, "rewards.0.endpoint.parameters"),
    ],
)
def test_text_that_no_file_can_hold_is_refused(place: Any, key: str, text: str):
    changes = place(text)
    for reward in changes.get("rewards", []):
        reward["endpoint"] = {"base_url": "http://x/v1", "model": "m", "parameters": reward.pop("parameters")}
    with pytest.raises(ConfigError, match=rf"\n  {key}: 'a.*' has a NUL character or half of a surrogate pair"):
        make_spec(**changes)


JUDGED: dict[str, Any] = {"type": "judge"}


def test_home_folder_in_output_dir_is_written_out_once_for_all_who_read_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert make_spec(output_dir="~/runs/a").output_dir == "/home/somebody/runs/a"
    reward_model = {"model": "m", "data": "d", "steps": 1, "output_dir": "~/b"}
    assert build_spec(reward_model, where="r", kind=RewardModelSpec).output_dir == "/home/somebody/b"
    with pytest.raises(ConfigError, match="output_dir: ~no-such-user/x: the home folder it begins with is not known"):
        make_spec(output_dir="~no-such-user/x")


def test_method_of_ones_own_is_an_import_path_with_settings():
    own = {"type": "my_pkg.my_mod:Mine", "beta": 0.2, "nested": {"a": [1]}}
    spec = make_spec(algorithm=own)
    assert spec.algorithm.model_dump() == own
    assert build_spec(yaml.safe_load(dump_recipe(spec)), where="again") == spec
    assert flatten(spec)["algorithm.nested.a.0"] == 1


def test_what_is_no_import_path_is_refused():
    said = "'my-pkg:Mine' is no import path: write package.module:Class"
    assert f"algorithm.type: {said}" in problem(algorithm={"type": "my-pkg:Mine"})


def test_type_needs_no_description_of_its_own():
    assert "  type = 'dpo'\n      `dpo`" in (DPOSpec.__doc__ or "")
    assert DPOSpec.model_json_schema()["properties"]["type"]["description"] == "`dpo`"
