"""The noise, how latents become tokens, and the tokens' positions."""

import torch
from einops import rearrange, repeat
from torch import Tensor


def noise(width: int, height: int, seed: int) -> Tensor:
    """The noise of a seed: (1, 16, height / 8, width / 8), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, 16, height // 8, width // 8)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


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
