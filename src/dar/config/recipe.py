"""Reading recipes: YAML plus dotted overrides in, a `RunSpec` or one clear `ConfigError` out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import ValidationError

from dar.config.base import Spec, specs_in
from dar.config.control import ControlSpec
from dar.config.problems import explain, quoted
from dar.config.reward_model import RewardModelSpec
from dar.config.rewards import expand_reward
from dar.config.run import RunSpec
from dar.errors import ConfigError, DataError
from dar.files.hints import nearest_hint
from dar.files.intake import read_text
from dar.files.paths import expanded
from dar.shown import one_line

MAX_YAML_BYTES = 500_000
_MOST_VALUES, _DEEPEST = 20_000, 100


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; what its constructors make of a text that is none of theirs gets its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag.endswith((":int", ":float")) and len(node.value) > _DEEPEST:
                raise ValueError
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            problem = f"{one_line(str(node.value), 60)!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """Knows what the loader takes for a number, and quotes text that looks like one."""


# YAML 1.1 reads 1e-5 as a string, because it has no dot; everybody means a number.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


RECIPES = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the library; the name of one is its file's, without the ending."""
RecipeSpec = TypeVar("RecipeSpec", bound=Spec)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, kind: type[RecipeSpec] = RunSpec) -> RecipeSpec:
    """Reads a recipe file and applies `key.path=value` overrides.

    Args:
        path: a YAML file, or the name of a shipped recipe.
        overrides: for example `["algorithm.alpha=0.5", "rewards.0.weight=2"]`; values are YAML.
        kind: what it is a recipe of.

    Raises:
        ConfigError: the file is missing or not YAML, an override is malformed, or a key is unknown, of the wrong type
            or impossible; the message has the key's path, what was found and what is allowed.
    """
    path = recipe_file(path)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"the recipe {path} is not a mapping of keys to values")
    for override in overrides:
        apply_override(raw, override)
    try:
        return build_spec(raw, where=str(path), kind=kind)
    except ConfigError as error:
        commands = {RunSpec: "dar train", RewardModelSpec: "dar reward-model", ControlSpec: "dar control"}
        fit = min(commands, key=lambda each: len(raw.keys() - each.model_fields.keys()))
        if kind in commands and raw.keys() - fit.model_fields.keys() < raw.keys() - kind.model_fields.keys():
            raise ConfigError(f"{path} is a recipe of another kind: it is for {commands[fit]}") from error
        raise


def build_spec(raw: Mapping[str, Any], *, where: str, kind: type[RecipeSpec] = RunSpec) -> RecipeSpec:
    """A recipe's spec from plain data.

    Raises:
        ConfigError: every problem at once, one line each, with the path of the key.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in explain(error, raw))
        raise ConfigError(f"{where} cannot be run as written:\n{problems}") from error


def recipe_file(name: str | Path) -> Path:
    """The file of that name, or else the shipped recipe. Raises ConfigError where there is neither."""
    file = Path(expanded(name))
    names = sorted(each.stem for each in RECIPES.glob("*.yaml"))
    # A folder of a recipe's name may well be a run of it.
    if os.path.exists(file) and not os.path.isdir(file):
        return file
    if str(name) in names:
        return RECIPES / f"{name}.yaml"
    if (file / "config.yaml").is_file():
        raise ConfigError(
            f"{name} is a run folder, and its recipe is {file / 'config.yaml'}; the run goes on with the recipe it was "
            "started with and --resume"
        )
    what = f"{name} is a folder" if os.path.isdir(file) else f"there is no recipe {name} here"
    hint = nearest_hint(file.name, [each.name for each in file.parent.glob("*.y*ml")]) or nearest_hint(file.stem, names)
    raise ConfigError(
        f"{what}{hint}. Name a YAML file, or a recipe that dar brings along: {', '.join(names)}. "
        "dar init FOLDER writes one of your own."
    )


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Applies one `key.path=value` to plain data, in place.

    A shorthand on the way is expanded: with `algorithm: dar`, `algorithm.alpha=0.5` gives `{type: dar, alpha: 0.5}`.

    Raises:
        ConfigError: no `=`, the value is not YAML, or the path runs through something that has no keys.
    """
    key_path, separator, text = override.partition("=")
    override = one_line(override)
    keys = key_path.strip().split(".")
    if not separator or not all(keys) or len(keys) > _DEEPEST:
        raise ConfigError(f"override '{override}' is not of the form key.path=value, such as steps=3")
    value = parse_yaml(text, f"override '{override}'")
    target: Any = raw
    for depth, key in enumerate(keys[:-1]):
        child = _child(target, key, override)
        if isinstance(child, str):
            here = ".".join(keys[: depth + 1])
            if re.fullmatch(r"(evaluation\.)?rewards\.\d+", here):
                child = expand_reward(child)
            elif re.fullmatch(r"alerts\.\d+", here):
                child = {"type": child}
            elif here in _SHORTHANDS:
                child = {_SHORTHANDS[here]: child}
        elif child is None:
            child = {}
        if not isinstance(child, dict | list):
            raise ConfigError(
                f"override '{override}': {'.'.join(keys[: depth + 1])} is {quoted(child)} and has no keys"
            )
        _set(target, key, child)
        target = child
    _child(target, keys[-1], override)
    _set(target, keys[-1], value)


