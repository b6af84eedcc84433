"""Attention maps as contact sheets over their image."""

from pathlib import Path

import numpy as np
from PIL import Image

from extensions.attention_maps import AttentionMaps
from tools.metadata import save_tensor, write
from tools.sheets import contact_sheet


def map_sheets(
    maps: AttentionMaps, image: Image.Image, prompts: list[str]
) -> list[Image.Image]:  # fmt: skip
    """A contact sheet for each regional step: a row for each prompt, a column for each group of
    blocks, all on one scale: white is the largest fraction of all."""
    grid = image.height // 16, image.width // 16
    heat = (maps.maps / maps.maps.max()).unflatten(-1, grid).numpy()
    sheets = []
    for step in heat:
        rows = {prompt: [overlay(image, x) for x in step[:, i]] for i, prompt in enumerate(prompts)}
        sheets.append(contact_sheet(rows, maps.groups))
    return sheets


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image darkened, and lit up where the heat, (height / 16, width / 16) in [0, 1], is high."""
    light = Image.fromarray((255 * heat).astype(np.uint8))
    light = light.resize(image.size, Image.Resampling.BILINEAR)
    dark = image.point(lambda value: value // 3)
    return Image.composite(Image.new("RGB", image.size, "white"), dark, light)


def save_maps(
    maps: AttentionMaps, path: Path, image: Image.Image, prompts: list[str], metadata: dict
) -> None:  # fmt: skip
    """The sheets, path_step1.png and so on, and the numbers behind them, path.safetensors."""
    for i, sheet in enumerate(map_sheets(maps, image, prompts)):
        write(path.with_name(f"{path.name}_step{i + 1}.png"), sheet.save)
    save_tensor("maps", maps.maps, metadata, path.with_name(f"{path.name}.safetensors"))
