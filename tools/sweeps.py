"""Sweeps: an image for each combination of some settings."""

import itertools
from collections.abc import Sequence
from typing import Any

import yaml

from errors import InputError

SWEPT = (
    "base_ratio", "mask_inject_steps", "double_inject_interval", "single_inject_interval",
    "guidance", "steps", "method", "preset", "region_max_sequence_length",
)  # fmt: skip


def swept_settings(sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """The layout keys of each combination of the values in KEY=A,B, KEY=C,D ..."""
    found = {}
    for text in sweeps:
        key, _, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if key not in SWEPT or not values:
            raise InputError("--sweep", text, f"expected one of {', '.join(SWEPT)}, = and values")
        if key in found:
            raise InputError("--sweep", text, "this key is swept twice")
        try:
            found[key] = list(map(yaml.safe_load, values.split(",")))
        except yaml.YAMLError:
            raise InputError("--sweep", text, "its values are not valid YAML") from None
    return [dict(zip(found, values)) for values in itertools.product(*found.values())]
