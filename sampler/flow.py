"""Rectified flow: noise, its levels, how latents become tokens, and the Euler loop."""

import math
from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

# (img (B, L_img, 64), t, step) -> (B, L_img, 64). t, in [0, 1], is where the velocity is
# asked for; the step's index only selects what is scheduled.
Velocity = Callable[[Tensor, float, int], Tensor]


def noise(width: int, height: int, seed: int) -> Tensor:
    """The noise of a seed: (1, 16, height / 8, width / 8), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, 16, height // 8, width // 8)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def sigmas(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """`steps + 1` noise levels from 1 to 0.

    With `shift` (FLUX.1-dev, not schnell) large images spend more steps at high noise: t
    becomes e^mu / (e^mu + 1 / t - 1), mu linear in the image tokens, through (256, 0.5)
    and (4096, 1.15).
    """
    linear = [1 - i / steps for i in range(steps + 1)]
    if not shift:
        return linear
    mu = 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    e = math.exp(mu)
    return [e / (e + 1 / t - 1) if t > 0 else 0.0 for t in linear]


def pack(latents: Tensor) -> Tensor:
    """Latents (B, 16, 2 h, 2 w) -> image tokens (B, h w, 64), row by row."""
    return rearrange(latents, "B c (h ph) (w pw) -> B (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, width: int, height: int) -> Tensor:
    """Image tokens (B, h w, 64) -> latents (B, 16, 2 h, 2 w)."""
    sizes = {"h": height // 16, "w": width // 16, "ph": 2, "pw": 2}
    return rearrange(tokens, "B (h w) (c ph pw) -> B c (h ph) (w pw)", **sizes)


def image_ids(width: int, height: int) -> Tensor:
    """Positions (0, row, column) of the image tokens: (1, h w, 3)."""
    rows = torch.arange(height // 16)
    columns = torch.arange(width // 16)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return repeat(ids, "h w axes -> 1 (h w) axes")


def text_ids(length: int) -> Tensor:
    """Positions of text tokens, all zero: (1, length, 3)."""
    return torch.zeros(1, length, 3, dtype=torch.long)


def denoise(
    velocity: Velocity,
    img: Tensor,
    sigmas: list[float],
    steps: range,
    callback: Callable[[Tensor], None] = lambda img: None,
) -> Tensor:
    """Euler's method: step i leads img (B, L, 64), float32, from sigmas[i] to sigmas[i + 1].
    It has no memory: two calls may split the steps. callback: called after each."""
    for step in steps:
        t = sigmas[step]
        img = img + (sigmas[step + 1] - t) * velocity(img, t, step).float()
        callback(img)
    return img
