"""A recipe as a JSON Schema, shorthands included: for editors, and for completion on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dar.config.base import OwnSpec, Spec, specs_below


def recipe_schema(kind: type[Spec]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe; what several keys demand of each other is not in it."""
    schema = kind.model_json_schema()
    found = schema["$defs"]
    for spec in specs_below(Spec):
        if issubclass(spec, OwnSpec) and spec.__name__ in found:
            found[spec.__name__]["properties"]["type"]["pattern"] = ":"
        elif spec.shorthand not in (None, "type") and spec.__name__ in found:
            found[spec.__name__] = {"anyOf": [{"type": "string"}, found[spec.__name__]]}
    _allow_names(schema, schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def allowed(schema: dict[str, Any], path: list[str]) -> tuple[dict[str, bool], list[str]]:
    """What a recipe may have at a path such as `[algorithm, type]`: keys, and whether each has keys in turn; values."""
    here = list(_alternatives(schema, schema))
    for key in path:
        children = [
            part.get("properties", {}).get(key) or (part.get("items") if key.isdigit() else None) for part in here
        ]
        here = [part for child in children if child for part in _alternatives(schema, child)]
    keys = {
        name: any("properties" in part or "items" in part for part in _alternatives(schema, value))
        for part in here
        for name, value in part.get("properties", {}).items()
    }
    values = [value for part in here for value in part.get("enum", [part["const"]] if "const" in part else [])]
    values += [value for part in here if part.get("type") == "boolean" for value in ("true", "false")]
    return keys, list(dict.fromkeys(map(str, values)))


def _allow_names(schema: dict[str, Any], node: Any) -> None:
    """Where specs are told apart by `type`, its value alone will do, or the import path of one's own."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _allow_names(schema, child)
    if isinstance(node, dict) and "oneOf" in node:
        # One without its `type` fits several, and the first of them is meant.
        node["anyOf"] = node.pop("oneOf")
        node.pop("discriminator", None)
        types = [part.get("properties", {}).get("type", {}) for part in _alternatives(schema, node)]
        names = [each["const"] for each in types if "const" in each]
        node["anyOf"] += [{"enum": names}, {"type": "string", "pattern": ":"}]


def _alternatives(schema: dict[str, Any], node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    yield node
    for each in node.get("anyOf", ()):
        yield from _alternatives(schema, each)
