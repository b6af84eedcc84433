"""A layout without a model: an image of its regions, and a report of what they hold."""

import math
import textwrap

import numpy as np
import torch
from msgspec.structs import replace
from PIL import Image, ImageDraw, ImageFont

from model.transformer import FluxParams
from regional.layout import Layout, Region
from regional.mask import BACKGROUND_BIT, RegionTokens, region_tokens, token_grid
from tools.cost import cost, resolved
from tools.sheets import fitting

# The background's last. The first seven are Okabe and Ito's, a little lighter, which the
# color-blind can tell apart; each further one is farthest, in Oklab and as three kinds of eyes
# see it, from those before it, gray and white.
COLORS = """
338ec1 ebb233 33b18f d693b8 77c3ed dd7e33 f3e967 961e69 696900 3c4bb4 966978 782d00 5ae196 9696ff
5a1e87 2d4b3c 6969d2 006996 c34b4b ff7878 a5ffa5 96d2c3 c369a5 a57800 b4d2ff 5a87f0 874b4b 5aa54b
d2d269 2db4d2 5a4b78 871e3c 78005a 784b00 c3a500 693c96 ff9669 78f0c3 00874b 78c396 c3ffd2 00ffff
b47878 875ab4 785a78 7896d2 698796 00e1e1 ffc3a5 e1c3e1 c39696 b4a5ff 3c785a b49669 ffd22d 5a2d69
f0b478 5a5a2d a5b44b 963c96 693c5a e4e4e4
"""
COLORS = np.array([list(bytes.fromhex(color)) for color in COLORS.split()])
SIZE = 1024  # the image's longer side, in pixels like the others
STRIPES = 32
COLUMN = 340  # of the legend
LINE = 18
GAP = 16
DEFAULT = Region(prompt="")


def preview(layout: Layout) -> Image.Image:
    """Tokens in their regions' colors, striped if in several, graded at soft edges;
    the shapes as lines; a legend."""
    h = layout.height // 16
    w = layout.width // 16
    cell = max(1, round(SIZE / max(h, w)))
    tokens = grid_tokens(layout)
    cover = tokens.cover.numpy().reshape(-1, h, w)
    colors = COLORS[tokens.prompt_bits]
    several = cover[: len(layout.regions)].sum(axis=0) > 1.001
    pixels = painted(cover, several, colors, cell)
    fine = replace(layout, width=layout.width * cell, height=layout.height * cell)
    for region, own in zip(layout.regions, colors):
        box = region.box and tuple(cell * value for value in region.box)
        ellipse = region.ellipse and tuple(cell * value for value in region.ellipse)
        polygons = region.polygon or ()
        polygons = [[(cell * x, cell * y) for x, y in points] for points in polygons]
        region = replace(region, box=box, ellipse=ellipse, polygon=polygons or None)
        shape = token_grid(region, fine)  # a token for each pixel
        pixels[shape & ~peeled(peeled(shape))] = 0.45 * own
    image = Image.fromarray(pixels.astype(np.uint8))
    write_names(image, tokens, cover, cell)
    about = f"{layout.width} x {layout.height} pixels, {w} x {h} tokens"
    if layout.style:
        about += f"; style: {layout.style}"
    if several.any():
        about += f"; striped: {counted(several.sum())} in several regions at once"
    return with_legend(image, layout, tokens, about)


def grid_tokens(layout: Layout) -> RegionTokens:
    """region_tokens; without regions all is background."""
    if layout.regions:
        return region_tokens(layout)
    box = (0, 0, layout.width, layout.height)
    everything = Region(prompt="(no regions: the base prompt alone)", box=box)
    tokens = region_tokens(replace(layout, regions=(everything,)))
    return tokens._replace(prompt_bits=[BACKGROUND_BIT])


def names_of(tokens: RegionTokens) -> list[str]:
    special = {BACKGROUND_BIT: "background"}
    return [special.get(bit, str(bit)) for bit in tokens.prompt_bits]


