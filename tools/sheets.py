"""Contact sheets: images of one size in labeled rows and columns."""

from PIL import Image, ImageDraw, ImageFont

GAP = 8  # pixels between images
LINE = 18  # the height of a line of text


def contact_sheet(rows: dict[str, list[Image.Image]], columns: list[str] = ()) -> Image.Image:
    """Each row under its label, the columns' labels above; an empty label takes no room."""
    width, height = next(iter(rows.values()))[0].size
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
            sheet.paste(image, (step_x * j, bottom - height))
    return sheet


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """As much of the text as `width` pixels hold."""
    if font.getlength(text) <= width:
        return text
    starts = (text[:n] + "..." for n in range(len(text), 0, -1))
    return next((start for start in starts if font.getlength(start) <= width), "...")
