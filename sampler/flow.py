"""Rectified flow: the noise a picture starts from, how latents become tokens, and the Euler loop."""

from collections.abc import Callable
from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor


def noise(width: int, height: int, seed: int) -> Tensor:
    """The latents a seed starts from: (1, 16, height / 8, width / 8) float32, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, 16, height // 8, width // 8), generator=generator, dtype=torch.float32)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, 16, 2 h, 2 w) -> image tokens (B, h w, 64), row by row."""
    return rearrange(latents, "B c (h ph) (w pw) -> B (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, width: int, height: int) -> Tensor:
    """Image tokens (B, h w, 64) -> latents (B, 16, 2 h, 2 w), where w = width / 16 and h = height / 16."""
    return rearrange(tokens, "B (h w) (c ph pw) -> B c (h ph) (w pw)", h=height // 16, w=width // 16, ph=2, pw=2)


def image_ids(width: int, height: int) -> Tensor:
    """Positions (0, row, column) of the image tokens: (1, h w, 3)."""
    row, column = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
    return repeat(torch.stack([torch.zeros_like(row), row, column], dim=-1), "h w axes -> 1 (h w) axes")


def text_ids(length: int) -> Tensor:
    """Positions of text tokens, all zero: (1, length, 3)."""
    return torch.zeros(1, length, 3, dtype=torch.long)


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    img: Tensor,
    sigmas: list[float],
    callback: Callable[[Tensor], None] = lambda img: None,
) -> Tensor:
    """Euler's method from sigmas[0] to sigmas[-1]: img (B, L, 64) float32 in, the same out.

    `velocity(img, t)` is given t (B,) in float32; `callback(img)` is called after every step. Euler keeps no memory:
    "these steps with one velocity, those with another" is two calls on two slices that share a border.
    """
    for t_curr, t_next in pairwise(sigmas):
        t = torch.full((img.shape[0],), t_curr, dtype=torch.float32, device=img.device)
        img = img + (t_next - t_curr) * velocity(img, t).float()
        callback(img)
    return img
