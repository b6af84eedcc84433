"""A layout without a model: a picture of its regions as tokens, and a report of what they hold and will cost."""

import math
import textwrap

import numpy as np
import torch
from msgspec.structs import replace
from PIL import Image, ImageDraw, ImageFont

from model.transformer import FluxParams
from regional.layout import Layout, Region
from regional.mask import BACKGROUND_BIT, RegionTokens, region_tokens, token_grid
from tools.cost import LENGTH, cost
from tools.sheets import fitting

# For 61 regions. The first seven are Okabe and Ito's, a little lighter, which color-blind people tell apart; each
# further one lies farthest, in Oklab and as three kinds of eyes see it, from those before it, gray and white.
COLORS = """
338ec1 ebb233 33b18f d693b8 77c3ed dd7e33 f3e967 961e69 696900 3c4bb4 966978 782d00 5ae196 9696ff 5a1e87 2d4b3c
6969d2 006996 c34b4b ff7878 a5ffa5 96d2c3 c369a5 a57800 b4d2ff 5a87f0 874b4b 5aa54b d2d269 2db4d2 5a4b78 871e3c
78005a 784b00 c3a500 693c96 ff9669 78f0c3 00874b 78c396 c3ffd2 00ffff b47878 875ab4 785a78 7896d2 698796 00e1e1
ffc3a5 e1c3e1 c39696 b4a5ff 3c785a b49669 ffd22d 5a2d69 f0b478 5a5a2d a5b44b 963c96 693c5a
""".split()


SIZE, STRIPES, COLUMN, LINE, GAP = 1024, 32, 340, 18, 16  # pixels: longer side, period; columns and lines of text


USUAL = {"strength": 1, "feather": 0, "base_ratio": None, "mask_inject_steps": None}


def preview(layout: Layout) -> Image.Image:
    """The tokens in their regions' colors, striped where they belong to several, graded where an edge is soft; the
    shapes themselves as lines; a legend beside or below."""
    tokens, h, w = grid_tokens(layout), layout.height // 16, layout.width // 16
    cell = max(1, round(SIZE / max(h, w)))
    cover = tokens.cover.numpy().reshape(-1, h, w)
    names, colors = names_of(tokens), np.array([color(bit) for bit in tokens.prompt_bits])
    several = cover[[name != "background" for name in names]].sum(axis=0) > 1.001
    pixels = painted(cover / cover.sum(axis=0), several, colors, cell)
    fine = replace(layout, width=layout.width * cell, height=layout.height * cell)  # a token for each pixel drawn
    for region, own in zip(layout.regions, colors):
        shape = token_grid(magnified(region, cell), fine)
        pixels[shape & ~peeled(peeled(shape))] = 0.45 * own
    picture = Image.fromarray(pixels.astype(np.uint8))
    write_names(ImageDraw.Draw(picture), names, cover, colors, cell)
    about = f"{layout.width} x {layout.height} pixels, {w} x {h} tokens"
    about += f"; striped: {counted(several.sum())} in several regions at once" if several.any() else ""
    return with_legend(picture, about, layout, tokens, colors)


def grid_tokens(layout: Layout) -> RegionTokens:
    """region_tokens; without regions everything is background."""
    if layout.regions:
        return region_tokens(layout)
    everything = Region(prompt="(no regions: the base prompt alone)", box=(0, 0, layout.width, layout.height))
    return region_tokens(replace(layout, regions=(everything,)))._replace(prompt_bits=[BACKGROUND_BIT])


def names_of(tokens: RegionTokens) -> list[str]:
    return ["background" if bit == BACKGROUND_BIT else str(bit) for bit in tokens.prompt_bits]


