"""Contact sheets: pictures of one size in labelled rows and columns."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from errors import info
from tools.metadata import write

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


def write_sheets(jobs: list[Any], workers: int) -> None:
    """The contact sheet of each sweep: a column for each value of the last key, a row for each
    combination of the others and the seed. jobs: tools.jobs.Job."""
    if workers > 1:
        info("no sheet is made of a sweep that several workers share")
        return
    has_seeds = len({job.seed for job in jobs}) > 1
    for path in dict.fromkeys(job.sheet for job in jobs):
        rows = {}
        for job in (job for job in jobs if job.sheet == path):
            *others, column = job.sweep
            row = ", ".join([*others, *[f"seed {job.seed}"] * has_seeds])
            rows.setdefault(row, {})[column] = Image.open(job.files["image"])
        images = {row: list(found.values()) for row, found in rows.items()}
        write(path, contact_sheet(images, list(next(iter(rows.values())))).save)
        print(path)
