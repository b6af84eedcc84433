"""Attention, a function (q, k, v, block) -> out that may be replaced; RoPE."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Which block asks for attention: "double" or "single", and its index among these."""

    kind: str
    index: int


# q, k, v (normalized and rotated) and the result: (B, heads, L, head_dim)
Attention = Callable[[Tensor, Tensor, Tensor, Block], Tensor]
Join = Callable[[Tensor, Tensor], Tensor]  # (txt, img) -> single blocks' sequence
AfterBlock = Callable[[Tensor, Block], Tensor]  # output -> the next one's input


def plain_attention(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """Every token sees every token."""
    return F.scaled_dot_product_attention(q, k, v)


def text_then_image(txt: Tensor, *img: Tensor) -> Tensor:
    """The sequence of the single blocks, of one image stream or more, joined by tokens."""
    return torch.cat([txt, *img], dim=1)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """A head's dimensions that turn with text, row and column: (16, 56, 56) of 128."""
    side = 7 * head_dim // 16
    return head_dim // 8, side, side


def rope(
    ids: Tensor, axes: tuple[int, ...], theta: float, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """ids (B, L, len(axes)) -> (B, L, head_dim / 2, 2), the cosine and sine of every angle,
    in float64 on the CPU, so that all devices get the same."""
    angles = []
    for axis, dim in enumerate(axes):
        omega = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(ids[..., axis, None].cpu().double() * omega)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(dtype)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its angle: x (B, heads, L, head_dim), pe of `rope`."""
    # In memory it is (B, L, heads, head_dim): attention then writes its output so too,
    # and the next projection copies nothing.
    pairs = x.transpose(1, 2).to(pe.dtype).unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = pe.unsqueeze(2).unbind(-1)
    # Rounded after stacking, torch.compile would store float32 and convert it later.
    first = (even * cos - odd * sin).type_as(x)
    second = (even * sin + odd * cos).type_as(x)
    return torch.stack([first, second], dim=-1).flatten(-2).transpose(1, 2)
