"""What does a picture show? A program's eye for the world of scenes.py: colour, pattern and shape of one object.

It compares pixels with the palette and areas with drawn templates. It knows nothing of how the picture was made.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pocket.scenes import BACKGROUNDS, COLORS, DARK, LOOKS, PATTERNS, PERIOD, SHAPES, outline_mask

LEAST_FIT = 0.94  # of an object that is not deformed
TIPS = (0, 1, 2)  # pixels by which an object's thin tips may have faded on every side
ROOM = 3  # pixels around a body for its template, more than its tips
LEAST = 0.06  # share of an area that an object must take to be seen
GAP = 5  # pixels that close the gaps of a look
MARGIN = 8  # pixels around an area, more than `clean` reaches


class Looks(NamedTuple):
    color: str
    pattern: str
    shape: str


class Seen(NamedTuple):
    """What an object looks like, and how well it fits its shape, 1 at best; below LEAST_FIT it is deformed."""

    looks: Looks
    fit: float


def nearest_of(picture: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """For each pixel of (H, W, 3) the index of the nearest of the tones (N, 3)."""
    tones = tones.astype(np.float32)
    return (np.square(tones).sum(1) - 2 * picture.astype(np.float32) @ tones.T).argmin(-1)


def nearest_tones(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of (H, W, 3) uint8 the index of its colour in COLORS, or -1 for a background; and is it dark?"""
    bright = np.array(list(COLORS.values()), dtype=np.float32)
    tones = np.concatenate([bright, DARK * bright, np.array(list(BACKGROUNDS.values()), dtype=np.float32)])
    nearest = nearest_of(picture, tones)
    dark = (nearest >= len(bright)) & (nearest < 2 * len(bright))
    color = np.where(nearest < 2 * len(bright), nearest % len(bright), -1)
    return color, dark


def detect(picture: np.ndarray, area: np.ndarray | None = None) -> Looks | None:
    """The looks of the object in the area (H, W) bool of a picture (H, W, 3) uint8; None where there is none."""
    seen = see(picture, area)
    return seen and seen.looks


def see(picture: np.ndarray, area: np.ndarray | None = None) -> Seen | None:
    """As `detect`, and whether the object is clean or deformed."""
    found = find_object(picture, area)
    if not found or found.body.sum() < LEAST * found.area.sum():
        return None
    fits = shape_fits(silhouette(found))
    shape = max(fits, key=fits.get)
    return Seen(Looks(list(COLORS)[found.color], pattern_of(found.body, found.dark), shape), fits[shape])


class Found(NamedTuple):
    """An object's color, as an index into COLORS; and of the picture near the area, (h, w) each: the object's pixels
    without specks and with them, what is dark, the area, and the picture itself."""

    color: int
    body: np.ndarray
    raw: np.ndarray
    dark: np.ndarray
    area: np.ndarray
    picture: np.ndarray


def find_object(picture: np.ndarray, area: np.ndarray | None = None) -> Found | None:
    if area is None:
        area = np.ones(picture.shape[:2], dtype=bool)
    rows, columns = (area.any(axis).nonzero()[0] for axis in (1, 0))
    if not len(rows):
        return None
    near = tuple(slice(max(0, side[0] - MARGIN), side[-1] + 1 + MARGIN) for side in (rows, columns))
    picture, area = picture[near], area[near]
    color, dark = nearest_tones(picture)
    color = np.where(area, color, -1)
    counts = np.bincount(color[color >= 0], minlength=len(COLORS))
    if counts.sum() < LEAST * area.sum():
        return None
    raw = color == counts.argmax()
    return Found(int(counts.argmax()), clean(raw), raw, dark, area, picture)


