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
from dar.config.model import LoraSpec
from dar.config.policy_gradient import BAPOSpec, GRPOSpec, RLOOSpec
from dar.config.recipe import build_spec, dump_recipe, flatten, load_recipe
from dar.config.regression import DARSpec, TargetESSSpec, TargetKLSpec
from dar.config.reward_model import RewardModelSpec
from dar.config.rewards import FunctionRewardSpec, reward_name
from dar.errors import ConfigError

METHODS = list(ALGORITHM_SPECS)
OFFLINE = ["sft", "var", "dpo", "ipo", "slic", "chi_po", "trace"]
SAMPLING = [method for method in METHODS if method not in OFFLINE]
ON_GROUPS = [
    *("best_of_n", "rloo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "bapo", "r2vpo", "lco"),
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


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": {"type": "dar", "alhpa": 0.1}}, "algorithm: unknown key 'alhpa' (did you mean 'alpha'?)"),
        ({"num_generation": 4}, "unknown key 'num_generation' (did you mean 'num_generations'?)"),
        ({"optim": {"learningrate": 1.0}}, "optim: unknown key 'learningrate' (did you mean 'learning_rate'?)"),
        ({"model": {"path": "x", "lora": {"rnk": 4}}}, "model.lora: unknown key 'rnk' (did you mean 'rank'?)"),
        ({"rewards": [{"type": "length", "targt": 4}]}, "rewards.0: unknown key 'targt' (did you mean 'target'?)"),
    ],
)
def test_misspelt_key_is_named_with_its_path_and_the_nearest_one(changes: dict[str, Any], expected: str):
    assert expected in problem(**changes)


def test_unknown_key_unlike_any_other_lists_what_is_allowed():
    message = problem(sampling={"zzz": 1})
    assert "sampling: unknown key 'zzz'; allowed: max_completion_length, temperature" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"type": "grpo", "w_clip": 20.0}, "grpo has no w_clip; these methods do: awr, dar"),
        ({"type": "dar", "kl_coef": 0.1}, "dar has no kl_coef; these methods do: ppo, trace"),
        ({"kl_coef": 0.1}, "dar has no kl_coef; these methods do: ppo, trace"),
        ({"type": "dpo", "max_reward": 1.0}, "dpo has no max_reward; these methods do: chi_po"),
        ({"type": "gspo", "alpha": 0.5}, "gspo has no alpha; these methods do: dao, dar, dual_ppo"),
    ],
)
def test_key_of_another_algorithm_is_refused_with_the_methods_that_have_it(algorithm: dict[str, Any], expected: str):
    assert problem(algorithm=algorithm).endswith(f"algorithm: {expected}")


def test_keys_of_others_and_of_nobody_are_all_named():
    message = problem(algorithm={"type": "grpo", "w_clip": 20.0, "clp_low": 0.1})
    assert "grpo has no w_clip; these methods do: awr, dar; unknown key 'clp_low' (did you mean 'clip_low'?)" in message


def test_missing_keys_are_all_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build_spec({"model": "m", "rewards": ["sentiment"]}, where="recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml cannot be run as written:")
    for key in ("data", "steps", "output_dir"):
        assert f"  {key}: this key is required" in message


def test_missing_key_inside_a_reward_has_its_full_path():
    assert "  rewards.1.target: this key is required" in problem(rewards=["sentiment", {"type": "length"}])


