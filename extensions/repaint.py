"""Images to start from, and parts of them that are drawn anew."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import MISSING, InputError, warn
from extensions.pictures import control_image
from regional.extension import Branches, Extension, Forward, Pass
from regional.images import read_image
from regional.layout import Layout
from regional.mask import pixels_inside
from sampler.flow import noise, pack


def start_of(layout: Layout) -> Tensor | None:
    """The image to start from, (1, 3, height, width) in [-1, 1]."""
    if layout.image is None:
        return None
    file = layout.image.file
    if layout.image.repaint and Path(file).suffix.lower() not in (".png", ".webp", ".bmp"):
        warn(f"{file}: a lossless format would keep the pixels that are not repainted")
    if layout.image.repaint and not repainted(layout).any():
        raise InputError("image.repaint", MISSING, "no pixel's center lies in it")
    return control_image(file, None, layout)


def repainted(layout: Layout) -> np.ndarray:
    """How far each pixel is drawn anew, (height, width) in [0, 1]: 1 inside, and down to 0 at
    `feather` pixels outside."""
    area = layout.image.repaint
    if area.regions is None:
        shapes = [area]
    else:
        shapes = [layout.regions[i] for i in area.regions]
    pixels = (np.arange(layout.width), np.arange(layout.height))
    inside = np.logical_or.reduce([pixels_inside(shape, layout, *pixels) for shape in shapes])
    reach = int(area.feather / 2)
    grown = sums_around(inside, reach) > 0
    return sums_around(grown, reach) / (2 * reach + 1) ** 2


def sums_around(values: np.ndarray, reach: int) -> np.ndarray:
    """The sum of the square of 2 reach + 1 pixels around each, int32, exact; edges repeat."""
    for _ in range(2):  # columns, then rows
        values = np.ascontiguousarray(values.T)
        count = values.shape[1]
        sums = np.zeros((len(values), count + 1), np.int32)
        values.cumsum(axis=1, out=sums[:, 1:])
        low = np.arange(count, dtype=np.int32) - reach
        high = low + 2 * reach + 1
        found = sums.take(high.clip(max=count), axis=1)
        found -= sums.take(low.clip(min=0), axis=1)
        found += (-low).clip(min=0) * values[:, :1]
        found += (high - count).clip(min=0) * values[:, -1:]
        values = found
    return values


def kept(layout: Layout, image: Tensor, seed: int) -> Extension:
    """Leads what is not repainted along the straight line from the noise to the image, whose
    velocity is their difference: with any sampler as if it were put back after each step.
    image: packed latents (1, L_img, 64)."""
    start = pack(noise(layout.width, layout.height, seed)).to(image)  # as `sample` rounds it
    straight = start.float() - image.float()
    anew = torch.from_numpy(repainted(layout) > 0).float()[None, None]
    anew = torch.nn.functional.max_pool2d(anew, 8)  # latents of which any pixel is repainted
    anew = pack(anew.expand(1, 16, -1, -1)).to(image.device)

    def extend(forward: Forward, branches: Branches) -> Forward:
        new = anew[:, branches.order]
        line = straight[:, branches.order]

        def outside_kept(given: Pass, step: int) -> Tensor:
            velocity = forward(given, step)
            return torch.where(new > 0, velocity.to(line), line)

        return outside_kept

    return extend


def pasted(image: Image.Image, layout: Layout) -> Image.Image:
    """The image to start from, at its own size, with what was drawn anew."""
    original = read_image(layout.image.file)
    fraction = Image.fromarray((255 * repainted(layout)).round().astype(np.uint8))
    if image.size != original.size:
        image = image.resize(original.size, Image.Resampling.LANCZOS)
        fraction = fraction.resize(original.size, Image.Resampling.BILINEAR)
    return Image.composite(image, original, fraction)
