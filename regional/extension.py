"""The types between sampling and its extensions; see docs/extensions.md."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from model.attention import AfterBlock, Attention, Block, Join
from model.layers import Vectors


class Conditioning(NamedTuple):
    """The encoded prompts: txt (1, L_txt, context), the base prompt; regions, R of (L_i,
    context); y (1, vec), the base prompt's pooled CLIP embedding, for rpg (1 + R, vec).
    image: (1, L_img, 64), packed latents to start from."""

    txt: Tensor
    regions: Sequence[Tensor] | None
    y: Tensor
    image: Tensor | None = None


class Pass(NamedTuple):
    """Flux.forward's arguments, then what the modulation was computed from."""

    img: Tensor
    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    modulation: Sequence[Vectors]
    attention: Attention
    join: Join
    after_block: AfterBlock
    timesteps: Tensor
    y: Tensor
    guidance: Tensor


class Branches(NamedTuple):
    """What passes of one kind share: plain, regional, or by rpg one region's.

    region_bits: (L,) int64, of [txt_1 .. txt_R, img], in passes of one prompt of img alone.
    order: (L_img,), the image tokens' places in the image.
    text_length: the base prompt's tokens, or the region's. prompt: its row in y.
    has_base: these tokens are there, after the regions'.
    streams: image streams in the single blocks. The rest are RegionalAttention's.
    """

    region_bits: Tensor
    order: Tensor
    text_length: int
    prompt: int = 0
    has_base: bool = True
    streams: int = 1
    base_ratio: Tensor | None = None
    is_masked: Callable[[Block], bool] | None = None
    log_weights: Tensor | None = None


Forward = Callable[[Pass, int], Tensor]  # a pass and the step's index -> the velocity
Extension = Callable[[Forward, Branches], Forward]