def look_of(picture: np.ndarray, area: np.ndarray | None = None) -> str | None:
    """Which look of pocket/adapters.py the object in the area has: the one that explains best where it is pale, that
    is nearer to white, gray or beige than to its own two tones."""
    found = find_object(picture, area)
    if not found:
        return None
    body = found.area & shrunken(grown(found.raw, GAP), GAP + 1)  # with the gaps that a look makes, without its border
    color = np.array(list(COLORS.values())[found.color])
    pale = [BACKGROUNDS[name] for name in ("white", "gray", "beige")]
    is_pale = nearest_of(found.picture, np.stack([color, DARK * color, *pale])) >= 2
    return best_tile(body, is_pale, {None: np.zeros((PERIOD, PERIOD), np.float32), **LOOKS})


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask (H, W) bool, wider by so many pixels in every direction, diagonals too."""
    for _ in range(2):  # down and up, then, transposed, to both sides
        wider = mask.copy()
        for shift in range(1, pixels + 1):
            wider[shift:] |= mask[:-shift]
            wider[:-shift] |= mask[shift:]
        mask = np.ascontiguousarray(wider.T)
    return mask


def shrunken(mask: np.ndarray, pixels: int) -> np.ndarray:
    return ~grown(~mask, pixels)


def clean(mask: np.ndarray) -> np.ndarray:
    """The mask without specks, lines and small holes."""
    return grown(shrunken(grown(mask, 1), 3), 2)


def pattern_of(body: np.ndarray, dark: np.ndarray) -> str:
    return best_tile(body, dark, PATTERNS)


def best_tile(body: np.ndarray, marked: np.ndarray, tiles: dict) -> Any:
    """The name of the tile that explains best, at any shift, which pixels of the body are marked."""
    height, width = (-(-side // PERIOD) * PERIOD for side in body.shape)
    pad = [(0, height - body.shape[0]), (0, width - body.shape[1])]

    def fold(values: np.ndarray) -> np.ndarray:
        cells = np.pad(values.astype(np.float32), pad)
        return cells.reshape(height // PERIOD, PERIOD, width // PERIOD, PERIOD).sum((0, 2))

    count, marks = fold(body).ravel(), fold(body & marked).ravel()
    errors = {}
    for name, tile in tiles.items():
        # sum of count * t + marks - 2 * t * marks, less what is the same for every tile
        errors[name] = (all_shifts(tile.tobytes()) @ (count - 2 * marks)).min()
    return min(errors, key=errors.get)


@lru_cache(maxsize=16)
def all_shifts(tile: bytes) -> np.ndarray:
    """A tile, the bytes of (PERIOD, PERIOD) float32, at its PERIOD * PERIOD shifts, one in a row."""
    square = np.frombuffer(tile, dtype=np.float32).reshape(PERIOD, PERIOD)
    return np.stack([np.roll(square, (y, x), (0, 1)).ravel() for y in range(PERIOD) for x in range(PERIOD)])


def silhouette(found: Found) -> np.ndarray:
    """The object with the thin tips that `clean` takes away, without specks elsewhere."""
    return shrunken(grown(found.raw, 1), 1) & grown(found.body, 3)


def shape_fits(body: np.ndarray) -> dict[str, float]:
    """How well each shape explains a body (H, W) bool when both fill the same box.

    1 - (pixels beyond the shape's border + pixels missing within it) / the shape's pixels. A band along the border,
    3 % of the box on both sides and a pixel at least, does not count: small objects are drawn with few pixels.
    """
    rows, columns = body.any(1).nonzero()[0], body.any(0).nonzero()[0]
    cut = np.pad(body[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], ROOM)
    fits = {}
    for name in SHAPES:
        errors = []
        for tip in TIPS:
            size, outer, inner = shape_template(name, cut.shape, tip)
            errors.append(((cut & ~outer).sum() + (inner & ~cut).sum()) / size)
        fits[name] = float(1 - min(errors))
    return fits


@lru_cache(maxsize=512)
def shape_template(name: str, shape: tuple[int, int], tip: int) -> tuple[int, np.ndarray, np.ndarray]:
    """A shape that fills an array but for a margin of ROOM - tip pixels: its pixels, and masks grown and shrunk by the
    band along its border."""
    height, width = shape
    radius = (width / 2 - ROOM + tip, height / 2 - ROOM + tip)
    filled = outline_mask(name, (width / 2, height / 2), radius, (width, height)) > 0.5
    band = max(1, round(0.03 * (min(shape) - 2 * ROOM)))
    return int(filled.sum()), grown(filled, band), shrunken(filled, band)


def borders_agree(picture: np.ndarray, wanted: np.ndarray, within: int = 3) -> float:
    """How well two pictures' objects end in the same places: F1 of the pixels on their borders that have one of the
    other picture's so near."""
    a, b = (border(clean(nearest_tones(each)[0] >= 0)) for each in (picture, wanted))
    if not a.any() or not b.any():
        return 0.0
    precision, recall = grown(b, within)[a].mean(), grown(a, within)[b].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def border(mask: np.ndarray) -> np.ndarray:
    return mask & grown(~mask, 1)
