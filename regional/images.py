"""The images that a layout names: masks, maps and control images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

from errors import InputError, opened_image


def readable(read: Callable[[str], Any], file: str, key: str) -> Any:
    """What `read` makes of an image file, or an InputError about the key that names it."""
    try:
        return read(file)
    except InputError as error:
        raise InputError(key, Path(file), error.problem) from None


def read_mask(file: str) -> np.ndarray:
    """A mask as (rows, columns) bool: pixels >= 128 are inside, transparent ones outside."""
    with opened_image(file) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would clip at 255
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
        is_gray = image.mode in ("1", "L", "P") or image.mode.startswith("I")
        if is_gray and isinstance(color, int):
            return np.asarray(image) == color
        if isinstance(color, str):
            color = bytes.fromhex(color[1:])
        number = color if isinstance(color, int) else int.from_bytes(color, "little")
        return color_numbers(image) == number


def color_numbers(image: Image.Image) -> np.ndarray:
    """R + 256 G + 65536 B of each pixel."""
    rgba = image.convert("RGB").convert("RGBA")
    return np.asarray(rgba).view("<u4")[..., 0] & 0xFFFFFF


def colors_in(file: str, most: int) -> list[tuple[str, float]]:
    """A map's most frequent colors: "#rrggbb", and its fraction of the pixels."""
    with opened_image(file) as image:
        numbers, counts = np.unique(color_numbers(image), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    colors = [f"#{number.to_bytes(3, 'little').hex()}" for number in numbers[order].tolist()]
    return list(zip(colors, counts[order] / counts.sum()))


def read_image(file: str) -> Image.Image:
    """A control image as RGB, upright; of 16 bits the upper 8."""
    with opened_image(file) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")
