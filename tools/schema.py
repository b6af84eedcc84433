"""The JSON Schema of a layout file, for editors.

python -m tools.schema > docs/layout.schema.json
"""

from typing import Any

import msgspec

from regional.layout import BLOCKS, HEX, PERCENT, SHAPES, Layout

NUMBER = {"type": "number", "minimum": 0, "maximum": 8192}
POSITION = {"anyOf": [NUMBER, {"type": "string", "pattern": f"^{PERCENT}$"}]}
POINT = {"type": "array", "prefixItems": [POSITION] * 2, "minItems": 2, "items": False}
POINTS = {"type": "array", "minItems": 3, "items": POINT}
BYTE = {"type": "integer", "minimum": 0, "maximum": 255}

# What the reader checks beyond types, by struct, key and JSON type.
LIMITS = {
    "Layout": {
        "width": {"integer": {"multipleOf": 16}},
        "height": {"integer": {"multipleOf": 16}},
        "double_blocks": {"string": {"pattern": BLOCKS}},
        "single_blocks": {"string": {"pattern": BLOCKS}},
        "map": {"string": {"minLength": 1}},
    },
    "Region": {
        "box": {"array": {"prefixItems": [POSITION] * 4}},
        "polygon": {"array": {"anyOf": [POINTS, {"items": POINTS}]}},
        "mask": {"string": {"minLength": 1}},
        "color": {
            "integer": {"minimum": 0, "maximum": 2**24 - 1},
            "string": {"pattern": HEX},
            "array": {"prefixItems": [BYTE] * 3},
        },
    },
}


def json_schema() -> dict[str, Any]:
    """The structs with their descriptions, LIMITS, and which keys need each other. Sizes that
    depend on each other and files that a layout names are left to the reader."""
    _, parts = msgspec.json.schema_components([Layout], ref_template="#/$defs/{name}")
    for name, keys in LIMITS.items():
        for key, limits in keys.items():
            schema = parts[name]["properties"][key]
            for option in schema.get("anyOf", [schema]):
                option.update(limits.get(option.get("type"), {}))

    def has(key: str) -> dict[str, Any]:
        return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}

    parts["Region"]["oneOf"] = [has(key) for key in SHAPES]
    colored = {"required": ["regions"], "properties": {"regions": {"contains": has("color")}}}
    layout = parts.pop("Layout") | {"title": "Regional FLUX layout"}
    layout |= {"if": colored, "then": has("map")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **layout, "$defs": parts}


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode())
