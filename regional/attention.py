"""Regional attention for FLUX.1: what is passed to Flux.forward in place of plain attention.

Two branches (METHOD: "Training-free Regional Prompting for Diffusion Transformers", arXiv 2411.02395):

    base branch       [txt, img]            the base prompt and the whole picture, no mask
    regional branch   [txt_1 .. txt_R, img] every region's prompt, masked by region bits

and the image rows become (1 - base_ratio) * regional + base_ratio * base. In the double blocks both branches share one
image stream, so its projections are computed once. Where the double blocks end the image stream is duplicated: from
there on the base branch runs plain FLUX by itself and only lends its attention to the blend.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Block, plain_attention
from model.transformer import text_then_image
from regional.mask import allowed

# q, k, v: (B, heads, L, head_dim) -> (B, heads, L, head_dim), for tokens whose bits are known beforehand
MaskedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_attention(bits: Tensor) -> MaskedAttention:
    """The definition, for tests and small sizes: softmax(q k^T / sqrt(d), where allowed) v. bits: (L,) int64."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mask = allowed(bits[:, None], bits[None, :])
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return weights.nan_to_num(0.0) @ v  # a row with nothing allowed is 0 / 0; it gives zeros

    return attend


def portable_attention(bits: Tensor) -> MaskedAttention:
    """The same without any L x L tensor, on any device: one unmasked attention for each distinct value of the bits,
    over just the keys that it may see. bits: (L,) int64."""
    groups = []
    for value in bits.unique():
        rows, keys = (bits == value).nonzero().flatten(), allowed(bits, value).nonzero().flatten()
        if len(keys):  # rows with nothing allowed stay zero
            groups.append((rows, keys))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for rows, keys in groups:
            out[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys])
        return out

    return attend


@dataclass(frozen=True)
class RegionalAttention:
    """The attention function and the `join` hook of a regional step. It keeps no state between calls.

    `masked` is the regional branch's masked attention; `text_length` and `image_length` are the base prompt's and the
    picture's tokens. The text given to Flux is [txt, txt_1 .. txt_R] along dimension 1; at base_ratio 0 there is no
    base branch, and it is [txt_1 .. txt_R].
    """

    masked: MaskedAttention
    text_length: int
    image_length: int
    base_ratio: float
    double_inject_interval: int = 1
    single_inject_interval: int = 1

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        """q, k, v and the result (B, heads, L, head_dim), where L is

        text, region texts, image                in the double blocks,
        text, base image, region texts, image    in the single blocks (made by `join`).
        """
        interval = self.double_inject_interval if block.kind == "double" else self.single_inject_interval
        if self.base_ratio == 0:
            return self.regional(q, k, v, block, interval)
        text, image = self.text_length, self.image_length
        if block.kind == "double":
            base = plain_attention(*(torch.cat([x[:, :, :text], x[:, :, -image:]], dim=2) for x in (q, k, v)), block)
            kept, start = base[:, :, :text], text
        else:
            base = plain_attention(*(x[:, :, : text + image] for x in (q, k, v)), block)
            kept, start = base, text + image
        regional = self.regional(*(x[:, :, start:] for x in (q, k, v)), block, interval)
        blended = (1 - self.base_ratio) * regional[:, :, -image:] + self.base_ratio * base[:, :, -image:]
        return torch.cat([kept, regional[:, :, :-image], blended], dim=2)

    def regional(self, q: Tensor, k: Tensor, v: Tensor, block: Block, interval: int) -> Tensor:
        """The regional branch over [txt_1 .. txt_R, img]: masked in every `interval`-th block, open in the others."""
        return self.masked(q, k, v) if block.index % interval == 0 else plain_attention(q, k, v, block)

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """The sequence of the single blocks; the image stream is duplicated here."""
        if self.base_ratio == 0:
            return text_then_image(txt, img)
        return torch.cat([txt[:, : self.text_length], img, txt[:, self.text_length :], img], dim=1)