# --- types and values ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("algorithm", "key", "bound"),
    [
        ({"type": "dar", "alpha": -0.1}, "alpha", "greater than or equal to 0"),
        ({"type": "dar", "alpha": 1.01}, "alpha", "less than or equal to 1"),
        ({"type": "dar", "alpha": math.nan}, "alpha", "(found nan)"),
        ({"type": "dar", "beta": 0.0}, "beta", "greater than 0"),
        ({"type": "dar", "beta": -1.0}, "beta", "greater than 0"),
        ({"type": "dar", "beta": math.inf}, "beta", "finite"),
        ({"type": "dar", "beta": math.nan}, "beta", "finite"),
        ({"type": "dar", "w_clip": 0.0}, "w_clip", "greater than 0"),
        ({"type": "dar", "w_clip": -1.0}, "w_clip", "greater than 0"),
        ({"type": "dar", "w_clip": math.nan}, "w_clip", "greater than 0"),
        ({"type": "dar", "updates": 0}, "updates", "greater than or equal to 1"),
        ({"type": "rloo", "beta": -0.1}, "beta", "greater than or equal to 0"),
        ({"type": "grpo", "clip_low": 1.5}, "clip_low", "less than or equal to 1"),
        ({"type": "grpo", "clip_high": -0.1}, "clip_high", "greater than or equal to 0"),
    ],
)
def test_impossible_value_of_an_algorithm_is_refused(algorithm: dict[str, Any], key: str, bound: str):
    message = problem(algorithm=algorithm)
    assert f"  algorithm.{key}: Input should be" in message
    assert bound in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"num_generations": 0}, "num_generations"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"sampling": {"temperature": 0.0}}, "sampling.temperature"),
        ({"sampling": {"max_completion_length": 0}}, "sampling.max_completion_length"),
        ({"optim": {"learning_rate": 0.0}}, "optim.learning_rate"),
        ({"optim": {"learning_rate": math.nan}}, "optim.learning_rate"),
        ({"optim": {"max_grad_norm": 0.0}}, "optim.max_grad_norm"),
        ({"optim": {"beta2": 1.0}}, "optim.beta2"),
        ({"optim": {"warmup_steps": -1}}, "optim.warmup_steps"),
        ({"optim": {"schedule": "sine"}}, "optim.schedule"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep"),
        ({"checkpoint": {"every": -1}}, "checkpoint.every"),
        ({"runtime": {"precision": "fp16"}}, "runtime.precision"),
        ({"runtime": {"max_tokens_per_microbatch": 0}}, "runtime.max_tokens_per_microbatch"),
        ({"data": {"train": "x", "long_prompts": "cut"}}, "data.long_prompts"),
        ({"rewards": [{"type": "sentiment", "weight": math.inf}]}, "rewards.0.weight"),
        ({"rewards": [{"type": "missing_eos_penalty", "penalty": 0.0}]}, "rewards.0.penalty"),
    ],
)
def test_impossible_value_is_refused_with_its_path(changes: dict[str, Any], key: str):
    assert f"  {key}: Input should be" in problem(**changes)


def test_bounds_that_mean_something_are_allowed():
    assert make_spec(algorithm={"type": "dar", "alpha": 0.0}).algorithm == DARSpec(alpha=0.0)
    assert make_spec(algorithm={"type": "dar", "alpha": 1}).algorithm == DARSpec(alpha=1.0)
    assert make_spec(algorithm={"type": "dar", "w_clip": math.inf}).algorithm == DARSpec(w_clip=math.inf)
    assert make_spec(algorithm={"type": "rloo", "beta": 0.0}).algorithm == RLOOSpec(beta=0.0)
    assert make_spec(optim={"max_grad_norm": math.inf}).optim.max_grad_norm == math.inf


def test_weight_scale_clip_needs_a_finite_clip():
    message = problem(algorithm={"type": "dar", "weight_scale": "clip", "w_clip": math.inf})
    assert "algorithm: weight_scale is 'clip', but w_clip is infinite" in message


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
    ("beta", "expected"),
    [
        ({"target_kl": 0.0}, "algorithm.beta.target_kl: Input should be greater than 0 (found 0.0)"),
        ({"target_kl": math.inf}, "algorithm.beta.target_kl: Input should be a finite number (found inf)"),
        ({"target_ess": 0.0}, "algorithm.beta.target_ess: Input should be greater than 0 (found 0.0)"),
        ({"target_ess": 1.0}, "algorithm.beta.target_ess: Input should be less than 1 (found 1.0)"),
        ({"target": 1.0}, "algorithm.beta: unknown key 'target' (did you mean 'target_kl'?)"),
        ({"target_kl": 1.0, "target_ess": 0.5}, "unknown key 'target_ess' (did you mean 'target_kl'?)"),
    ],
)
def test_impossible_target_is_refused(beta: dict[str, float], expected: str):
    assert expected in problem(algorithm={"type": "dar", "beta": beta})


