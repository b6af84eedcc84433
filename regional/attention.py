"""Regional attention, which replaces plain attention in Flux.forward, and its mask rule.

The two branches of arXiv 2411.02395:

    base branch       [txt, img]            the base prompt and the whole image, no mask
    regional branch   [txt_1 .. txt_R, img] every region's prompt, masked by region bits

The image rows become (1 - base_ratio) * regional + base_ratio * base. The image stream
is duplicated after the double blocks: there the base branch is plain FLUX and only lends
its attention to the blend. Both branches lie in one sequence:

    double blocks     [txt_1 .. txt_R, txt, img]
    single blocks     [txt_1 .. txt_R, txt, base img, img]

Tokens of the base branch alone have no bits, so the regional branch does not see them.
With `base_stream: shared` the sequence has the first form throughout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Block, plain_attention, text_then_image

OPEN_BIT = 62  # of image tokens that all see each other; regions and background have 0-61


def allowed(bits_q: Tensor, bits_k: Tensor) -> Tensor:
    """Whether queries with these region bits see keys with those: the whole mask. To
    try another, change kernel.py too; a token without bits must see and be seen by none."""
    return (bits_q & bits_k) != 0


class Tokens(NamedTuple):
    """What masked attention knows of a sequence's L tokens.

    bits: (L,) int64, the regions of each.
    base_row: (L,) int64, its row in the base branch's output, where it has one.
    base_weight: (L,) float32 or float64, the base branch's fraction of its result.

    Strength and feather add log_weight[q, as_key[k]] + log_weight[k, as_query[q]] to scores:
    log_weight: (L, 1 + 2 R) float32, how image tokens weigh each region's prompt
        (columns 1 .. R) and its image tokens (R + 1 .. 2 R); column 0 is zero.
    as_key, as_query: (L,) int64, a token's column as a key and as a query.
    """

    bits: Tensor
    base_row: Tensor
    base_weight: Tensor
    log_weight: Tensor | None = None
    as_key: Tensor | None = None
    as_query: Tensor | None = None

    def blend(self, regional: Tensor, base: Tensor | None) -> Tensor:
        """(1 - base_weight) * regional + base_weight * base."""
        if base is None:
            return regional
        precise = torch.promote_types(base.dtype, torch.float32)
        base = base[:, :, self.base_row].to(precise)
        weight = self.base_weight.to(precise)[:, None]
        return torch.lerp(regional.to(precise), base, weight).type_as(regional)


# (q, k, v, base) -> out, all (B, heads, L, head_dim). base: the base branch's output.
MaskedAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def dense_attention(tokens: Tokens) -> MaskedAttention:
    """The definition, for tests: softmax(q k^T / sqrt(d), where allowed) v, blended."""

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if tokens.log_weight is not None:
            weights = tokens.log_weight
            added = weights[:, tokens.as_key] + weights[:, tokens.as_query].T
            scores = scores + added.to(scores)
        mask = allowed(tokens.bits[:, None], tokens.bits[None, :])
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        # A row with nothing allowed is 0 / 0; it gives zeros.
        return tokens.blend(weights.nan_to_num(0.0) @ v, base)

    return masked


def portable_attention(tokens: Tokens) -> MaskedAttention:
    """The same without an L x L tensor: for each value of the bits an unmasked attention
    over the keys it may see."""
    groups = []
    kinds = tokens.bits
    if tokens.log_weight is not None:  # rows that weigh their keys are apart
        kinds = tokens.bits << 1 | tokens.log_weight.any(dim=1)
    for kind in kinds.unique():
        rows = (kinds == kind).nonzero().flatten()
        keys = allowed(tokens.bits[rows[0]], tokens.bits).nonzero().flatten()
        if len(keys):  # rows with nothing allowed stay zero
            groups.append((rows, keys, added_scores(tokens, rows, keys)))

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(q)
        for rows, keys, added in groups:
            if added is not None:
                added = added.to(q.dtype).expand(len(rows), -1)
            given = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
            out[:, :, rows] = F.scaled_dot_product_attention(*given, added)
        return tokens.blend(out, base)

    return masked


def added_scores(tokens: Tokens, rows: Tensor, keys: Tensor) -> Tensor | None:
    """The log-weights of these rows and keys, one row if all are equal; None for zeros."""
    if tokens.log_weight is None:
        return None
    own = tokens.log_weight[rows]
    columns = tokens.as_query[rows]
    if (own == own[0]).all() and (columns == columns[0]).all():
        own = own[:1]
        columns = columns[:1]
    added = own[:, tokens.as_key[keys]] + tokens.log_weight[keys][:, columns].T
    return added if added.any() else None


def in_one_sequence(
    bits: Tensor, base_only: int, text_length: int, base_ratio: Tensor,
    log_weights: Tensor | None = None,
) -> Tokens:  # fmt: skip
    """The tokens of [txt_1 .. txt_R, base_only tokens of the base branch alone, img]. bits:
    of [txt_1 .. txt_R, img]; base_ratio: (L_img,); log_weights: (L_img, 2 R)."""
    image_length = len(base_ratio)
    texts, image = bits.split([len(bits) - image_length, image_length])
    nothing = bits.new_zeros(base_only)
    row = torch.arange(text_length + image_length, device=bits.device)
    only = base_ratio.new_ones(base_only)
    tokens = Tokens(
        bits=torch.cat([texts, nothing, image]),
        base_row=torch.cat([texts * 0, row[:base_only], row[text_length:]]),
        base_weight=torch.cat([base_ratio.new_zeros(len(texts)), only, base_ratio]),
    )
    if log_weights is None:
        return tokens
    own, lengths = texts.unique_consecutive(return_counts=True)
    regions = len(own)
    columns = torch.arange(1, regions + 1, device=bits.device)
    of_text = columns.repeat_interleave(lengths)
    # An image token in one region alone has that region's column.
    is_alone = (image & ~(1 << OPEN_BIT))[:, None] == own
    of_image = (is_alone * (regions + columns)).sum(dim=1)
    return tokens._replace(
        log_weight=F.pad(log_weights, (1, 0, len(tokens.bits) - image_length, 0)),
        as_key=torch.cat([of_text, nothing, of_image]),
        as_query=torch.cat([regions + of_text, nothing, of_image]),
    )


class RegionalAttention:
    """The attention function and the `join` hook of a regional step.

    make: makes the masked attention of tokens, when a block first needs it.
    bits: (L,) int64, of [txt_1 .. txt_R, img].
    text_length, image_length: how many tokens base prompt and image have.
    base_ratio: the base branch's weight, one or (L_img,). If it is 0 everywhere, there is
        no base branch: Flux's txt is then [txt_1 .. txt_R] alone.
    is_masked: in which blocks; in others all regions see each other.
    log_weights: (L_img, 2 R), of RegionTokens.
    shared: one image stream throughout.
    """

    def __init__(
        self, make: Callable[[Tokens], MaskedAttention], bits: Tensor, text_length: int,
        image_length: int, base_ratio: float | Tensor,
        is_masked: Callable[[Block], bool] = lambda block: True,
        log_weights: Tensor | None = None, shared: bool = False,
    ):  # fmt: skip
        device = bits.device
        precise = torch.float32 if device.type == "mps" else torch.float64
        ratio = torch.as_tensor(base_ratio, dtype=precise, device=device)
        self.base_ratio = ratio.expand(image_length)
        self.log_weights = None if log_weights is None else log_weights.to(device)
        self.has_base = bool(self.base_ratio.any())
        self.make = make
        self.bits = bits
        self.text_length = text_length
        start = len(bits) - image_length
        self.base = slice(start, start + text_length + image_length)
        self.is_masked = is_masked
        self.streams = 1 + (self.has_base and not shared)  # in the single blocks
        self.made: dict[tuple[str, bool], MaskedAttention] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        key = (block.kind, self.is_masked(block))
        if key not in self.made:
            self.made[key] = self.make(self.tokens(*key))
        base = None
        if self.has_base:
            own = (x[:, :, self.base] for x in (q, k, v))
            base = plain_attention(*own, block)
        return self.made[key](q, k, v, base)

    def tokens(self, kind: str, is_masked: bool) -> Tokens:
        base_only = self.text_length if self.has_base else 0
        if kind == "single" and self.streams == 2:
            base_only += len(self.base_ratio)
        bits = self.bits if is_masked else (self.bits != 0).long()
        weights = self.log_weights if is_masked else None
        return in_one_sequence(bits, base_only, self.text_length, self.base_ratio, weights)

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """The sequence of the single blocks."""
        return text_then_image(txt, *[img] * self.streams)
