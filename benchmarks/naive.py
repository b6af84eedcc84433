"""The published algorithm re-created over our modules' weights, with all that it computes for nothing: the one to beat.

A regional step gives what ours gives. It takes longer, because

- the mask is a dense (L, L) tensor that goes into `scaled_dot_product_attention`;
- in the double blocks each branch projects the image by itself, before attention and after it;
- the base stream goes through the single blocks to its end, and the last block computes all rows.

A step after the regional ones gives what plain FLUX gives, and still carries a second stream that nothing reads: in the
double blocks a text through its MLP, in the single blocks a whole sequence through norm, MLP and output projection.

Where it was easy to be better than what was published, it is: q, k and v are one matrix product, the mask lies on the
device for the whole run, and the position tables are made once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.attention import Block, rope, rope_axes
from model.layers import DoubleStreamBlock, SingleStreamBlock, Vectors, modulate
from model.transformer import Flux
from sampler.flow import text_ids


def branch(
    block: DoubleStreamBlock, img: Tensor, txt: Tensor, vectors: Vectors, pe: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One branch's attention with all projections: what it adds to txt (B, L_txt, D) and to img (B, L_img, D)."""
    out = F.scaled_dot_product_attention(*block.project(img, txt, vectors, pe), attn_mask=mask)
    txt_out, img_out = rearrange(out, "B H L d -> B L (H d)").split([txt.shape[1], img.shape[1]], dim=1)
    return block.txt_attn.proj(txt_out), block.img_attn.proj(img_out)


def after_attention(x: Tensor, attn: Tensor, vectors: Tensor, mlp: nn.Module) -> Tensor:
    x = x + vectors.chunk(6, dim=-1)[2] * attn
    return after_mlp(x, vectors, mlp)


def after_mlp(x: Tensor, vectors: Tensor, mlp: nn.Module) -> Tensor:
    *_, shift, scale, gate = vectors.chunk(6, dim=-1)
    return x + gate * mlp(modulate(x, shift, scale))


