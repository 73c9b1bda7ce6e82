"""Reading recipes: YAML without its surprises, overrides, and a resolved recipe that reads back as itself."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.handmade import make_spec

from dar.config.model import LoraSpec
from dar.config.optim import AdamWSpec
from dar.config.recipe import dump_recipe, flatten, load_recipe, parse_yaml
from dar.config.regression import DARSpec
from dar.config.rewards import FunctionRewardSpec, LengthRewardSpec, SentimentRewardSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError

RECIPE = """\
model: some/model
data: prompts.jsonl
rewards: [sentiment]
steps: 3
output_dir: run
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def load_text(path: Path, text: str, *overrides: str) -> RunSpec:
    path.write_text(text)
    return load_recipe(path, overrides)


def reread(spec: RunSpec) -> RunSpec:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_recipe(spec), encoding="utf-8")
        return load_recipe(path)


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("+2e-5", 2e-5), ("1.5e3", 1500.0), ("3.e2", 300.0), ("1e-05", 1e-5), ("7", 7.0)],
)
def test_number_in_scientific_notation_is_a_number(recipe: Path, text: str, value: float):
    spec = load_text(recipe, RECIPE + f"optim:\n  learning_rate: {text}\n")
    assert spec.optim.learning_rate == value


def test_negative_scientific_number_is_a_number(recipe: Path):
    spec = load_text(recipe, RECIPE.replace("[sentiment]", "[{type: sentiment, weight: -1e-1}]"))
    assert spec.rewards[0].weight == -0.1


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "'1e-5'"])
def test_text_that_is_nearly_a_number_stays_text(recipe: Path, text: str):
    spec = load_text(recipe, RECIPE.replace("output_dir: run", f"output_dir: {text}"))
    assert spec.output_dir == text.strip("'")


def test_infinite_clip_is_written_as_in_yaml(recipe: Path):
    spec = load_text(recipe, RECIPE + "algorithm: {type: dar, w_clip: .inf}\n")
    assert spec.algorithm == DARSpec(w_clip=math.inf)


def test_same_key_twice_is_refused(recipe: Path):
    with pytest.raises(ConfigError, match="has the same key twice: steps"):
        load_text(recipe, RECIPE + "steps: 5\n")


def test_same_key_twice_in_an_inner_mapping_is_refused_with_its_line(recipe: Path):
    text = RECIPE + "algorithm:\n  type: dar\n  alpha: 0.1\n  alpha: 0.2\n"
    with pytest.raises(ConfigError, match="the mapping at line 7 has the same key twice: alpha"):
        load_text(recipe, text)


def test_same_key_twice_names_the_file(recipe: Path):
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_text(recipe, RECIPE + "steps: 5\n")


@pytest.mark.parametrize(
    "text", ["model: [", "model: 'open", "a: b: c", "\tsteps: 3", "--- 1\n--- 2\n", "a: !!python/none"]
)
def test_malformed_yaml_is_one_clear_error(recipe: Path, text: str):
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not YAML that can be read: ") as caught:
        load_text(recipe, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- steps: 3\n", "steps\n", "# nothing but a comment\n"])
def test_recipe_that_is_no_mapping_is_refused(recipe: Path, text: str):
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not a mapping of keys to values"):
        load_text(recipe, text)


def test_missing_recipe_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: .*No such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_folder_as_recipe_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*directory"):
        load_recipe(tmp_path)


def test_recipe_that_is_not_text_is_refused(recipe: Path):
    recipe.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: line 1 is not UTF-8 text"):
        load_recipe(recipe)


def test_every_problem_is_listed_on_its_own_line(recipe: Path):
    with pytest.raises(ConfigError) as caught:
        load_text(recipe, RECIPE + "num_generations: 0\nalgorithm: {type: dar, alpha: 2.0, beta: 0.0}\n")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{recipe} cannot be run as written:"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        "algorithm.alpha",
        "algorithm.beta",
        "num_generations",
    ]