@pytest.mark.parametrize(
    "method",
    [name for name, spec in ALGORITHM_SPECS.items() if "beta" in spec.model_fields and name not in ("dar", "awr")],
)
def test_beta_is_chosen_for_the_regressions_alone(method: str):
    assert "algorithm.beta: Input should be a valid number" in problem(
        algorithm={"type": method, "beta": {"target_kl": 1.0}}
    )


@pytest.mark.parametrize(
    "bounds",
    [
        {"low_start": 0.95},  # above low_end 0.9
        {"low_end": 1.01},
        {"high_start": 0.99},
        {"high_end": 1.19},  # below high_start 1.2
    ],
)
def test_bounds_of_bapo_must_be_in_order(bounds: dict[str, float]):
    assert problem(algorithm={"type": "bapo", **bounds}).endswith(
        "algorithm: bounds must satisfy low_start ≤ low_end ≤ 1 ≤ high_start ≤ high_end"
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


def test_methods_are_either_sampling_or_offline():
    assert [method for method, spec in ALGORITHM_SPECS.items() if spec.logged] == OFFLINE


@pytest.mark.parametrize("method", OFFLINE)
def test_offline_methods_need_no_rewards(method: str):
    assert make_spec(algorithm=method, rewards=[]).rewards == []
    assert [reward_name(reward) for reward in make_spec(algorithm=method).rewards] == ["sentiment"]


@pytest.mark.parametrize("method", OFFLINE)
def test_held_out_prompts_of_offline_methods_need_rewards(method: str):
    data = {"train": "pairs.jsonl", "heldout": "prompts.jsonl"}
    assert problem(algorithm=method, data=data, rewards=[]).endswith(
        f"data.heldout is set, but no rewards to measure held-out samples of {method} with"
    )
    assert make_spec(algorithm=method, data=data).data.heldout is not None


@pytest.mark.parametrize(
    "sampling", [{"mask_truncated": True}, {"correction": "token"}, {"correction": "sequence", "mask_truncated": True}]
)
@pytest.mark.parametrize("method", OFFLINE)
def test_offline_methods_refuse_what_concerns_samples(method: str, sampling: dict[str, Any]):
    assert problem(algorithm=method, sampling=sampling).endswith(
        f"{method} learns from the data's completions: sampling.mask_truncated and correction do nothing"
    )


@pytest.mark.parametrize("method", SAMPLING)
def test_sampling_methods_need_rewards(method: str):
    assert problem(algorithm=method, rewards=[]).endswith(
        f"rewards is empty, but {method} learns from the rewards of its own samples"
    )


@pytest.mark.parametrize("method", SAMPLING)
def test_truncated_completions_can_be_left_out_except_of_pairs(method: str):
    sampling = {"mask_truncated": True, "correction": "token"}
    if method in ("online_dpo", "online_ipo", "online_slic"):
        assert f"sampling.mask_truncated would tear the pairs of {method} apart: a missing_eos_penalty" in problem(
            algorithm=method, sampling=sampling
        )
    else:
        assert make_spec(algorithm=method, sampling=sampling).sampling.mask_truncated


def test_reference_that_follows_needs_weights_of_its_own():
    assert problem(reference_sync={"every": 2}, model={"path": "some/model", "lora": {}}).endswith(
        "reference_sync needs a reference of its own, but with model.lora the base model is π₀"
    )
    assert make_spec(reference_sync={"every": 2}).reference_sync is not None


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_GROUPS)
def test_methods_that_compare_completions_refuse_a_group_of_one(method: str):
    message = problem(algorithm=method, num_generations=1)
    assert f"num_generations is 1, but {method} compares the completions of one prompt: set it to 2 or more" in message
    assert make_spec(algorithm=method, num_generations=2).num_generations == 2


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ON_GROUPS])
def test_other_methods_work_with_a_group_of_one(method: str):
    assert make_spec(algorithm=method, num_generations=1).num_generations == 1


