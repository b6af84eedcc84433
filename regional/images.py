"""The images that a layout names: masks, maps and control images."""

import os
import stat
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

from errors import InputError

MAX_PICTURE = 25_000_000  # pixels of a mask or map; reading so many takes up to 500 MB (WebP)


MAX_PICTURE_BYTES = 8 * MAX_PICTURE  # of its file


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of all that Pillow reads; for EPS it would run Ghostscript


def check_file(file: str | Path, most: int) -> None:
    """OSError for what is not to be read: pipes and devices, which may never end, and more bytes than `most`."""
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):
        raise OSError("it is no file")
    if about.st_size > most:
        raise OSError(f"its {about.st_size:,} bytes are more than {most:,}")


def readable(read: Callable[[str], Any], file: str, where: str) -> Any:
    """What `read` makes of a picture's file; InputError if it can't."""
    try:
        return read(file)
    except FileNotFoundError:
        raise InputError(where, Path(file), "there is no such file") from None
    except Exception as error:  # of broken files Pillow raises almost any: TypeError, SyntaxError, struct.error ...
        raise InputError(where, Path(file), f"not a picture that can be read ({error})") from None


quiet = partial(warnings.catch_warnings, action="ignore")  # what matters of Pillow's warnings is an error here


def opened(file: str) -> Image.Image:
    check_file(file, MAX_PICTURE_BYTES)
    with quiet():
        picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > MAX_PICTURE:
        picture.close()
        raise ValueError(f"its {picture.width} x {picture.height} pixels are more than {MAX_PICTURE:,}")
    return picture


def read_mask(file: str) -> np.ndarray:
    """A mask picture as (rows, columns) bool: inside is what is white, from 128 of 255 on; transparent is outside."""
    with quiet(), opened(file) as picture:
        if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion would take all above 255 for white
            return np.asarray(picture) >= 128 * 257
        if picture.has_transparency_data:
            gray, alpha = picture.convert("LA").split()
            return np.asarray(ImageChops.multiply(gray, alpha)) >= 128
        return np.asarray(picture.convert("L")) >= 128


def read_color(file: str, color: Any) -> np.ndarray:
    """Which pixels of a map have this color, (rows, columns) bool. An index is a palette's or a gray value; in a map of
    colors R + 256 G + 65536 B, as in COCO's panoptic pictures."""
    with quiet(), opened(file) as picture:
        if isinstance(color, int) and picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
            return np.asarray(picture) == color
        if isinstance(color, int):
            color = (color & 255, color >> 8 & 255, color >> 16)
        elif isinstance(color, str):
            color = bytes.fromhex(color[1:])
        return np.logical_and.reduce(
            [np.asarray(band) == value for band, value in zip(picture.convert("RGB").split(), color)]
        )


def read_picture(file: str) -> Image.Image:
    """A control picture as RGB, upright; of 16 bits the upper 8."""
    with quiet(), opened(file) as picture:
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        ImageOps.exif_transpose(picture, in_place=True)
        return picture.convert("RGB")
