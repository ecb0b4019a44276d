"""The part of JSON Schema that pydantic writes for records, to hold files against."""

from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "null": type(None),
    "number": (int, float),
    "object": dict,
    "string": str,
}
_UNDERSTOOD = {"$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default",
               "description", "enum", "items", "maxItems", "minItems", "pattern", "prefixItems",
               "properties", "required", "title", "type"}  # fmt: skip


def faults(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """Where `value` is not what a schema says, one line each, by a path such as `$.sites.0`.

    Patterns are not looked at. Raises ValueError for a word of JSON Schema that is not understood.
    """
    return list(_faults(value, schema, schema["$defs"], "$"))


def fields(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every field of every record that a schema describes, as "Record.field", and its schema."""
    records = {"$": schema, **schema["$defs"]}
    for record, inner in records.items():
        for name, field in inner.get("properties", {}).items():
            yield f"{record}.{name}", field


def _faults(value: Any, schema: Mapping[str, Any], defs: Any, at: str) -> Iterator[str]:
    unknown = schema.keys() - _UNDERSTOOD
    if unknown:
        raise ValueError(f"{at}: JSON Schema's {', '.join(sorted(unknown))} is not understood")
    if "$ref" in schema:
        yield from _faults(value, defs[schema["$ref"].removeprefix("#/$defs/")], defs, at)
    if "anyOf" in schema:
        tries = [list(_faults(value, one, defs, at)) for one in schema["anyOf"]]
        yield from min(tries, key=len)
    if "type" in schema:
        wanted = _TYPES[schema["type"]]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            yield f"{at}: {value!r} is no {schema['type']}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']!r}"
    if isinstance(value, dict):
        yield from _in_object(value, schema, defs, at)
    if isinstance(value, list):
        yield from _in_array(value, schema, defs, at)


def _in_object(
    value: dict[str, Any], schema: Mapping[str, Any], defs: Any, at: str
) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{at}: {name} is missing"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, inner in value.items():
        if name in known:
            yield from _faults(inner, known[name], defs, f"{at}.{name}")
        elif others is False:
            yield f"{at}: {name} is not known"
        elif others is not True:
            yield from _faults(inner, others, defs, f"{at}.{name}")


def _in_array(value: list[Any], schema: Mapping[str, Any], defs: Any, at: str) -> Iterator[str]:
    least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
    if not least <= len(value) <= most:
        yield f"{at}: {len(value)} items"
    first = schema.get("prefixItems", [])
    for index, item in enumerate(value):
        inner = first[index] if index < len(first) else schema.get("items", {})
        yield from _faults(item, inner, defs, f"{at}.{index}")