def test_leave_one_out_baseline_refuses_a_group_of_one():
    message = problem(algorithm={"type": "dar", "baseline": "leave_one_out"}, num_generations=1)
    assert "num_generations is 1: algorithm.baseline leave_one_out needs 2 or more" in message


# --- names and shorthands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": "darr"}, f"algorithm: unknown type 'darr' (did you mean 'dar'?); allowed: {', '.join(METHODS)}"),
        ({"algorithm": "trpo"}, "algorithm: unknown type 'trpo'"),
        ({"algorithm": "onlinedpo"}, "algorithm: unknown type 'onlinedpo' (did you mean 'online_dpo'?)"),
        ({"algorithm": "dr-grpo"}, "algorithm: unknown type 'dr-grpo' (did you mean 'dr_grpo'?)"),
        ({"algorithm": "best-of-n"}, "algorithm: unknown type 'best-of-n' (did you mean 'best_of_n'?)"),
        (
            {"algorithm": {"type": "ppo", "kl_coeff": 0.1}},
            "algorithm: unknown key 'kl_coeff' (did you mean 'kl_coef'?)",
        ),
        ({"algorithm": {"typ": "dpo"}}, "algorithm: unknown key 'typ' (did you mean 'type'?)"),
        ({"optim": "adam"}, "optim: unknown type 'adam' (did you mean 'adamw'?); allowed: adamw, adafactor"),
        ({"rewards": ["sentment"]}, "rewards.0: unknown type 'sentment' (did you mean 'sentiment'?)"),
    ],
)
def test_unknown_name_suggests_the_nearest_and_lists_the_others(changes: dict[str, Any], expected: str):
    assert expected in problem(**changes)


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


def test_rewards_must_be_a_list():
    assert "rewards: expected a list of rewards, for example [sentiment]" in problem(rewards="sentiment")


def test_rewards_that_share_a_name_are_refused():
    message = problem(rewards=["sentiment", {"type": "regex", "pattern": "a", "name": "sentiment"}])
    assert "rewards share a name (sentiment): give each its own with the key 'name'" in message


@pytest.mark.parametrize("path", ["score", "pkg.mod:", ":score"])
def test_function_reward_needs_module_and_function(path: str):
    message = problem(rewards=[{"type": "function", "function": path}])
    assert f"rewards.0.function: expected 'package.module:function', got '{path}'" in message


def test_pattern_that_does_not_compile_is_refused():
    assert "rewards.0.pattern: not a regular expression: " in problem(rewards=[{"type": "regex", "pattern": "("}])


def test_reward_is_named_as_given_or_by_its_function_or_type():
    named = make_spec(rewards=[{"type": "sentiment", "name": "tone"}, "sentiment", "pkg.mod:score"])
    assert [reward_name(reward) for reward in named.rewards] == ["tone", "sentiment", "score"]


# --- specs as objects ------------------------------------------------------------------------------------------------


def test_specs_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        make_spec().steps = 4  # pyright: ignore[reportAttributeAccessIssue] - that it cannot be is the point


def test_specs_built_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"unknown key 'alhpa' \(did you mean 'alpha'\?\)"):
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


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompts_per_step": 99_999_999_999}, "prompts_per_step: Input should be less than or equal to 1000000"),
        ({"num_generations": 99_999_999_999}, "num_generations: Input should be less than or equal to 1000000"),
        ({"evaluation": {"num_generations": 10**7}}, "evaluation.num_generations: Input should be less than or equal"),
        ({"prompts_per_step": 10**6, "num_generations": 11}, "more than ten million completions a step"),
        ({"sampling": {"max_completion_length": 10**10}}, "sampling.max_completion_length: Input should be less"),
        ({"steps": 2**63}, "steps: no number here may be as large as"),
        ({"optim": {"warmup_steps": 10**400}}, "optim.warmup_steps: no number here may be as large as"),
    ],
)
def test_numbers_that_no_step_can_hold_are_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        make_spec(**changes)


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