def _shorthands(spec: type[Spec], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys whose value may be written as a string, and the key below it that the string is of."""
    for name, field in spec.model_fields.items():
        for child in () if get_origin(field.annotation) is list else specs_in(field.annotation):
            if child.shorthand:
                yield f"{prefix}{name}", child.shorthand
            yield from _shorthands(child, f"{prefix}{name}.")


_BY_TYPE = dict.fromkeys(("engine", "data.train.format", "data.heldout.format"), "type")
_SHORTHANDS = _BY_TYPE | dict(_shorthands(RunSpec))


def dump_recipe(spec: Spec) -> str:
    """The spec as YAML, every default written out; `load_recipe` reads it back to an equal spec."""
    return yaml.dump(spec.model_dump(mode="python"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flatten(spec: Spec) -> dict[str, Any]:
    """{dotted key: value} of every leaf, for comparing two recipes."""
    return dict(_leaves("", spec.model_dump(mode="python")))


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, child in value.items() for leaf in _leaves(f"{prefix}.{key}" if prefix else key, child)]
    if isinstance(value, list) and value:
        return [leaf for index, child in enumerate(value) for leaf in _leaves(f"{prefix}.{index}", child)]
    return [(prefix, value)]


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML (or JSON) file.

    Raises:
        ConfigError: it cannot be read, or as `parse_yaml`.
    """
    try:
        return parse_yaml(read_text(Path(expanded(path)), max_bytes=MAX_YAML_BYTES), str(path))
    except DataError as error:
        raise ConfigError(str(error)) from error


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, in bounded time and memory.

    Raises:
        ConfigError: it is not YAML, has a key twice, is too deep or, its aliases written out, too long.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root)
        return loader.construct_document(root)
    except (ConfigError, RecursionError, yaml.YAMLError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error), 600)
        raise ConfigError(f"{where} is not YAML that can be read: {problem}") from error


def _check(root: yaml.Node) -> None:
    """Raises ConfigError where a key stands twice, or there is too much; an alias counts wherever it is used."""
    todo, num_values = [(root, 1)], 0
    while todo:
        node, depth = todo.pop()
        num_values += 1
        line = node.start_mark.line + 1
        if num_values > _MOST_VALUES:
            raise ConfigError(f"more than {_MOST_VALUES:,} values, those of an alias counted wherever it is used")
        if depth > _DEEPEST:
            raise ConfigError(f"line {line} is nested more than {_DEEPEST} deep, or an alias in it contains itself")
        if isinstance(node, yaml.MappingNode):
            keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if repeated := sorted(key for (_, key), count in keys.items() if count > 1):
                raise ConfigError(f"the mapping at line {line} has the same key twice: {one_line(', '.join(repeated))}")
            todo += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(part, depth + 1) for part in node.value]


def _child(target: Any, key: str, override: str) -> Any:
    if isinstance(target, list):
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(target):
            raise ConfigError(f"override '{override}': there is no entry '{key}' in a list of {len(target)}")
        return target[int(key)]
    return target.get(key)


def _set(target: Any, key: str, value: Any) -> None:
    target[int(key) if isinstance(target, list) else key] = value
