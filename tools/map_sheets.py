"""Attention maps (an extensions.attention_maps.AttentionMaps) as sheets over their image."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.metadata import save_tensor, write
from tools.sheets import contact_sheet


def map_sheets(maps: Any, image: Image.Image, prompts: list[str]) -> list[Image.Image]:
    """A contact sheet for each regional step: a row for each prompt, a column for each group of
    blocks; white is the largest fraction of all steps."""
    grid = (image.height // 16, image.width // 16)
    heat = (maps.maps / maps.maps.max()).unflatten(-1, grid).numpy()
    sheets = []
    for step in heat:
        rows = {}
        for i, prompt in enumerate(prompts):
            rows[prompt] = [overlay(image, x) for x in step[:, i]]
        sheets.append(contact_sheet(rows, maps.groups))
    return sheets


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image dark, but light where heat, (height / 16, width / 16) in [0, 1], is high."""
    light = Image.fromarray((255 * heat).astype(np.uint8))
    light = light.resize(image.size, Image.Resampling.BILINEAR)
    dark = image.point(lambda value: value // 3)
    return Image.composite(Image.new("RGB", image.size, "white"), dark, light)


def save_maps(
    maps: Any, path: Path, image: Image.Image, prompts: list[str], metadata: dict
) -> None:  # fmt: skip
    """Write the sheets, path_step1.png ..., and their numbers, path.safetensors."""
    for i, sheet in enumerate(map_sheets(maps, image, prompts), 1):
        write(path.with_name(f"{path.name}_step{i}.png"), sheet.save)
    save_tensor("maps", maps.maps, metadata, path.with_name(f"{path.name}.safetensors"))