@pytest.mark.parametrize("text", ["model: 5", "algorithm: 5", "rewards: [5]", "data: [1]"])
def test_value_that_should_be_a_mapping_is_explained_without_python_class_names(recipe: Path, text: str):
    key = text.partition(":")[0]
    kept = [line for line in RECIPE.splitlines() if not line.startswith(key)]
    with pytest.raises(ConfigError) as caught:
        load_text(recipe, "\n".join([*kept, text]))
    assert "instance of" not in str(caught.value)
    assert "object to extract" not in str(caught.value)


# --- overrides -------------------------------------------------------------------------------------------------------


def test_override_replaces_a_value_and_leaves_the_file(recipe: Path):
    assert load_recipe(recipe, ["steps=7", "output_dir=other"]).steps == 7
    assert recipe.read_text() == RECIPE


def test_later_override_wins(recipe: Path):
    assert load_recipe(recipe, ["steps=7", "steps=8"]).steps == 8


def test_override_value_is_yaml(recipe: Path):
    spec = load_recipe(
        recipe, ["rewards=[{type: length, target: 5}, sentiment]", "optim.learning_rate=1e-4", "reference="]
    )
    assert spec.rewards == [LengthRewardSpec(target=5), SentimentRewardSpec()]
    assert spec.optim.learning_rate == 1e-4
    assert spec.reference is None


def test_override_value_may_hold_an_equals_sign(recipe: Path):
    assert load_recipe(recipe, ["output_dir=a=b"]).output_dir == "a=b"


def test_override_goes_into_a_list(recipe: Path):
    spec = load_text(
        recipe, RECIPE.replace("[sentiment]", "[sentiment, {type: length, target: 5}]"), "rewards.1.target=9"
    )
    assert spec.rewards == [SentimentRewardSpec(), LengthRewardSpec(target=9)]


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("algorithm.alpha=0.5", lambda spec: spec.algorithm == DARSpec(alpha=0.5)),
        ("optim.beta1=0.5", lambda spec: spec.optim == AdamWSpec(beta1=0.5)),
        ("model.lora.rank=4", lambda spec: spec.model.path == "some/model" and spec.model.lora == LoraSpec(rank=4)),
        ("data.wrap_as_user=true", lambda spec: spec.data.train.path == "prompts.jsonl" and spec.data.wrap_as_user),
        (
            "data.train.max_rows=2",
            lambda spec: (spec.data.train.path, spec.data.train.max_rows) == ("prompts.jsonl", 2),
        ),
        ("reference.revision=main", lambda spec: (spec.reference.path, spec.reference.revision) == ("ref", "main")),
        ("rewards.0.weight=2", lambda spec: spec.rewards == [SentimentRewardSpec(weight=2.0)]),
        ("rewards.0=length", None),
    ],
)
def test_override_through_a_shorthand_expands_it(recipe: Path, override: str, check: Any):
    text = RECIPE + "algorithm: dar\noptim: adamw\nreference: ref\n"
    if check is None:
        with pytest.raises(ConfigError, match=r"rewards\.0\.target: this key is required"):
            load_text(recipe, text, override)
    else:
        assert check(load_text(recipe, text, override))


def test_override_into_a_reward_given_by_import_path_expands_it(recipe: Path):
    spec = load_text(recipe, RECIPE.replace("[sentiment]", "['pkg.mod:score']"), "rewards.0.weight=2")
    assert spec.rewards == [FunctionRewardSpec(function="pkg.mod:score", weight=2.0)]


def test_override_makes_the_mappings_on_its_way(recipe: Path):
    assert load_recipe(recipe, ["evaluation.every=2"]).evaluation.every == 2
    assert load_recipe(recipe, ["data.heldout.path=held.jsonl"]).data.heldout is not None


def test_override_of_the_default_algorithm_needs_no_type(recipe: Path):
    assert load_recipe(recipe, ["algorithm.alpha=0.5"]).algorithm == DARSpec(alpha=0.5)


@pytest.mark.parametrize("override", ["steps", "=3", ".steps=3", "algorithm..alpha=1", "steps.=1", ""])
def test_malformed_override_is_refused(recipe: Path, override: str):
    with pytest.raises(ConfigError, match=r"is not of the form key\.path=value") as caught:
        load_recipe(recipe, [override])
    assert f"override '{override}'" in str(caught.value)


