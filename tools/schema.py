"""The JSON Schema of a layout file, for editors.

python -m tools.schema > docs/layout.schema.json
"""

import re
from typing import Any

import msgspec

from regional.layout import BLOCK_RANGE, MAX_REGIONS, MODES, SHAPES, Layout

PERCENT = r"^0{0,6}(100(\.0{1,20})?|[0-9]{1,2}(\.[0-9]{1,20})?)%$"  # a SHARE of at most all


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a layout file, for editors: the dataclasses, what their docstrings say of each key, and as
    much of `check` as a schema can say. Sizes that depend on each other and files that it names are left to the reader.
    """
    _, parts = msgspec.json.schema_components([Layout], ref_template="#/$defs/{name}")
    count_or_share = {"integer": {"minimum": 0}, "string": {"pattern": PERCENT}}
    blocks = {"string": {"pattern": rf"^(\s*every\s+[1-9][0-9]{{0,8}}\s*|{BLOCK_RANGE}(,{BLOCK_RANGE})*)$"}}
    position = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 8192}, {"type": "string", "pattern": PERCENT}]}
    points = {"type": "array", "minItems": 3, "items": {"type": "array", "prefixItems": [position] * 2, "minItems": 2}}
    points["items"]["items"] = False  # as all beyond prefixItems
    narrower = {
        "Layout": {
            "width": {"integer": {"multipleOf": 16}},
            "height": {"integer": {"multipleOf": 16}},
            "mask_inject_steps": count_or_share,
            "double_blocks": blocks,
            "single_blocks": blocks,
            "region_max_sequence_length": {"string": {"pattern": f"(?!^[0.]*%){PERCENT}"}},
            "map": {"string": {"minLength": 1}},
            "regions": {"array": {"maxItems": MAX_REGIONS}},
        },
        "Region": {
            "prompt": {"string": {"pattern": r"\S"}},
            "box": {"array": {"prefixItems": [position] * 4}},
            "polygon": {"array": {"anyOf": [points, {"items": points}]}},
            "mask": {"string": {"minLength": 1}},
            "color": {
                "integer": {"minimum": 0, "maximum": 2**24 - 1},
                "string": {"pattern": "^#[0-9a-fA-F]{6}$"},
                "array": {"prefixItems": [{"type": "integer", "minimum": 0, "maximum": 255}] * 3},
            },
            "mask_inject_steps": count_or_share,
        },
        "Control": {"mode": {"string": {"enum": list(MODES)}}},
    }
    for name, part in parts.items():
        keys = part["properties"]
        names = f"(?:{'|'.join(keys)})"
        part["description"], *about = re.split(rf" ?\b({names}(?:, {names})*): ", " ".join(part["description"].split()))
        for said, meaning in zip(about[::2], about[1::2]):
            for key in said.split(", "):
                keys[key]["description"] = meaning
        for key, limits in narrower.get(name, {}).items():
            for option in keys[key].get("anyOf", [keys[key]]):
                option.update(limits.get(option.get("type"), {}))
    given = {key: {"required": [key], "properties": {key: {"not": {"type": "null"}}}} for key in SHAPES + ("map",)}
    parts["Region"]["oneOf"] = [given[key] for key in SHAPES]
    colored = {"required": ["regions"], "properties": {"regions": {"contains": given["color"]}}}
    layout = {**parts.pop("Layout"), "title": "Regional FLUX layout", "if": colored, "then": given["map"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **layout, "$defs": parts}


if __name__ == "__main__":  # python -m tools.schema > docs/layout.schema.json
    print(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode())
