"""JSON schemas that xgrammar holds to, word for word (vLLM: `has_xgrammar_unsupported_json_features`).

xgrammar turns a schema into a grammar and passes over what it does not know. So every keyword is looked at here, and
what would be ignored is refused by its name and place. Three things are added, each of which only narrows the schema:

- constraints without a `type` imply it (`minLength`: a string), as nobody means otherwise;
- an object without a word about its properties may have any, an array without `items` any; else objects have the
  properties that are named, in that order, and no others unless `additionalProperties` allows them;
- patterns are read as those of the whole string (`regex`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from folovllm.structured_output.regex import normalize_regex

MAX_DEPTH = 64
"""Schemas inside schemas."""
MAX_MULTIPLE_OF = 1024
"""xgrammar counts remainders with one rule each, up to here."""
MAX_ONE_OF = 256
"""Schemas in a oneOf: each is compared with all others."""
# Their form is held to, not the calendar: a date may be the 31st of April.
FORMATS = {
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    *("uri-reference", "uri-template"),
}
EMAIL = r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]+(-[A-Za-z0-9]+)*(\.[A-Za-z0-9]+(-[A-Za-z0-9]+)*)+"
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
    *("discriminator", "$defs", "definitions"),
}
_NUMBER = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_KEYWORDS: dict[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": _NUMBER,
    "integer": _NUMBER,
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "object": {
        *("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
        *("patternProperties", "propertyNames"),
    },
    "boolean": set(),
    "null": set(),
}
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_CHOICES = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")
# Keywords that xgrammar cannot hold together: with the first it forgets the others.
_ALONE = {
    "pattern": {"minLength", "maxLength", "format"},
    "format": {"minLength", "maxLength"},
    "multipleOf": _NUMBER - {"multipleOf"},
    "patternProperties": _KEYWORDS["object"] - {"patternProperties"},
    "propertyNames": _KEYWORDS["object"] - {"propertyNames"},
}


class _Checker:
    """Walks a schema once and returns what xgrammar is to be given."""

    def __init__(self) -> None:
        # JSON pointer -> the narrowed schema there.
        self.seen: dict[str, Any] = {}
        self.refs: list[tuple[str, str]] = []
        self.one_ofs: list[tuple[str, list[Any]]] = []

    def fail(self, path: str, what: str) -> ValueError:
        return ValueError(f"json schema at {path}: {what}")

    def check(self, schema: Any, path: str, depth: int = 0) -> Any:
        """Return the narrowed form of the schema at `path`, a JSON pointer that starts with #."""
        self.seen[path] = self._check(schema, path, depth)
        return self.seen[path]

    def _check(self, schema: Any, path: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self.fail(path, f"{schema!r:.80} must be an object, true or false.")
        if depth > MAX_DEPTH:
            raise self.fail(path, f"schemas may be nested {MAX_DEPTH} deep; use $defs and $ref.")
        known = _ANNOTATIONS | set(_CHOICES) | {"type"} | set().union(*_KEYWORDS.values())
        if depth == 0:
            known.add("$id")
        for key in schema:
            if key not in known:
                raise self.fail(path, f"{key!r} is not supported: the output could not be held to it. Remove it.")
        result = {key: value for key, value in schema.items() if key not in _ANNOTATIONS and key != "$id"}
        for key in ("$defs", "definitions"):
            if key in schema:
                result[key] = self._check_map(schema[key], f"{path}/{key}", depth)
        choices = [key for key in _CHOICES if key in schema]
        if choices:
            return self._check_choice(choices[0], result, path, depth)
        return self._check_typed(result, path, depth)

    def _check_map(self, value: Any, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(path, f"{value!r:.80} must be an object of schemas.")
        return {name: self.check(item, f"{path}/{name}", depth + 1) for name, item in value.items()}

    def _check_list(self, value: Any, path: str, depth: int) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.fail(path, f"{value!r:.80} must be a non-empty list of schemas.")
        return [self.check(item, f"{path}/{i}", depth + 1) for i, item in enumerate(value)]

    def _check_choice(self, key: str, schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """A schema that is another one, or one of several, and nothing else."""
        allowed = {key, "$defs", "definitions"} | ({"type"} if key in ("enum", "const") else set())
        others = sorted(set(schema) - allowed)
        if others:
            raise self.fail(path, f"{others[0]!r} beside {key!r} is not supported: move it inside, or remove it.")
        value = schema[key]
        if key == "$ref":
            if not isinstance(value, str) or not value.startswith("#"):
                raise self.fail(path, f"$ref={value!r:.80} must point into this schema: #/$defs/...")
            self.refs.append((path, value))
        elif key in ("enum", "const"):
            self._check_literals(value if key == "enum" else [value], schema, path)
            schema = {name: item for name, item in schema.items() if name != "type"}
        else:
            if key == "allOf" and isinstance(value, list) and len(value) > 1:
                raise self.fail(path, "'allOf' with more than one schema is not supported: merge them.")
            if key == "oneOf" and isinstance(value, list) and len(value) > MAX_ONE_OF:
                raise self.fail(path, f"'oneOf' has {len(value)} schemas, at most {MAX_ONE_OF} may be: use anyOf.")
            schema = {**schema, key: self._check_list(value, f"{path}/{key}", depth)}
            if key == "oneOf":  # once it is known that no two of them can match
                self.one_ofs.append((path, schema["oneOf"]))
                schema["anyOf"] = schema.pop("oneOf")
        return schema

    def _check_literals(self, values: Any, schema: dict[str, Any], path: str) -> None:
        if not isinstance(values, list) or not values:
            raise self.fail(path, f"enum={values!r:.80} must be a non-empty list.")
        for value in values:
            if "type" in schema and not any(_has_type(value, name) for name in self._types(schema, path)):
                raise self.fail(path, f"{value!r:.80} is not of type {schema['type']!r}; remove one of them.")

    def finish(self) -> None:
        """Check what needs the whole schema: that references lead somewhere, and that of oneOf only one can match."""
        for path, target in self.refs:
            if target not in self.seen:
                raise self.fail(path, f"$ref={target!r:.80} points to no schema in it.")
        for path, branches in self.one_ofs:
            facts = [_Facts.of(self._resolve(branch)) for branch in branches]
            if any(not _disjoint(one, other) for i, one in enumerate(facts) for other in facts[:i]):
                raise self.fail(
                    path, "'oneOf' needs schemas that differ in type or in a required constant property: use anyOf."
                )

    def _resolve(self, schema: Any) -> Any:
        """Return what a chain of references leads to; a circle ends where it is noticed."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self.seen[schema["$ref"]]
        return schema

    def _types(self, schema: dict[str, Any], path: str) -> list[str]:
        """Return the types that the schema allows, named or implied; [] for any."""
        if "type" not in schema:
            kinds = ("string", "number", "array", "object")
            return [kind for kind in kinds if _KEYWORDS[kind] & set(schema)]
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not types or any(not isinstance(name, str) or name not in _KEYWORDS for name in types):
            raise self.fail(path, f"type={schema['type']!r:.80} must be of {', '.join(_KEYWORDS)}.")
        return types

    def _check_typed(self, schema: dict[str, Any], path: str, depth: int) -> Any:
        types = self._types(schema, path)
        constraints = set(schema) - {"type", "$defs", "definitions"}
        stray = sorted(constraints - set().union(*(_KEYWORDS[name] for name in types)))
        if stray:
            raise self.fail(path, f"{stray[0]!r} says nothing about type {schema['type']!r}; remove it.")
        if not types:
            return schema
        for key, others in _ALONE.items():
            if key in schema and others & constraints:
                raise self.fail(path, f"{key!r} with {min(others & constraints)!r} is not supported: keep one of them.")
        schema = {**schema, "type": types if len(types) > 1 else types[0]}
        for key in sorted(_COUNTS & constraints):
            if not isinstance(schema[key], int) or isinstance(schema[key], bool) or schema[key] < 0:
                raise self.fail(path, f"{key}={schema[key]!r:.80} must be an int of at least 0.")
        checks: dict[str, Callable[[dict[str, Any], str, int], None]] = {
            "string": self._check_string,
            "number": self._check_number,
            "integer": self._check_number,
            "array": self._check_array,
            "object": self._check_object,
        }
        for name in types:
            if name in checks:
                checks[name](schema, path, depth)
        return schema

    # Each changes its schema, a copy, in place.

    def _check_string(self, schema: dict[str, Any], path: str, depth: int) -> None:
        if "format" in schema and schema["format"] not in FORMATS:
            raise self.fail(
                path, f"format={schema['format']!r:.80} is not supported; known: {', '.join(sorted(FORMATS))}."
            )
        if "pattern" in schema:
            schema["pattern"] = self._pattern(schema["pattern"], path)
        if schema.get("format") == "email":
            # xgrammar's own form of it has quoted names, with backslashes that JSON does not know.
            del schema["format"]
            schema["pattern"] = EMAIL

    def _pattern(self, pattern: Any, path: str) -> str:
        if not isinstance(pattern, str):
            raise self.fail(path, f"pattern {pattern!r:.80} must be a string.")
        try:
            return normalize_regex(pattern, in_json=True)
        except ValueError as error:
            raise self.fail(path, str(error)) from error

    def _check_number(self, schema: dict[str, Any], path: str, depth: int) -> None:
        for key in _NUMBER & set(schema):
            if not isinstance(schema[key], (int, float)) or isinstance(schema[key], bool):
                raise self.fail(path, f"{key}={schema[key]!r:.80} must be a number.")
        step = schema.get("multipleOf")
        whole = schema["type"] == "integer" and isinstance(step, int) and 0 < step <= MAX_MULTIPLE_OF
        if step is not None and not whole:
            raise self.fail(
                path, f"multipleOf={step!r} is supported for type integer only, and whole from 1 to {MAX_MULTIPLE_OF}."
            )

    def _check_array(self, schema: dict[str, Any], path: str, depth: int) -> None:
        if schema.pop("uniqueItems", False):
            raise self.fail(path, "'uniqueItems' is not supported: the output could not be held to it. Remove it.")
        if "prefixItems" in schema:
            schema["prefixItems"] = self._check_list(schema["prefixItems"], f"{path}/prefixItems", depth)
        if "items" in schema:
            schema["items"] = self.check(schema["items"], f"{path}/items", depth + 1)
        elif "prefixItems" not in schema:
            schema["items"] = True

    def _check_object(self, schema: dict[str, Any], path: str, depth: int) -> None:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if "properties" in schema:
            schema["properties"] = self._check_map(properties, f"{path}/properties", depth)
        if not isinstance(required, list) or any(not isinstance(name, str) for name in required):
            raise self.fail(path, f"required={required!r:.80} must be a list of property names.")
        missing = [name for name in required if name not in properties]
        if missing:
            raise self.fail(path, f"required names {missing[0]!r:.80}, which is not in 'properties': add it there.")
        if "patternProperties" in schema:
            patterns = self._check_map(schema["patternProperties"], f"{path}/patternProperties", depth)
            schema["patternProperties"] = {self._pattern(key, path): value for key, value in patterns.items()}
            if len(patterns) > 1:
                raise self.fail(path, "'patternProperties' with more than one pattern is not supported.")
        for key in ("additionalProperties", "propertyNames"):
            if key in schema:
                schema[key] = self.check(schema[key], f"{path}/{key}", depth + 1)
        if not {"properties", "additionalProperties", "patternProperties", "propertyNames"} & set(schema):
            schema["additionalProperties"] = True


def _has_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return not isinstance(value, bool) and (whole or (name == "number" and isinstance(value, float)))
    kinds: dict[str, type | tuple[type, ...]] = {
        "string": str,
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    return isinstance(value, kinds[name])


def _literals(schema: Any) -> frozenset[str] | None:
    """Return the JSON texts of all values that the schema allows; None if they are not listed."""
    if not isinstance(schema, dict) or ("enum" not in schema and "const" not in schema):
        return None
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    return frozenset(json.dumps(value, sort_keys=True) for value in values)


def _type_names(schema: Any) -> set[str] | None:
    """Return the types that the schema allows, integers as numbers; None if that is not plain to see."""
    if not isinstance(schema, dict):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return {name for name in _KEYWORDS if name != "integer" for value in values if _has_type(value, name)}
    if "type" not in schema:
        return None
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {"number" if name == "integer" else name for name in names}


class _Facts(NamedTuple):
    """What tells one schema of a oneOf from another."""

    types: set[str] | None
    """See _type_names."""
    literals: frozenset[str] | None
    """See _literals."""
    properties: dict[str, frozenset[str]]
    """Of an object: required properties whose values are listed, with these."""

    @staticmethod
    def of(schema: Any) -> _Facts:
        types = _type_names(schema)
        listed: dict[str, frozenset[str] | None] = {}
        if types == {"object"}:
            listed = {name: _literals(schema["properties"][name]) for name in schema.get("required", ())}
        properties = {name: values for name, values in listed.items() if values is not None}
        return _Facts(types, _literals(schema), properties)


def _disjoint(one: _Facts, other: _Facts) -> bool:
    """Whether nothing is of both."""
    if one.types is not None and other.types is not None and one.types.isdisjoint(other.types):
        return True
    if one.literals is not None and other.literals is not None:
        return one.literals.isdisjoint(other.literals)
    return any(
        name in other.properties and values.isdisjoint(other.properties[name])
        for name, values in one.properties.items()
    )


def normalize_json_schema(schema: str | dict[str, Any]) -> str:
    """Return the schema, narrowed as the module's docstring says, as JSON text; its properties keep their order.

    Raises:
        ValueError: no JSON, no schema, or something that the output could not be held to, named with its place.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        checker = _Checker()
        checked = checker.check(value, "#")
        checker.finish()
        return json.dumps(checked, ensure_ascii=False, separators=(",", ":"))
    except RecursionError as error:
        raise ValueError(f"json schema: nested too deeply; at most {MAX_DEPTH} schemas inside schemas.") from error
    except (TypeError, OverflowError) as error:
        raise ValueError(f"json schema: {error}; give plain JSON values.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"json schema: not JSON: {error}.") from error
