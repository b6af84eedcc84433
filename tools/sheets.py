"""Contact sheets: pictures of one size in labelled rows and columns."""

from PIL import Image, ImageDraw, ImageFont

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