def counted(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def color(bit: int) -> tuple[int, ...]:
    """Red, green and blue of the region with this bit."""
    return (228, 228, 228) if bit == BACKGROUND_BIT else tuple(bytes.fromhex(COLORS[bit]))


def enlarged(grid: np.ndarray, by: int) -> np.ndarray:
    return grid.repeat(by, axis=0).repeat(by, axis=1)


def painted(shares: np.ndarray, several: np.ndarray, colors: np.ndarray, cell: int) -> np.ndarray:
    """The token grid, (h cell, w cell, 3), from each region's share of each token (P, h, w), where there are `several`
    (h, w), and colors (P, 3): stripes are as wide as shares are large."""
    pixels = enlarged(np.tensordot(shares, colors, axes=(0, 0)), cell)
    y, x = np.indices(pixels.shape[:2])
    phase, stripe = (x + y) % STRIPES / STRIPES, np.zeros(pixels.shape[:2], dtype=int)
    for end in shares[:-1].cumsum(axis=0):
        stripe += phase >= enlarged(end, cell)
    pixels = np.where(enlarged(several, cell)[..., None], colors[stripe], pixels)
    if cell >= 6:
        pixels[(x % cell == 0) | (y % cell == 0)] *= 0.9
    return pixels


def magnified(region: Region, by: int) -> Region:
    box = region.box and tuple(by * v for v in region.box)
    polygon = region.polygon and tuple(tuple((by * x, by * y) for x, y in points) for points in region.polygon)
    return replace(region, box=box, polygon=polygon)


def peeled(inside: np.ndarray) -> np.ndarray:
    """Without what touches the outside, corners included: (h, w) bool."""
    padded = np.pad(inside, 1)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    return rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]


def innermost(inside: np.ndarray) -> tuple[float, float, float]:
    """Row and column of a point deep inside, and its distance from the outside, from (h, w) bool with some True."""
    depth = 0.5
    while (inner := peeled(inside)).any():
        inside, depth = inner, depth + 1
    rows, columns = inside.nonzero()
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return rows[nearest] + 0.5, columns[nearest] + 0.5, depth


