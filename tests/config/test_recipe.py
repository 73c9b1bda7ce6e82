"""Reading recipes: YAML without its surprises, overrides, and a resolved recipe that reads back as itself."""

from __future__ import annotations

import math
import re
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
from dar.config.recipe import RECIPES, dump_recipe, flatten, load_recipe, parse_yaml
from dar.config.regression import DARSpec
from dar.config.rewards import FunctionRewardSpec, LengthRewardSpec, SentimentRewardSpec
from dar.config.run import HubSpec, RunSpec
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
    [
        *(("1e-5", 1e-5), ("1E-5", 1e-5), ("+2e-5", 2e-5), ("1.5e3", 1500.0), ("3.e2", 300.0), ("1e-05", 1e-5)),
        *(("7", 7), ("-1e-1", -0.1), (".inf", math.inf)),
        # Nearly a number.
        *(("e5", "e5"), ("1e", "1e"), ("1e5x", "1e5x"), ("'1e-5'", "1e-5")),
    ],
)
def test_numbers_are_numbers_and_texts_are_texts(text: str, value: Any):
    found = parse_yaml(f"key: {text}", "here")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (RECIPE + "steps: 5\n", r"recipe\.yaml.* has the same key twice: steps"),
        (RECIPE + "algorithm:\n  type: dar\n  alpha: 0.1\n  alpha: 0.2\n",
         "the mapping at line 7 has the same key twice: alpha"),
        *((text, r"recipe\.yaml is not YAML that can be read: ") for text in (
            "model: [", "model: 'open", "a: b: c", "\tsteps: 3", "--- 1\n--- 2\n", "a: !!python/none",
        )),
        *((text, r"recipe\.yaml is not a mapping of keys to values") for text in (
            "", "- steps: 3\n", "steps\n", "# nothing but a comment\n",
        )),
        (b"\xff\xfe\x00model", r"recipe\.yaml: line 1 is not UTF-8 text"),
    ],
)  # fmt: skip
def test_recipe_that_cannot_be_read_is_one_line(recipe: Path, text: str | bytes, problem: str):
    recipe.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_recipe(recipe)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_some_size_is_refused(tmp_path: Path):
    (tmp_path / "mine.yml").touch()
    for path, problem in (
        (tmp_path / "absent.yaml", r"no recipe .*absent\.yaml here\. Name a YAML file, or .*: adaptive_beta, ai_"),
        ("recipes/quickstrt.yaml", r"there is no recipe recipes/quickstrt\.yaml here \(did you mean 'quickstart'\?\)"),
        (tmp_path, r"is a folder\. Name a YAML file, or a recipe"),
        (tmp_path / "mine.yaml", r"here \(did you mean 'mine\.yml'\?\)"),
        ("/dev/zero", "/dev/zero holds more than 500,000 bytes"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_recipe(path)


def test_name_is_a_shipped_recipe_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()  # such as a run of it
    assert load_recipe("toy") == load_recipe(RECIPES / "toy.yaml")
    (tmp_path / "quickstart").write_text(RECIPE)
    assert load_recipe("quickstart").steps == 3


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


def test_overrides_leave_the_file_and_the_later_one_wins(recipe: Path):
    assert load_recipe(recipe, ["steps=7", "steps=8"]).steps == 8
    assert recipe.read_text() == RECIPE


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("output_dir=a=b", lambda spec: spec.output_dir == "a=b"),
        # Values are YAML.
        ("rewards=[{type: length, target: 5}, sentiment]",
         lambda spec: spec.rewards == [LengthRewardSpec(target=5), SentimentRewardSpec()]),
        ("optim.learning_rate=1e-4", lambda spec: spec.optim.learning_rate == 1e-4),
        ("reference=", lambda spec: spec.reference is None),
        # Into a list, and through every shorthand.
        ("rewards.1.target=9", lambda spec: spec.rewards[1] == LengthRewardSpec(target=9)),
        ("rewards.0.weight=2", lambda spec: spec.rewards[0] == SentimentRewardSpec(weight=2.0)),
        ("rewards.2.weight=2", lambda spec: spec.rewards[2] == FunctionRewardSpec(function="pkg.mod:score", weight=2)),
        ("algorithm.alpha=0.5", lambda spec: spec.algorithm == DARSpec(alpha=0.5)),
        ("optim.beta1=0.5", lambda spec: spec.optim == AdamWSpec(beta1=0.5)),
        ("model.lora.rank=4", lambda spec: spec.model.path == "some/model" and spec.model.lora == LoraSpec(rank=4)),
        ("data.wrap_as_user=true", lambda spec: spec.data.train.path == "prompts.jsonl" and spec.data.wrap_as_user),
        ("data.train.max_rows=2",
         lambda spec: (spec.data.train.path, spec.data.train.max_rows) == ("prompts.jsonl", 2)),
        ("reference.revision=main", lambda spec: (spec.reference.path, spec.reference.revision) == ("ref", "main")),
        ("hub.private=false", lambda spec: spec.hub == HubSpec(repository="me/it", private=False)),
        # The mappings on its way are made.
        ("evaluation.every=2", lambda spec: spec.evaluation.every == 2),
        ("data.heldout.path=held.jsonl", lambda spec: spec.data.heldout.path == "held.jsonl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("algorithm", ["algorithm: dar\n", ""])
def test_override_replaces_what_it_names(recipe: Path, override: str, check: Any, algorithm: str):
    text = RECIPE.replace("[sentiment]", "[sentiment, {type: length, target: 5}, 'pkg.mod:score']")
    assert check(load_text(recipe, text + algorithm + "optim: adamw\nreference: ref\nhub: me/it\n", override))


def test_override_goes_through_one_shorthand_inside_another(recipe: Path):
    spec = load_recipe(recipe, ["optim.null_space=general.jsonl", "optim.null_space.data.max_rows=2"])
    assert spec.optim.null_space is not None
    assert (spec.optim.null_space.data.path, spec.optim.null_space.data.max_rows) == ("general.jsonl", 2)


NOT_OF_THE_FORM = r"is not of the form key\.path=value"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *((text, rf"^override '{re.escape(text)}' {NOT_OF_THE_FORM}") for text in (
            "=3", ".steps=3", "algorithm..alpha=1", "steps.=1", "",
        )),
        ("a." * 30_000 + "a=1", NOT_OF_THE_FORM),
        ("steps: 5", "'steps: 5' is not of the form key.path=value, such as steps=3$"),
        ("steps=[", r"override 'steps=\[' is not YAML that can be read: "),
        ("steps=2024-99-99", "override 'steps=2024-99-99' is not YAML that can be read: '2024-99-99' is"),
        ("steps.x=1", "^override 'steps.x=1': steps is 3 and has no keys$"),
        ("output_dir.x=1", "^override 'output_dir.x=1': output_dir is 'run' and has no keys$"),
        *((f"rewards.{key}={value}", f"^override 'rewards.{key}={value}': there is no entry '{entry}' in a list of 1$")
          for key, value, entry in (
              ("5.weight", 2, "5"), ("1", "sentiment", "1"), ("first", "sentiment", "first"), ("-1.weight", 2, "-1"),
              ("²", "sentiment", "²"),
          )),
        (f"rewards.{'9' * 5000}.weight=1", "there is no entry"),
        ("optim.learning_rat=1", r"optim: unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("rewards.0=length", r"rewards\.0\.target: this key is required"),
    ],
)  # fmt: skip
def test_override_that_leads_nowhere_says_where_it_stopped(recipe: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [override])


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
        "rewards": [
            {"type": "regex", "pattern": text, "name": text}
            for text in ("null", "12:30", "0x1F", "~", "1.5", "1e5", "1e-5")
        ],
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
    with pytest.raises(ConfigError, match=r"unknown keys 'k0', .*, 'k19', … and 4,980 more; allowed: [^;]*$"):
        load_text(recipe, RECIPE + indent + keys)


def test_a_number_python_cannot_print_is_refused():
    with pytest.raises(ConfigError, match="steps: "):
        make_spec(steps=10**5000)
    with pytest.raises(ConfigError, match=r"output_dir: .*found a int"):
        make_spec(output_dir=10**5000)
