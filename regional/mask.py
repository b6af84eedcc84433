"""Regions as one integer per token: bit i is set where region i covers it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from regional.attention import OPEN_BIT
from regional.images import read_color, read_mask
from regional.layout import Layout, Region

BACKGROUND_BIT = 61  # regions have bits 0-60


class RegionTokens(NamedTuple):
    """The regions on the token grid, P with the background, the last.

    image_bits: (h w,) int64, the bits of the image tokens, row by row.
    cover: (P, h w) float32, how far each region covers each image token.
    open_images: all image tokens see each other.
    """

    prompts: list[str]
    prompt_bits: list[int]
    image_bits: Tensor
    cover: Tensor
    strength: list[float]
    open_images: bool
    warnings: list[str]

    def bits(self, lengths: int | Tensor) -> Tensor:
        """Bits of [txt_1 .. txt_R, img], by the prompts' lengths: (L,) int64."""
        text = torch.tensor([1 << bit for bit in self.prompt_bits])
        image = self.image_bits | (self.open_images << OPEN_BIT)
        return torch.cat([text.repeat_interleave(lengths), image])

    def log_weights(self) -> Tensor | None:
        """How image tokens weigh each region's prompt, then its image tokens: logarithms of
        cover, for prompts times strength, (h w, 2 P) float32. None if all are 0."""
        prompts = self.cover * torch.tensor(self.strength)[:, None]
        both = [x.where(self.cover > 0, 1).log() for x in (prompts, self.cover)]
        weights = torch.cat(both).T.contiguous()
        return weights if weights.any() else None

    def mean(self, values: list[float]) -> Tensor:
        """The mean of each image token's regions' values, by cover: (h w,) float64."""
        values = torch.tensor(values, dtype=torch.float64)
        if (values == values[0]).all():  # A division could change its last bits.
            return values[0].expand(self.cover.shape[1])
        cover = self.cover.double()
        return values @ cover / cover.sum(0)

    def sorted(self) -> tuple["RegionTokens", Tensor]:
        """The same with image tokens of equal bits side by side, in Gray code order,
        where neighbors differ little; and their old positions."""
        rank = self.image_bits
        for shift in (1, 2, 4, 8, 16, 32):
            rank = rank ^ (rank >> shift)
        order = rank.argsort(stable=True)
        bits = self.image_bits[order]
        return self._replace(image_bits=bits, cover=self.cover[:, order]), order


