"""The images that a layout names: masks, maps and control images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

from errors import InputError, opened_image


def readable(read: Callable[[str], Any], file: str, key: str) -> Any:
    """What `read` makes of an image; errors are about the key that names it."""
    try:
        return read(file)
    except InputError as error:
        raise InputError(key, Path(file), error.problem) from None


def read_mask(file: str) -> np.ndarray:
    """A mask as (rows, columns) bool: pixels >= 128 are inside, transparent ones outside."""
    with opened_image(file) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255
            return np.asarray(image) >= 128 * 257
        if image.has_transparency_data:
            gray, alpha = image.convert("LA").split()
            return np.asarray(ImageChops.multiply(gray, alpha)) >= 128
        return np.asarray(image.convert("L")) >= 128


def read_color(file: str, color: Any) -> np.ndarray:
    """Which pixels of a map have this color, (rows, columns) bool.

    An index is a palette's or a gray value; in a map of colors R + 256 G + 65536 B, as in
    COCO's panoptic images.
    """
    with opened_image(file) as image:
        is_index = isinstance(color, int)
        if is_index and image.mode in ("1", "L", "P") or image.mode.startswith("I"):
            return np.asarray(image) == color
        if is_index:
            color = (color & 255, color >> 8 & 255, color >> 16)
        elif isinstance(color, str):
            color = bytes.fromhex(color[1:])
        bands = image.convert("RGB").split()
        same = [np.asarray(band) == value for band, value in zip(bands, color)]
        return np.logical_and.reduce(same)


def colors_in(file: str) -> list[tuple[int, tuple[int, ...]]]:
    """The pixels of each color (r, g, b), the most frequent first; [] if too many."""
    with opened_image(file) as image:
        found = image.convert("RGB").getcolors(2**16)
    return sorted(found or [], reverse=True)


def read_image(file: str) -> Image.Image:
    """A control image as RGB, upright; of 16 bits the upper 8."""
    with opened_image(file) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")