def write_names(draw: ImageDraw.ImageDraw, names: list[str], cover: np.ndarray, colors: np.ndarray, cell: int) -> None:
    """Each name in its region's own part, or else where the fewest others are; beside other names if there is room."""
    zoom = 2 * (96 // max(cover.shape[1:])) + 1  # odd: a token has a middle
    regions, most = (cover > 0).sum(axis=0), cover.max(axis=0)
    free = enlarged(np.ones(cover.shape[1:], dtype=bool), zoom)
    for name, own, edge in zip(names, cover, colors):
        mine = (own > 0) & (own == most)
        mine = mine if mine.any() else own > 0
        if not mine.any():  # it lies wholly under others
            continue
        mine = enlarged(mine & (regions == regions[mine].min()), zoom)
        y, x, radius = (v * cell / zoom for v in innermost(mine & free if (mine & free).any() else mine))
        size = min(32 if name.isdigit() else 20, max(12, 3 * radius / max(2, len(name))))
        font = ImageFont.load_default(size)
        half = font.getlength(name) / 2 + size / 4
        box = x - half, y - 0.6 * size, x + half, y + 0.6 * size
        draw.rounded_rectangle(box, size / 3, "white", tuple((0.45 * edge).astype(int)), 2)
        draw.text((x, y), name, "black", font, anchor="mm")
        x0, y0, x1, y1 = (max(0, int(v * zoom / cell)) for v in box)
        free[y0 : y1 + 1, x0 : x1 + 1] = False


def with_legend(
    picture: Image.Image, about: str, layout: Layout, tokens: RegionTokens, colors: np.ndarray
) -> Image.Image:
    """The picture under its base prompt, and beside it, or below if it is wide, each region's prompt and settings."""
    fonts = {"black": ImageFont.load_default(15), "dimgray": ImageFont.load_default(13)}
    names = names_of(tokens)

    def write(draw: ImageDraw.ImageDraw, x: float, y: float, lines: list[tuple[str, str]], width: float) -> None:
        for i, (line, ink) in enumerate(lines):
            draw.text((x, y + LINE * i), fitting(line, width, fonts[ink]), ink, fonts[ink])

    def lines_of(prompt: str, details: str, letters: int, most: int) -> list[tuple[str, str]]:
        lines = textwrap.wrap(prompt, letters, max_lines=most, placeholder=" ...")
        return [(line, "black") for line in lines] + [(line, "dimgray") for line in textwrap.wrap(details, letters)]

    most = max(1, min(3, 32 // len(names)))
    entries = [lines_of(tokens.prompts[i], details(layout, tokens, i), 40, most) for i in range(len(names))]
    step, below = LINE * max(map(len, entries)) + 10, picture.width > 1.2 * picture.height
    columns = picture.width // COLUMN if below else math.ceil(len(names) / max(8, picture.height // step))
    rows = math.ceil(len(names) / columns)
    left = GAP if below else picture.width + 2 * GAP
    width = max(picture.width + 2 * GAP, left + COLUMN * columns)
    heading = lines_of(layout.prompt, about, width // 8, 3)
    top = LINE * len(heading) + 2 * GAP
    start = top + below * (picture.height + GAP)
    sheet = Image.new("RGB", (width, max(top + picture.height + GAP, start + step * rows)), "white")
    sheet.paste(picture, (GAP, top))
    draw = ImageDraw.Draw(sheet)
    write(draw, GAP, GAP, heading, width - 2 * GAP)
    for i, (name, lines) in enumerate(zip(names, entries)):
        x, y = left + COLUMN * (i // rows), start + step * (i % rows)
        draw.rectangle((x, y, x + 34, y + 30), tuple(colors[i].astype(int)), "gray")
        draw.rounded_rectangle((x + 5, y + 6, x + 29, y + 24), 5, "white")
        draw.text((x + 17, y + 15), name if name.isdigit() else "bg", "black", fonts["dimgray"], anchor="mm")
        write(draw, x + 44, y, lines, COLUMN - 60)
    return sheet


def details(layout: Layout, tokens: RegionTokens, i: int) -> str:
    """A region's share of the picture, and those of its settings that are not as usual."""
    cover, own = tokens.cover[i], layout.regions[i] if i < len(layout.regions) else None
    settings = {key: getattr(own, key, usual) for key, usual in USUAL.items()}
    said = [f"{key} {v if isinstance(v, str) else format(v, 'g')}" for key, v in settings.items() if v != USUAL[key]]
    return ", ".join([counted(int((cover > 0).sum())), f"{cover.mean():.1%}", *said])


# ------------------------------------------------------------------------------------------------ the report


def report(layout: Layout, params: FluxParams, text_lengths: list[int] | None = None) -> tuple[str, list[str]]:
    """What the regions hold and what a picture will cost, as a text, and what may not be as it was meant, each in one
    sentence. text_lengths: tokens of the base prompt and of each prompt of region_tokens, where they are known."""
    tokens, length = grid_tokens(layout), layout.max_sequence_length or LENGTH
    names, prompts, keys = ["base"], [layout.prompt], ["prompt"]
    if layout.regions:
        names, prompts = names + names_of(tokens), prompts + tokens.prompts
        keys += [f"regions[{name}].prompt" if name.isdigit() else "background_prompt" for name in names[1:]]
    limits = [length] + [layout.region_length(length)] * (len(names) - 1)
    known = text_lengths or [None] * len(names)
    cover = torch.cat([torch.ones(1, tokens.cover.shape[1]), tokens.cover])
    lines = [f"{'region':<12}{'tokens':>7}{'picture':>9}{'text':>13}   prompt"]
    for name, prompt, own, text, limit in zip(names, prompts, cover, known, limits):
        held = f"up to {limit}" if text is None else f"{text} of {limit}"
        prompt = textwrap.shorten(prompt, 60, placeholder=" ...")
        lines.append(f"{name:<12}{int((own > 0).sum()):>7}{own.mean():>9.1%}{held:>13}   {prompt}")
    warnings = tokens.warnings + doubts(layout, tokens)
    for key, text, limit in zip(keys, known, limits):
        if text is not None and text > limit:
            warnings.append(f"{key} has {text} tokens, and only the first {limit} are read.")
    return "\n".join([*lines, "", *cost(layout, params, tokens)]), warnings


def doubts(layout: Layout, tokens: RegionTokens) -> list[str]:
    """What region_tokens does but may not be meant."""
    found, there = [], tokens.cover > 0
    for i, region in enumerate(layout.regions):
        own, share = there[i], tokens.cover[i].mean()
        around = [j for j in range(len(layout.regions)) if j != i and not (own & ~there[j]).any()]
        if region.strength == 0:
            found.append(f"regions[{i}] has strength 0: its prompt is not read in the masked blocks.")
        if not own.any():  # region_tokens has said so
            continue
        if share < 0.02:
            few = f"{counted(int(own.sum()))}, {share:.1%} of the picture"
            found.append(f"regions[{i}] covers only {few}, and may not show.")
        if around:
            found.append(f"regions[{i}] lies wholly in regions[{around[0]}]; both prompts count there.")
        elif (there[:, own].sum(dim=0) > 1).all():
            found.append(f"regions[{i}] has no token of its own: each is shared with other regions.")
    return found
