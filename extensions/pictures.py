"""Images as the networks read them."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import InputError, warn
from regional.images import read_image
from regional.layout import Layout


def control_image(file: str, preprocess: str | None, layout: Layout) -> Tensor:
    """An image of the layout's size, (1, 3, height, width) in [-1, 1]."""
    image = read_image(file)
    size = layout.width, layout.height
    if abs(image.width * size[1] - image.height * size[0]) > max(size):
        given = f"{image.width} x {image.height} pixels"
        warn(f"{file}: its {given} are stretched to {size[0]} x {size[1]}")
    pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
    if preprocess == "canny":
        try:
            import cv2
        except ImportError as error:
            problem = f"needs OpenCV ({error}); pip install opencv-python-headless"
            raise InputError("preprocess", "canny", problem) from error
        edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200)
        pixels = np.stack([edges] * 3, axis=2)
    return as_pixels(pixels)


def as_pixels(image: np.ndarray) -> Tensor:
    """An image (H, W, 3) of bytes as (1, 3, H, W) in [-1, 1]."""
    # On CPUs, group norms over channels-last images lose digits.
    image = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    return image.float() / 127.5 - 1