def test_override_value_that_is_not_yaml_is_refused(recipe: Path):
    with pytest.raises(ConfigError, match=r"override 'steps=\[' is not YAML that can be read: "):
        load_recipe(recipe, ["steps=["])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.x=1", "override 'steps.x=1': steps is 3 and has no keys"),
        ("output_dir.x=1", "override 'output_dir.x=1': output_dir is 'run' and has no keys"),
        ("rewards.5.weight=2", "override 'rewards.5.weight=2': there is no entry '5' in a list of 1"),
        ("rewards.1=sentiment", "override 'rewards.1=sentiment': there is no entry '1' in a list of 1"),
        ("rewards.first=sentiment", "override 'rewards.first=sentiment': there is no entry 'first' in a list of 1"),
        ("rewards.-1.weight=2", "override 'rewards.-1.weight=2': there is no entry '-1' in a list of 1"),
    ],
)
def test_override_that_leads_nowhere_says_where_it_stopped(recipe: Path, override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [override])
    assert str(caught.value) == message


def test_misspelt_override_suggests_the_nearest_key(recipe: Path):
    with pytest.raises(ConfigError, match=r"optim: unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)"):
        load_recipe(recipe, ["optim.learning_rat=1"])


# --- round trips -----------------------------------------------------------------------------------------------------

SPECS = {
    "defaults": {},
    "infinite clip": {"algorithm": {"type": "dar", "w_clip": math.inf, "baseline": "leave_one_out"}},
    "everything": {
        "model": {"path": "m.gguf", "sha256": "ab", "lora": {"rank": 4, "target_modules": ["q_proj"]}},
        "reference": {"path": "r", "revision": "main", "trust_remote_code": True},
        "data": {
            "train": {"path": "t", "name": "en", "max_rows": 5},
            "heldout": "h",
            "system_prompt": "Sei höflich: ✓",
        },
        "algorithm": {"type": "rloo", "beta": 0.0, "updates": 3},
        "rewards": [
            {"type": "length", "target": 5, "weight": -0.5},
            {"type": "regex", "pattern": "a: [b]\n#c\t'\"\\d+"},
            "pkg.mod:score",
            {"type": "missing_eos_penalty", "penalty": 2.0},
        ],
        "optim": {"type": "adafactor", "learning_rate": 1e-6, "max_grad_norm": math.inf},
        "logging": {"trackers": ["tensorboard"]},
        "seed": 2**63 - 1,
    },
    "words that YAML reads as something else": {
        "output_dir": "yes",
        "rewards": [{"type": "regex", "pattern": text, "name": text} for text in ("null", "12:30", "0x1F", "~", "1.5")],
    },
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS.keys())
def test_resolved_recipe_reads_back_as_itself(changes: dict[str, Any]):
    spec = make_spec(**changes)
    assert reread(spec) == spec


