"""Small images of what the model expects at each step: its estimate of the final latents, made
RGB by a linear map instead of the VAE."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from regional.extension import Branches, Forward, Pass
from sampler.flow import pack

SAMPLES = 6  # images to fit a map to, of 256 pixels a side
# How the pocket VAE's latents become red, green and blue: a constant, then its 16 channels;
# by benchmarks/preview_map.py. The key is the fingerprint of its weights.
POCKET = "781218b719d2c98f"
RGB = """
154 14 -16 -6 -59 -4 -6 14 17 5 -8 20 21 -23 -13 22 18
143 13 -36 -3 -48 -9 1 23 11 -6 -1 18 27 -7 6 13 9
130 0 -36 -2 -13 -8 6 1 6 5 6 7 5 -4 21 7 15
"""
POCKET_RGB = np.array(RGB.split(), dtype=float).reshape(3, 17).T


class Watch:
    """An extension that keeps what the last pass began with and its velocity."""

    def __init__(self):
        self.latest: tuple | None = None

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        def watched(given: Pass, step: int) -> Tensor:
            velocity = forward(given, step)
            self.latest = (given.img, velocity, given.timesteps, branches.order)
            return velocity

        return watched

    def estimate(self) -> Tensor:
        """The image's packed latents (L_img, 64) float32, if the velocity stayed as it is."""
        img, velocity, t, order = self.latest
        count = len(order)
        noisy = img[0, :count].float()
        tokens = noisy - t[0].float() * velocity[0, :count].float()
        return tokens.cpu()[order.argsort()]


def by_pixel(tokens: Tensor, h: int, w: int) -> np.ndarray:
    """Packed latents (h w, 64) as 1 and 16 channels: (2 h, 2 w, 17)."""
    latents = tokens.reshape(h, w, 16, 2, 2).permute(0, 3, 1, 4, 2).reshape(2 * h, 2 * w, 16)
    return np.concatenate([np.ones((2 * h, 2 * w, 1)), latents.float().numpy()], axis=2)


def in_colors(tokens: Tensor, h: int, w: int, rgb: np.ndarray) -> Image.Image:
    """A small image, (2 h, 2 w), of packed latents (h w, 64). rgb: (17, 3)."""
    colors = by_pixel(tokens, h, w) @ rgb
    return Image.fromarray(colors.clip(0, 255).round().astype(np.uint8))


@torch.inference_mode()
def fitted(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> np.ndarray:
    """The map of another VAE, (17, 3), by least squares over images that it encodes and decodes."""
    random = np.random.default_rng(0)
    rows = []
    colors = []
    for _ in range(SAMPLES):
        latents = vae.encode(pattern(random).to(device, dtype))
        rows.append(by_pixel(pack(latents)[0].cpu(), 16, 16).reshape(-1, 17))
        pixels = avg_pool2d(vae.decode(latents).float(), 8)[0]
        colors.append(127.5 * (pixels.permute(1, 2, 0).reshape(-1, 3).cpu().numpy() + 1))
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(colors))[0]


def pattern(random: np.random.Generator) -> Tensor:
    """Colored rectangles on a smooth background, (1, 3, 256, 256) in [-1, 1]."""
    coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    image = np.array(coarse.resize((256, 256), Image.Resampling.BICUBIC))
    for _ in range(24):
        x, y = random.integers(0, 224, 2)
        width, height = random.integers(16, 96, 2)
        image[y : y + height, x : x + width] = random.integers(0, 256, 3)
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
