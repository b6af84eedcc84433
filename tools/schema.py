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

# What the reader checks beyond types, by key and JSON type.
LIMITS = {
    "width": {"integer": {"multipleOf": 16}},
    "height": {"integer": {"multipleOf": 16}},
    "double_blocks": {"string": {"pattern": BLOCKS}},
    "single_blocks": {"string": {"pattern": BLOCKS}},
    "color": {"string": {"pattern": HEX}},
    "map": {"string": {"minLength": 1}},
    "box": {"array": {"prefixItems": [POSITION] * 4}},
    "polygon": {"array": {"anyOf": [POINTS, {"items": POINTS}]}},
    "mask": {"string": {"minLength": 1}},
}


def json_schema() -> dict[str, Any]:
    """The structs with their descriptions, LIMITS, and which keys need each other. Sizes that
    depend on each other and files that a layout names are left to the reader."""
    _, parts = msgspec.json.schema_components([Layout], ref_template="#/$defs/{name}")
    for name, part in parts.items():
        hints = get_type_hints(getattr(layout, name), include_extras=True)
        for key, schema in part["properties"].items():
            schema["description"] = hints[key].__metadata__[-1]
            for option in schema.get("anyOf", [schema]):
                option |= LIMITS.get(key, {}).get(option.get("type"), {})

    def has(key: str) -> dict[str, Any]:
        return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}

    parts["Region"]["oneOf"] = [has(key) for key in SHAPES]
    colored = {"required": ["regions"], "properties": {"regions": {"contains": has("color")}}}
    whole = parts.pop("Layout") | {"title": "Regional FLUX layout"}
    whole |= {"if": colored, "then": has("map")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": parts}


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode())