def counted(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def enlarged(grid: np.ndarray, by: int) -> np.ndarray:
    return grid.repeat(by, axis=0).repeat(by, axis=1)


def painted(cover: np.ndarray, several: np.ndarray, colors: np.ndarray, cell: int) -> np.ndarray:
    """(h cell, w cell, 3). cover: each region's fraction of each token, (P, h, w), and of the
    stripes where there are `several` (h, w); colors: (P, 3)."""
    y, x = np.indices((several.shape[0] * cell, several.shape[1] * cell), sparse=True)
    phase = ((x + y) % STRIPES / STRIPES).astype(np.float32)
    stripe = np.zeros(phase.shape, dtype=np.uint8)
    whole = cover.sum(axis=0)
    mixed = np.zeros((*several.shape, 3))
    end = np.zeros_like(whole)
    for own, color in zip(cover, colors):  # one at a time, to save memory
        mixed += (own / whole)[..., None] * color
        end += own / whole
        if several.any():
            stripe += phase >= enlarged(end, cell)
    stripe = stripe.clip(max=len(colors) - 1)
    pixels = enlarged(mixed, cell)
    np.copyto(pixels, colors[stripe], where=enlarged(several, cell)[..., None])
    if cell >= 6:
        pixels[(x % cell == 0) | (y % cell == 0)] *= 0.9
    return pixels


def peeled(inside: np.ndarray) -> np.ndarray:
    """Without what touches the outside, corners included: (h, w) bool."""
    padded = np.pad(inside, 1)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    return rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]


def innermost(inside: np.ndarray) -> tuple[float, float, float]:
    """Row and column of a point deep inside (h, w) bool, and its depth."""
    depth = 0.5
    while (inner := peeled(inside)).any():
        inside = inner
        depth += 1
    rows, columns = inside.nonzero()
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return rows[nearest] + 0.5, columns[nearest] + 0.5, depth


