"""Sweeps: an image for each combination of some settings, and a contact sheet of them all."""

import itertools
from collections.abc import Sequence
from typing import Any

import yaml

from errors import InputError, info, parse_yaml
from tools.sheets import contact_sheet
from tools.writing import write

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
            found[key] = [parse_yaml(x, yaml.SafeLoader, "") for x in values.split(",")]
        except InputError:
            raise InputError("--sweep", text, "its values are not valid YAML") from None
    return [dict(zip(found, values)) for values in itertools.product(*found.values())]


def write_sheets(jobs: list[Any], workers: int) -> None:
    """The contact sheet of each sweep: a column for each value of the last key, a row for each
    combination of the others and the seed. jobs: tools.jobs.Job."""
    if workers > 1:
        info("no sheet is made of a sweep that several workers share")
        return
    has_seeds = len({job.seed for job in jobs}) > 1
    for path in dict.fromkeys(job.sheet for job in jobs):
        rows = {}
        for job in jobs:
            if job.sheet != path:
                continue
            *others, column = job.sweep
            label = ", ".join([*others, *[f"seed {job.seed}"] * has_seeds])
            rows.setdefault(label, {})[column] = job.files["image"]
        images = {label: list(row.values()) for label, row in rows.items()}
        columns = list(next(iter(rows.values())))
        write(path, contact_sheet(images, columns).save)
        print(path)
