"""The JSON Schema of a layout file, for editors.

python -m tools.schema > docs/layout.schema.json
"""

from typing import Any, get_type_hints

import msgspec

from regional import layout
from regional.layout import BLOCKS, HEX, PERCENT, SHAPES, Layout

NUMBER = {"type": "number", "minimum": 0, "maximum": 8192}
POSITION = {"anyOf": [NUMBER, {"type": "string", "pattern": f"^{PERCENT}$"}]}
POINT = {"type": "array", "prefixItems": [POSITION] * 2, "minItems": 2, "items": False}
POINTS = {"type": "array", "minItems": 3, "items": POINT}

SIDE = {"integer": {"multipleOf": 16}}
SOME_BLOCKS = {"string": {"pattern": BLOCKS}}

# What the reader checks beyond types, by key and JSON type.
LIMITS = {
    "width": SIDE,
    "height": SIDE,
    "double_blocks": SOME_BLOCKS,
    "single_blocks": SOME_BLOCKS,
    "color": {"string": {"pattern": HEX}},
    "map": {"string": {"minLength": 1}},
    "box": {"array": {"prefixItems": [POSITION] * 4}},
    "ellipse": {"array": {"prefixItems": [POSITION] * 4}},
    "polygon": {"array": {"anyOf": [POINTS, {"items": POINTS}]}},
    "mask": {"string": {"minLength": 1}},
}


def json_schema() -> dict[str, Any]:
    """The structs with descriptions, LIMITS, and which keys need each other; the rest, as files
    or what depends on sizes, is left to the reader."""
    where = "#/$defs/{name}"
    _, parts = msgspec.json.schema_components([Layout], ref_template=where)
    for name, part in parts.items():
        hints = get_type_hints(getattr(layout, name), include_extras=True)
        for key, schema in part["properties"].items():
            schema["description"] = hints[key].__metadata__[-1]
            limits = LIMITS.get(key, {})
            for option in schema.get("anyOf", [schema]):
                option |= limits.get(option.get("type"), {})

    def needs(key: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"required": [key], "properties": {key: schema}}

    parts["Region"]["oneOf"] = [needs(key, {"not": {"type": "null"}}) for key in SHAPES]
    whole = parts.pop("Layout") | {"title": "Regional FLUX layout"}

    def implied(key: str, value: Any, other: str, then: Any) -> dict[str, Any]:
        some = needs("regions", {"contains": needs(key, {"not": value})})
        return {"if": some, "then": needs(other, {"not": then})}

    null = {"type": "null"}
    unset = {"order": 0, "opacity": 1}
    stacked = [implied(k, {"const": x}, "overlap", {"const": "share"}) for k, x in unset.items()]
    whole["allOf"] = [implied("color", null, "map", null), *stacked]
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **whole, "$defs": parts}


if __name__ == "__main__":
    text = msgspec.json.encode(json_schema())
    print(msgspec.json.format(text, indent=2).decode())
