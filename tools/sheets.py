"""Sweeps, and contact sheets of them and of attention maps: images in labeled rows and columns."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from errors import InputError, info, opened_image, parse_yaml, shown
from tools.metadata import ANY_SIZE, Metadata, save_image, save_sheet, save_tensor

GAP = 8  # pixels between images
LINE = 18  # the height of a line of text
SWEPT = (
    "base_ratio", "mask_inject_steps", "double_inject_interval", "single_inject_interval",
    "guidance", "true_cfg_scale", "steps", "method", "preset", "region_max_sequence_length",
    "sampler", "schedule",
)  # fmt: skip


def swept_settings(sweeps: Sequence[str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The layout keys of each combination of KEY=A,B, KEY=C,D ..., by its labels, key=value."""
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
    swept = [dict(zip(found, values)) for values in itertools.product(*found.values())]
    return {tuple(f"{key}={value}" for key, value in keys.items()): keys for keys in swept}


def contact_sheet(
    rows: dict[str, list[Image.Image | Path]], columns: list[str] = ()
) -> Image.Image:  # fmt: skip
    """Each row under its label, the columns' labels above; an empty label takes no room. A
    cell is as large as the largest image. Files are opened one at a time."""
    sizes = [size_of(image) for row in rows.values() for image in row]
    width, height = map(max, zip(*sizes))
    header = LINE if any(columns) else 0
    step_x = width + GAP
    step_y = height + GAP + (LINE if any(rows) else 0)
    longest = max(map(len, rows.values()))
    size = (step_x * longest - GAP, header + step_y * len(rows) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for j, label in enumerate(columns):
        draw.text((step_x * j, 1), fitting(label, width, font), "black", font)
    for i, (label, row) in enumerate(rows.items()):
        bottom = header + step_y * (i + 1) - GAP
        text = fitting(label, size[0], font)
        draw.text((0, bottom - height - LINE + 1), text, "black", font)
        for j, image in enumerate(row):
            place = (step_x * j, bottom - height)
            if isinstance(image, Path):
                with opened_image(image, ANY_SIZE) as found:
                    sheet.paste(found, place)
            else:
                sheet.paste(image, place)
    return sheet


def size_of(image: Image.Image | Path) -> tuple[int, int]:
    if isinstance(image, Path):
        with opened_image(image, ANY_SIZE) as found:
            return found.size
    return image.size


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """As much of the text as `width` pixels hold."""
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text))
    count = bisect_right(lengths, width, key=lambda n: font.getlength(text[:n] + "..."))
    return text[: max(0, count - 1)] + "..."


def map_sheets(maps: Any, image: Image.Image, prompts: list[str]) -> list[Image.Image]:
    """For each regional step a row for each prompt, a column for each group of blocks; white is
    the largest fraction of all steps. maps: extensions.attention_maps.AttentionMaps."""
    grid = (image.height // 16, image.width // 16)
    heat = (maps.maps / maps.maps.max()).unflatten(-1, grid).numpy()
    sheets = []
    for step in heat:
        rows = {}
        for i, prompt in enumerate(prompts):
            rows[f"{i}: {prompt}"] = [overlay(image, x) for x in step[:, i]]
        sheets.append(contact_sheet(rows, maps.groups))
    return sheets


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image dark, but light where heat, (height / 16, width / 16) in [0, 1], is high."""
    light = Image.fromarray((255 * heat).astype(np.uint8))
    light = light.resize(image.size, Image.Resampling.BILINEAR)
    dark = image.point(lambda value: value // 3)
    return Image.composite(Image.new("RGB", image.size, "white"), dark, light)


def save_maps(
    maps: Any, path: Path, image: Image.Image, prompts: list[str], metadata: Metadata
) -> None:  # fmt: skip
    """Write the sheets, path_step1.png ..., and their numbers, path.safetensors. Ten sheets and
    more are numbered from 01, so that listings sort them by step."""
    sheets = map_sheets(maps, image, prompts)
    digits = len(str(len(sheets)))
    for i, sheet in enumerate(sheets, 1):
        save_image(sheet, metadata, path.with_name(f"{path.name}_step{i:0{digits}}.png"))
    save_tensor("maps", maps.maps, metadata, path.with_name(f"{path.name}.safetensors"))


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
        save_sheet(contact_sheet(images, columns), path)
        print(shown(path))
