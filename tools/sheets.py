"""Contact sheets: images of one size in labelled rows and columns; those of attention maps."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from extensions.attention_maps import AttentionMaps
from tools.metadata import save_tensor, write

GAP, LINE = 8, 18  # pixels between pictures, and height of a line of text


def contact_sheet(rows: dict[str, list[Image.Image]], columns: list[str] = ()) -> Image.Image:
    """Each row under its label, the columns' labels above; an empty label takes no room."""
    width, height = next(iter(rows.values()))[0].size
    header = LINE if any(columns) else 0
    step_x, step_y = width + GAP, height + GAP + (LINE if any(rows) else 0)
    size = step_x * max(len(row) for row in rows.values()) - GAP, header + step_y * len(rows) - GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for j, label in enumerate(columns):
        draw.text((step_x * j, 1), fitting(label, width, font), "black", font)
    for i, (label, row) in enumerate(rows.items()):
        bottom = header + step_y * (i + 1) - GAP
        draw.text((0, bottom - height - LINE + 1), fitting(label, size[0], font), "black", font)
        for j, picture in enumerate(row):
            sheet.paste(picture, (step_x * j, bottom - height))
    return sheet


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """As much of the text as `width` pixels hold."""
    short = next((text[:n] for n in range(len(text), 0, -1) if font.getlength(text[:n] + "...") <= width), "")
    return text if font.getlength(text) <= width else short + "..."


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