@settings(max_examples=50, deadline=None)
@given(
    alpha=st.floats(0, 1),
    beta=st.floats(0, exclude_min=True, allow_infinity=False),
    w_clip=st.floats(0, exclude_min=True),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_number_reads_back_to_the_last_bit(alpha: float, beta: float, w_clip: float, weight: float, seed: int):
    spec = make_spec(
        algorithm={"type": "dar", "alpha": alpha, "beta": beta, "w_clip": w_clip},
        rewards=[{"type": "sentiment", "weight": weight}],
        seed=seed,
    )
    assert reread(spec) == spec


@pytest.mark.parametrize("text", ["1e5", "1e-5"])
def test_text_that_looks_like_a_number_reads_back_as_text(text: str):
    spec = make_spec(rewards=[{"type": "regex", "pattern": "a", "name": text}])
    assert reread(spec) == spec


def test_resolved_recipe_spells_out_every_default():
    spec = make_spec()
    written = yaml.safe_load(dump_recipe(spec))
    assert written.keys() == RunSpec.model_fields.keys()
    for part in ("algorithm", "optim", "sampling", "evaluation", "checkpoint", "logging", "runtime"):
        assert written[part] == getattr(spec, part).model_dump(), part
        assert written[part].keys() == type(getattr(spec, part)).model_fields.keys(), part


def test_flattened_recipes_differ_in_the_changed_key_alone():
    before = flatten(make_spec(rewards=["sentiment", {"type": "length", "target": 5}]))
    after = flatten(make_spec(rewards=["sentiment", {"type": "length", "target": 6}]))
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == {"rewards.1.target"}
    assert before["rewards.1.target"] == 5


# --- what nobody writes ----------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join(['*' + 'abcdefghi'[i]] * 10)}]\n" for i in range(9)
)
MERGED_LAUGHS = "a: &a {k: 1}\n" + "".join(
    f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} {{<<: [{', '.join(['*' + 'abcdefghi'[i]] * 10)}]}}\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: 2024-99-99", "'2024-99-99' is no timestamp .*line 1, column 8"),
        ("\nsteps: !!bool maybe", "'maybe' is no bool .*line 2, column 8"),
        ("steps: !!timestamp soon", "'soon' is no timestamp"),
        ("steps: !!int x", "'x' is no int"),
        (f"steps: {'9' * 5000}", "'9{60}…' is no int"),
        (f"steps: 0x{'f' * 500_0}", "is no int"),
        (f"steps: 1{':10' * 50_000}", "is no int"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "[" * 150 + "]" * 150, "line 1 is nested more than 100 deep"),
        ("a: &a [*a]", "an alias in it contains itself"),
        ("a: &a {b: *a}", "an alias in it contains itself"),
        (LAUGHS, "more than 20,000 values"),
        (MERGED_LAUGHS, "more than 20,000 values"),
        ("[" + "a," * 30_000 + "]", "more than 20,000 values"),
        ("? [1, 2]\n: x", "unhashable key"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: *nothing", "undefined alias"),
        ("a: \x1b", "special characters are not allowed"),
    ],
)
def test_every_failure_to_read_yaml_is_one_line(text: str, problem: str):
    with pytest.raises(ConfigError, match=f"^here is not YAML that can be read: .*{problem}") as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_alias_and_a_merge_are_what_they_stand_for():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "here") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


def test_a_merged_mapping_has_no_key_twice():
    text = "outer: {inner: &b {<<: &a {k: 1}, k: 2}}\nc: {<<: *b}"
    assert parse_yaml(text, "here") == {"outer": {"inner": {"k": 2}}, "c": {"k": 2}}


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="/dev/zero holds more than 500,000 bytes"):
        load_recipe("/dev/zero")


def test_override_with_a_value_that_is_none_is_refused_like_a_file(recipe: Path):
    with pytest.raises(ConfigError, match="override 'steps=2024-99-99' is not YAML that can be read: '2024-99-99' is"):
        load_recipe(recipe, ["steps=2024-99-99"])


@pytest.mark.parametrize("key", ["9" * 5000, "²", "-1"])
def test_index_that_is_none_is_refused(recipe: Path, key: str):
    with pytest.raises(ConfigError, match="there is no entry"):
        load_recipe(recipe, [f"rewards.{key}.weight=1"])


def test_override_without_end_is_refused(recipe: Path):
    with pytest.raises(ConfigError, match=r"is not of the form key\.path=value"):
        load_recipe(recipe, ["a." * 30_000 + "a=1"])


def test_of_thousands_of_problems_the_first_are_told(recipe: Path):
    text = RECIPE.replace("[sentiment]", f"[{', '.join(['nothing'] * 5000)}]")
    with pytest.raises(ConfigError) as caught:
        load_text(recipe, text)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == "… and 4,980 more"


@pytest.mark.parametrize("indent", ["", "algorithm:\n"])
def test_of_thousands_of_unknown_keys_the_first_are_told(recipe: Path, indent: str):
    keys = "".join(f"{'  ' if indent else ''}k{number}: 1\n" for number in range(5000))
    with pytest.raises(ConfigError, match=r"unknown key 'k0'.*unknown key 'k19'; allowed: [^;]*; … and 4,980 more$"):
        load_text(recipe, RECIPE + indent + keys)


def test_a_number_python_cannot_print_is_refused():
    with pytest.raises(ConfigError, match="steps: "):
        make_spec(steps=10**5000)
    with pytest.raises(ConfigError, match=r"output_dir: .*found a int"):
        make_spec(output_dir=10**5000)