def region_tokens(layout: Layout) -> RegionTokens:
    """Rasterize regions to the grid of (height / 16) x (width / 16) tokens."""
    cover = np.zeros((len(layout.regions) + 1, layout.height // 16, layout.width // 16), np.float32)
    warnings = []
    for i, region in enumerate(layout.regions):
        tokens = token_grid(region, layout)
        if not tokens.any():
            tokens = most_covered(region, layout)
            warnings.append(f"regions[{i}] covers no token center; it gets the one it covers most.")
        cover[i] = feathered(tokens, region.feather)
    if layout.overlap != "share":
        above = np.zeros_like(cover[0])
        opaque = np.zeros_like(cover[0])
        for i in topmost_first(layout, [own.sum() for own in cover]):
            opaque += np.minimum(cover[i], 1 - opaque)
            cover[i] = np.minimum(cover[i], 1 - above.clip(max=1))
            cover[i] *= layout.regions[i].opacity
            cover[i][cover[i] < 1e-6] = 0
            above += cover[i]
            if not cover[i].any():
                warnings.append(f"regions[{i}] lies wholly under others and will not show.")
        if any(region.opacity < 1 for region in layout.regions):  # to what it is without
            cover *= opaque / np.where(above > 0, above, 1)
    prompts = [region.prompt for region in layout.regions]
    strength = [region.strength for region in layout.regions]
    bits = list(range(len(prompts)))
    rest = 1 - cover.sum(axis=0)
    if (rest > 1e-6).any():
        prompts.append(layout.background_prompt)
        strength.append(1.0)
        bits.append(BACKGROUND_BIT)
        cover[-1] = np.where(rest > 1e-6, rest, 0)
    cover = cover[: len(bits)]
    image_bits = sum((c > 0).astype(np.int64) << bit for c, bit in zip(cover, bits))
    return RegionTokens(
        prompts=prompts,
        prompt_bits=bits,
        image_bits=torch.from_numpy(image_bits.flatten()),
        cover=torch.from_numpy(cover.reshape(len(cover), -1)),
        strength=strength,
        open_images=layout.image_attention == "open",
        warnings=warnings,
    )


def topmost_first(layout: Layout, areas: Sequence[float]) -> list[int]:
    """The regions' indices: `order` counts before `overlap`."""
    indices = range(len(layout.regions))
    ranks = {"last": [-i for i in indices], "smallest": areas}
    rank = ranks.get(layout.overlap, indices)
    return sorted(indices, key=lambda i: (-layout.regions[i].order, rank[i]))


def stage_ratios(layout: Layout, tokens: RegionTokens) -> list[tuple[int, list[float]]]:
    """The regional steps in stages of equal settings: where each ends, and the base branch's
    weight for each region, 1 where its steps are over."""
    parts = (*layout.regions, layout)[: len(tokens.prompts)]  # the layout is the background
    ends = {part.mask_inject_steps for part in parts}
    ends = sorted((ends | {min(layout.base_steps, max(ends))}) - {0})

    def ratio(part: Any, start: int) -> float:
        if start >= part.mask_inject_steps:
            return 1.0
        return part.base_ratio if start < layout.base_steps else 0.0

    return [(end, [ratio(part, start) for part in parts]) for start, end in zip([0, *ends], ends)]


def feathered(tokens: np.ndarray, feather: float) -> np.ndarray:
    """The fraction of each token's surroundings, `feather` pixels wide and high, that is in
    the region. Beyond the image, edge values repeat."""
    width = max(feather / 16, 1)
    reach = math.ceil(width / 2 - 0.5)
    if reach == 0:
        return tokens.astype(np.float32)
    outer = width / 2 + 0.5 - reach  # of the window's first and last token
    cover = tokens.astype(float)
    for _ in range(2):  # columns, then rows; the sums are exact
        padded = np.pad(cover.T, ((0, 0), (reach, reach)), mode="edge")
        sums = np.ascontiguousarray(padded).cumsum(axis=1)
        between = sums[:, 2 * reach - 1 : -1] - sums[:, : -2 * reach]
        ends = padded[:, : -2 * reach] + padded[:, 2 * reach :]
        cover = between + outer * ends
    cover = cover / width**2
    return np.where(cover > 1e-6, cover.clip(max=1), 0).astype(np.float32)


def token_grid(region: Region, layout: Layout) -> np.ndarray:
    """Which tokens' center pixels, (16 j + 8, 16 i + 8), lie in the region, (h, w) bool."""
    x = np.arange(8, layout.width, 16)
    y = np.arange(8, layout.height, 16)
    return pixels_inside(region, layout, x, y)


def pixels_inside(region: Region, layout: Layout, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which pixels of these columns and rows lie in the region, (len(y), len(x)) bool."""
    if region.box:
        x0, y0, x1, y1 = region.box
        return ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
    if region.ellipse:
        x0, y0, x1, y1 = region.ellipse
        across = (2 * x - x0 - x1) * (y1 - y0)
        down = (2 * y - y0 - y1) * (x1 - x0)
        return across**2 + down[:, None] ** 2 < ((x1 - x0) * (y1 - y0)) ** 2
    if region.polygon:
        return in_polygons(region.polygon, x, y)
    mask = region_mask(region, layout)
    rows, columns = mask.shape
    return mask[y * rows // layout.height][:, x * columns // layout.width]


def region_mask(region: Region, layout: Layout) -> np.ndarray:
    return read_mask(region.mask) if region.mask else read_color(layout.map, region.color)


def in_polygons(polygons: Sequence, x: np.ndarray, y: np.ndarray, marks: Any = True) -> np.ndarray:
    """Even-odd, (len(y), len(x)) bool: rays from inside to the left cross an odd number of
    edges. As in boxes, an edge holds its upper end, and a point on it lies to the right.

    x, y: evenly spaced. marks: an integer for each polygon, to have the XOR of those around.
    """
    starts = [point for points in polygons for point in points]
    ends = [point for points in polygons for point in (*points[1:], points[0])]
    x0, y0 = np.array(starts, dtype=float).T
    x1, y1 = np.array(ends, dtype=float).T
    low = np.minimum(y0, y1)
    high = np.maximum(y0, y1)
    marks = np.repeat(marks, [len(points) for points in polygons] if np.ndim(marks) else len(x0))
    step = x[1] - x[0] if len(x) > 1 else 1
    flips = np.zeros((len(y), len(x) + 1), dtype=marks.dtype)  # where rows go in or out
    rows = max(1, 2**18 // len(x0))  # at once, to bound the memory
    for top in range(0, len(y), rows):
        height = y[top : top + rows, None]
        row, i = ((low <= height) & (height < high)).nonzero()
        crossing = x0[i] + (height[row, 0] - y0[i]) * (x1 - x0)[i] / (y1 - y0)[i]
        column = np.ceil((crossing - x[0]) / step).clip(0, len(x)).astype(int)
        place = (top + row) * (len(x) + 1) + column
        np.bitwise_xor.at(flips.reshape(-1), place, marks[i])
    return np.bitwise_xor.accumulate(flips, axis=1, out=flips)[:, :-1]


def most_covered(region: Region, layout: Layout) -> np.ndarray:
    """The one token that a tiny region covers most, (h, w) bool."""
    h = layout.height // 16
    w = layout.width // 16
    if box := region.box or region.ellipse:
        x0, y0, x1, y1 = box
        area = np.outer(overlap(y0, y1, h), overlap(x0, x1, w))
    elif region.polygon:
        fine = in_polygons(region.polygon, np.arange(2, 16 * w, 4), np.arange(2, 16 * h, 4))
        area = fine.reshape(h, 4, 4 * w).sum(axis=1, dtype=np.uint8).reshape(h, w, 4).sum(axis=2)
        if not area.any():  # Smaller still: the token of its first point.
            x, y = region.polygon[0][0]
            area[min(int(y) // 16, h - 1), min(int(x) // 16, w - 1)] = 1
    else:
        mask = Image.fromarray(region_mask(region, layout).astype(np.float32))
        area = np.asarray(mask.resize((w, h), Image.Resampling.BOX))
    one = np.zeros(h * w, dtype=bool)
    one[area.argmax()] = True
    return one.reshape(h, w)


def overlap(low: float, high: float, tokens: int) -> np.ndarray:
    """How many pixels each token of a row shares with [low, high)."""
    start = 16 * np.arange(tokens)
    return np.clip(np.minimum(high, start + 16) - np.maximum(low, start), 0, None)