def double_block(
    block: DoubleStreamBlock,
    img: Tensor,
    txt: Tensor,
    texts: Tensor,
    vec: Tensor,
    pe: Tensor,
    regional_pe: Tensor,
    mask: Tensor | None,
    base_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """img (B, L_img, D), txt (B, L_txt, D), texts (B, R L_txt, D), vec (B, D) -> new img, txt, texts."""
    vectors, texts_vectors = block.vectors([vec])[0], block.txt_mod(vec)
    img_vectors, txt_vectors = vectors
    txt_attn, base = branch(block, img, txt, vectors, pe)
    texts_attn, regional = branch(block, img, texts, (img_vectors, texts_vectors), regional_pe, mask)
    img = after_attention(img, (1 - base_ratio) * regional + base_ratio * base, img_vectors, block.img_mlp)
    txt = after_attention(txt, txt_attn, txt_vectors, block.txt_mlp)
    return img, txt, after_attention(texts, texts_attn, texts_vectors, block.txt_mlp)


def single_block(
    block: SingleStreamBlock,
    base: Tensor,
    regional: Tensor,
    vec: Tensor,
    pe: Tensor,
    regional_pe: Tensor,
    mask: Tensor | None,
    base_ratio: float,
    image_length: int,
) -> tuple[Tensor, Tensor]:
    """base [txt, img], regional [txt_1 .. txt_R, img], (B, L, D), vec (B, D) -> new base, regional."""
    base_vectors, vectors = block.vectors([vec])[0], block.vectors([vec])[0]
    *base_qkv, base_h = block.project(base, base_vectors, pe)
    *qkv, h = block.project(regional, vectors, regional_pe)
    base_attn = F.scaled_dot_product_attention(*base_qkv)
    attn = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    texts, img = attn.split([attn.shape[2] - image_length, image_length], dim=2)
    img = (1 - base_ratio) * img + base_ratio * base_attn[:, :, base_attn.shape[2] - image_length :]
    regional = block.finish(regional, h, vectors, torch.cat([texts, img], dim=2))
    return block.finish(base, base_h, base_vectors, base_attn), regional


def late_double_block(
    block: DoubleStreamBlock, img: Tensor, txt: Tensor, unread: Tensor, vec: Tensor, pe: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """After the regional steps: img (B, L_img, D), txt and unread (B, L_txt, D), vec (B, D) -> the same, new."""
    vectors, unread_vectors = block.vectors([vec])[0], block.txt_mod(vec)
    img_vectors, txt_vectors = vectors
    txt_attn, img_attn = branch(block, img, txt, vectors, pe)
    img = after_attention(img, img_attn, img_vectors, block.img_mlp)
    txt = after_attention(txt, txt_attn, txt_vectors, block.txt_mlp)
    return img, txt, after_mlp(unread, unread_vectors, block.txt_mlp)


def late_single_block(
    block: SingleStreamBlock, x: Tensor, unread: Tensor, vec: Tensor, pe: Tensor
) -> tuple[Tensor, Tensor]:
    """After the regional steps: x and unread (B, L, D), vec (B, D) -> the same, new."""
    vectors, unread_vectors = block.vectors([vec])[0], block.vectors([vec])[0]
    q, k, v, h = block.project(x, vectors, pe)
    attn = F.scaled_dot_product_attention(q, k, v)
    unread_h = modulate(unread, *unread_vectors.chunk(3, dim=-1)[:2])
    return block.finish(x, h, vectors, attn), block.finish(unread, unread_h, unread_vectors, attn)


class Blocks(NamedTuple):
    """The four kinds of blocks, as they are or compiled."""

    double: Callable[..., tuple[Tensor, Tensor, Tensor]] = double_block
    single: Callable[..., tuple[Tensor, Tensor]] = single_block
    late_double: Callable[..., tuple[Tensor, Tensor, Tensor]] = late_double_block
    late_single: Callable[..., tuple[Tensor, Tensor]] = late_single_block


EAGER = Blocks()


def compiled_blocks() -> Blocks:
    return Blocks(*(torch.compile(function, dynamic=True) for function in EAGER))


class Naive:
    """The steps of one picture.

    img_ids: (1, L_img, 3), in any order, that of the image tokens. text_length: the tokens of each prompt.
    mask: (L, L) bool over [txt_1 .. txt_R, img], true where a query may look at a key; of no use to `late_step`.
    is_masked: in which blocks the regional branch is masked; in the others it is open.
    """

    def __init__(
        self,
        flux: Flux,
        img_ids: Tensor,
        text_length: int,
        mask: Tensor,
        base_ratio: float,
        is_masked: Callable[[Block], bool] = lambda block: True,
        blocks: Blocks = EAGER,
    ):
        self.flux, self.mask, self.base_ratio, self.is_masked, self.blocks = flux, mask, base_ratio, is_masked, blocks
        self.image_length = img_ids.shape[1]
        self.pe = self.table(img_ids, text_length)
        self.regional_pe = self.table(img_ids, len(mask) - self.image_length)

    def table(self, img_ids: Tensor, texts: int) -> Tensor:
        """The positions of so many text tokens and the image, (1, L, d / 2, 2)."""
        params, weight = self.flux.params, self.flux.img_in.weight
        ids = torch.cat([text_ids(texts), img_ids], dim=1)
        precise = torch.promote_types(weight.dtype, torch.float32)
        axes = rope_axes(params.hidden_size // params.num_heads)
        return rope(ids, axes, params.theta, precise).to(weight.device)

    def regional_step(
        self, img: Tensor, txt: Tensor, regions: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None
    ) -> Tensor:
        """The velocity (1, L_img, out_channels) of img (1, L_img, in_channels), for the base prompt's txt (1, L_txt,
        context) and those of the regions (R, L_txt, context); the rest as for Flux."""
        flux, shared = self.flux, (self.pe, self.regional_pe)
        vec = flux.conditioning(timesteps, y, guidance)
        img, txt, texts = flux.img_in(img), flux.txt_in(txt), flux.txt_in(regions.flatten(0, 1)[None])
        for index, block in enumerate(flux.double_blocks):
            mask = self.mask if self.is_masked(Block("double", index)) else None
            img, txt, texts = self.blocks.double(block, img, txt, texts, vec, *shared, mask, self.base_ratio)
        base, regional = torch.cat([txt, img], dim=1), torch.cat([texts, img], dim=1)
        for index, block in enumerate(flux.single_blocks):
            mask = self.mask if self.is_masked(Block("single", index)) else None
            base, regional = self.blocks.single(
                block, base, regional, vec, *shared, mask, self.base_ratio, self.image_length
            )
        return self.velocity(regional, vec)

    def late_step(self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The velocity after the regional steps, as that of regional_step."""
        flux = self.flux
        vec = flux.conditioning(timesteps, y, guidance)
        img, txt, unread = flux.img_in(img), flux.txt_in(txt), flux.txt_in(txt)
        for block in flux.double_blocks:
            img, txt, unread = self.blocks.late_double(block, img, txt, unread, vec, self.pe)
        x, unread = torch.cat([txt, img], dim=1), torch.cat([unread, img], dim=1)
        for block in flux.single_blocks:
            x, unread = self.blocks.late_single(block, x, unread, vec, self.pe)
        return self.velocity(x, vec)

    def velocity(self, x: Tensor, vec: Tensor) -> Tensor:
        img = x[:, x.shape[1] - self.image_length :]
        return self.flux.final_layer(img, self.flux.final_layer.vectors([vec])[0])