def write_names(image: Image.Image, tokens: RegionTokens, cover: np.ndarray, cell: int) -> None:
    """Names where fewest other regions are, beside other names if possible."""
    draw = ImageDraw.Draw(image)
    zoom = 2 * (96 // max(cover.shape[1:])) + 1  # odd: a token has a middle
    regions = (cover > 0).sum(axis=0)
    most = cover.max(axis=0)
    free = enlarged(regions >= 0, zoom)
    for name, own, edge in zip(names_of(tokens), cover, COLORS[tokens.prompt_bits]):
        if not own.any():  # wholly under others
            continue
        mine = (own > 0) & (own == most)
        mine = mine if mine.any() else own > 0
        mine = enlarged(mine & (regions == regions[mine].min()), zoom)
        place = innermost(mine & free if (mine & free).any() else mine)
        y, x, radius = (value * cell / zoom for value in place)
        size = max(12, 3 * radius / max(2, len(name)))
        font = ImageFont.load_default(min(32 if name.isdigit() else 20, size))
        half_width = font.getlength(name) / 2 + font.size / 4
        half_height = 0.6 * font.size
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        outline = tuple((0.45 * edge).astype(int))
        draw.rounded_rectangle(box, font.size / 3, "white", outline, 2)
        draw.text((x, y), name, "black", font, anchor="mm")
        x0, y0, x1, y1 = (max(0, int(value * zoom / cell)) for value in box)
        free[y0 : y1 + 1, x0 : x1 + 1] = False


def lines_of(prompt: str, about: str, letters: int, most: int) -> list[tuple[str, str]]:
    """Lines of so many letters and their colors, `most` of the prompt."""
    lines = textwrap.wrap(prompt, letters, max_lines=most, placeholder=" ...")
    lines = [(line, "black") for line in lines]
    return lines + [(line, "dimgray") for line in textwrap.wrap(about, letters)]


def write_lines(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list, width: int) -> None:
    for i, (line, ink) in enumerate(lines):
        font = ImageFont.load_default(15 if ink == "black" else 13)
        draw.text((x, y + LINE * i), fitting(line, width, font), ink, font)


def with_legend(
    image: Image.Image, layout: Layout, tokens: RegionTokens, about: str
) -> Image.Image:  # fmt: skip
    """The image under the base prompt and `about`; regions beside it, or below if wide."""
    count = len(tokens.prompts)
    most = max(1, min(3, 32 // count))
    texts = [details(layout, tokens, i) for i in range(count)]
    entries = [lines_of(*entry, 40, most) for entry in zip(tokens.prompts, texts)]
    step = LINE * max(map(len, entries)) + 10
    is_below = image.width > 1.2 * image.height
    left = GAP if is_below else image.width + 2 * GAP
    columns = math.ceil(count / max(8, image.height // step))
    columns = image.width // COLUMN if is_below else columns
    rows = math.ceil(count / columns)
    width = max(image.width + 2 * GAP, left + COLUMN * columns)
    heading = lines_of(layout.prompt, about, width // 8, 3)
    top = LINE * len(heading) + 2 * GAP
    start = top + is_below * (image.height + GAP)
    height = max(top + image.height + GAP, start + step * rows)
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(image, (GAP, top))
    draw = ImageDraw.Draw(sheet)
    write_lines(draw, GAP, GAP, heading, width - 2 * GAP)
    font = ImageFont.load_default(13)
    named = zip(names_of(tokens), COLORS[tokens.prompt_bits], entries)
    for i, (name, own, lines) in enumerate(named):
        x = left + COLUMN * (i // rows)
        y = start + step * (i % rows)
        draw.rectangle((x, y, x + 34, y + 30), tuple(own), "gray")
        draw.rounded_rectangle((x + 5, y + 6, x + 29, y + 24), 5, "white")
        label = name if name.isdigit() else "bg"
        draw.text((x + 17, y + 15), label, "black", font, anchor="mm")
        write_lines(draw, x + 44, y, lines, COLUMN - 60)
    return sheet


def details(layout: Layout, tokens: RegionTokens, i: int) -> str:
    """A region's tokens, fraction of the image and own settings."""
    own = [*layout.regions, DEFAULT][i]
    cover = tokens.cover[i]
    found = [counted(int((cover > 0).sum())), f"{cover.mean():.1%}"]
    for key in "opacity", "strength", "feather", "base_ratio", "mask_inject_steps":
        value = getattr(own, key)
        if value != getattr(DEFAULT, key):
            found.append(f"{key} {value if isinstance(value, str) else format(value, 'g')}")
    return ", ".join(found)


def report(layout: Layout, params: FluxParams, known: list[int] | None) -> tuple[str, list[str]]:
    """What regions hold and an image costs; warnings, a sentence each. known: the token counts
    of the base prompt and region_tokens' prompts."""
    layout = resolved(layout, params)
    tokens = grid_tokens(layout)
    parts = [("base", layout.prompt, torch.ones(tokens.cover.shape[1]))]
    if layout.regions:
        parts += zip(names_of(tokens), tokens.prompts, tokens.cover)
    keys = {"base": "prompt", "background": "background_prompt"}
    warnings = tokens.warnings + doubts(layout, tokens)
    lines = [f"{'region':<12}{'tokens':>7}{'image':>9}{'text':>13}   prompt"]
    for (name, prompt, cover), count in zip(parts, known or [None] * len(parts)):
        limit = layout.region_max_sequence_length
        if name == "base":
            limit = layout.max_sequence_length
        held = f"up to {limit}" if count is None else f"{count} of {limit}"
        size = f"{int((cover > 0).sum()):>7}{cover.mean():>9.1%}"
        prompt = textwrap.shorten(prompt, 60, placeholder=" ...")
        lines.append(f"{name:<12}{size}{held:>13}   {prompt}")
        if count is not None and count > limit:
            key = keys.get(name, f"regions[{name}].prompt")
            warnings.append(f"{key} has {count} tokens, and only the first {limit} are read.")
    lines += ["", *cost(layout, params, tokens)]
    if len(layout.regions) >= 4 and layout.preset == "published" and layout.method == "regional":
        lines.append("for 4 regions and more, preset: control holds better (docs/control)")
    return "\n".join(lines), warnings


def doubts(layout: Layout, tokens: RegionTokens) -> list[str]:
    """What region_tokens does but may not be meant."""
    found = []
    cover = tokens.cover.numpy()
    inside = cover > 0
    several = inside.sum(axis=0) > 1
    held = inside.astype(np.float32)
    shared = held @ held.T  # tokens, exact in float32
    for i, region in enumerate(layout.regions):
        name = f"regions[{i}]"
        own = inside[i]
        fraction = cover[i].mean()
        if region.strength == 0:
            found.append(f"{name} has strength 0: its prompt is not read in the masked blocks.")
        if not own.any():  # region_tokens warns of it
            continue
        if fraction < 0.02:
            few = f"{counted(int(own.sum()))}, {fraction:.1%} of the image"
            found.append(f"{name} covers only {few}, and may not show.")
        others = [j for j in range(len(layout.regions)) if j != i]
        around = [j for j in others if shared[i, j] == shared[i, i]]
        if around:
            found.append(f"{name} lies wholly in regions[{around[0]}]; both prompts count there.")
        elif several[own].all():
            found.append(f"{name} has no token of its own: each is shared with other regions.")
    return found
