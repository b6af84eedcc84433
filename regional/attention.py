"""Regional attention for FLUX.1: what is passed to Flux.forward in place of plain attention.

Two branches (METHOD: "Training-free Regional Prompting for Diffusion Transformers", arXiv 2411.02395):

    base branch       [txt, img]            the base prompt and the whole picture, no mask
    regional branch   [txt_1 .. txt_R, img] every region's prompt, masked by region bits

and the image rows become (1 - base_ratio) * regional + base_ratio * base. In the double blocks both branches share one
image stream, so its projections are computed once. Where the double blocks end the image stream is duplicated: from
there on the base branch runs plain FLUX by itself and only lends its attention to the blend.

Both branches lie in one sequence, the base branch in one piece of it:

    double blocks     [txt_1 .. txt_R, txt, img]
    single blocks     [txt_1 .. txt_R, txt, base img, img]

Tokens of the base branch alone have no region bits: nobody sees them in the regional branch. A cheaper method that the
published one is not, `base_stream: shared`, has one image stream and the first form of the sequence throughout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Block, plain_attention
from model.transformer import text_then_image
from regional.mask import OPEN_BIT, allowed


class Tokens(NamedTuple):
    """What masked attention knows of a sequence's L tokens.

    bits: (L,) int64, the regions of each; 0 for the tokens of the base branch alone.
    base_row: (L,) int64, its row in the base branch's output, where it has one.
    base_weight: (L,) float32 or float64, the base branch's share in its result.
    log_weight: (L, 1 + 2 R) float32, how image tokens weigh each region's text (1 .. R), and its tokens (R + 1 .. 2 R);
    column 0 is zero. as_key, as_query: (L,) int64, which column counts for a token as another's key, and as its query:
    log_weight[q, as_key[k]] + log_weight[k, as_query[q]] is added to a score. All None where nothing is: the published
    method.
    """

    bits: Tensor
    base_row: Tensor
    base_weight: Tensor
    log_weight: Tensor | None = None
    as_key: Tensor | None = None
    as_query: Tensor | None = None

    def blend(self, regional: Tensor, base: Tensor | None) -> Tensor:
        """(1 - base_weight) * regional + base_weight * base, for each token; just `regional` without a base branch."""
        if base is None:
            return regional
        precise = torch.promote_types(base.dtype, torch.float32)
        base = base[:, :, self.base_row].to(precise)
        return torch.lerp(regional.to(precise), base, self.base_weight.to(precise)[:, None]).type_as(regional)


# (q, k, v, base) -> out, for tokens that are known beforehand. q, k, v, out: (B, heads, L, head_dim); base, the base
# branch's output to blend with: (B, heads, L_base, head_dim), or None where there is no such branch
MaskedAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def dense_attention(tokens: Tokens) -> MaskedAttention:
    """The definition, for tests and small sizes: softmax(q k^T / sqrt(d), where allowed) v, blended."""

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if tokens.log_weight is not None:
            weights = tokens.log_weight
            scores = scores + (weights[:, tokens.as_key] + weights[:, tokens.as_query].T).to(scores)
        mask = allowed(tokens.bits[:, None], tokens.bits[None, :])
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        # a row with nothing allowed is 0 / 0; it gives zeros
        return tokens.blend(weights.nan_to_num(0.0) @ v, base)

    return masked


def portable_attention(tokens: Tokens) -> MaskedAttention:
    """The same without any L x L tensor, on any device: one unmasked attention for each distinct value of the bits,
    over just the keys that it may see."""
    groups = []
    kinds = tokens.bits
    if tokens.log_weight is not None:  # rows that weigh their keys apart from those that don't
        kinds = tokens.bits << 1 | tokens.log_weight.any(dim=1)
    for kind in kinds.unique():
        rows = (kinds == kind).nonzero().flatten()
        keys = allowed(tokens.bits, tokens.bits[rows[0]]).nonzero().flatten()
        if len(keys):  # rows with nothing allowed stay zero
            groups.append((rows, keys, added_scores(tokens, rows, keys)))

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(q)
        for rows, keys, added in groups:
            added = added if added is None else added.to(q.dtype).expand(len(rows), -1)
            out[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], added)
        return tokens.blend(out, base)

    return masked


def added_scores(tokens: Tokens, rows: Tensor, keys: Tensor) -> Tensor | None:
    """The log-weights of these rows and keys, (rows, keys), or (1, keys) where all rows have the same, as they have
    but for those on soft edges; None where all are 0."""
    if tokens.log_weight is None:
        return None
    own, columns = tokens.log_weight[rows], tokens.as_query[rows]
    if (own == own[0]).all() and (columns == columns[0]).all():
        own, columns = own[:1], columns[:1]
    added = own[:, tokens.as_key[keys]] + tokens.log_weight[keys][:, columns].T
    return added if added.any() else None


def in_one_sequence(
    bits: Tensor, base_only: int, text_length: int, base_ratio: Tensor, log_weights: Tensor | None = None
) -> Tokens:
    """The tokens of [txt_1 .. txt_R, the first `base_only` tokens of the base branch, img].

    bits: (L,) int64, those of [txt_1 .. txt_R, img]; base_ratio: (L_img,); log_weights: (L_img, 2 R), or None.
    """
    image_length = len(base_ratio)
    texts, image = bits.split([len(bits) - image_length, image_length])
    base_row = torch.arange(text_length + image_length, device=bits.device)
    tokens = Tokens(
        torch.cat([texts, bits.new_zeros(base_only), image]),
        torch.cat([torch.zeros_like(texts), base_row[:base_only], base_row[text_length:]]),
        torch.cat([base_ratio.new_zeros(len(texts)), base_ratio.new_ones(base_only), base_ratio]),
    )
    if log_weights is None:
        return tokens
    regions = log_weights.shape[1] // 2
    length, columns = len(texts) // regions, torch.arange(1, regions + 1, device=bits.device)
    alone = (image & ~(1 << OPEN_BIT))[:, None] == texts[::length]  # image tokens of one region, (L_img, R)
    alone = (alone * (regions + columns)).sum(dim=1)
    own, nothing = columns.repeat_interleave(length), bits.new_zeros(base_only)
    return tokens._replace(
        log_weight=F.pad(log_weights, (1, 0, len(tokens.bits) - image_length, 0)),
        as_key=torch.cat([own, nothing, alone]),
        as_query=torch.cat([regions + own, nothing, alone]),
    )


class RegionalAttention:
    """The attention function and the `join` hook of a regional step.

    It keeps nothing of one call for the next but the masked attentions, each made when a block
    first asks for it.

    make: what makes the masked attention of given tokens: one of the above, or the kernel.
    bits: (L,) int64, those of [txt_1 .. txt_R, img].
    text_length, image_length: how many tokens the base prompt and the image have.
    base_ratio: the base branch's weight in the image tokens, or in each of them, (L_img,).
    is_masked: in which blocks the regional branch is masked. In the others, prompts of regions see
    each other too.
    log_weights: (L_img, 2 R) float32, those of RegionTokens, added to the scores in masked blocks.
    shared: one image stream throughout; see the top of this file.

    The text given to Flux is [txt_1 .. txt_R, txt] along dimension 1; where base_ratio is 0 everywhere there is no
    base branch, and it is [txt_1 .. txt_R].
    """

    def __init__(
        self,
        make: Callable[[Tokens], MaskedAttention],
        bits: Tensor,
        text_length: int,
        image_length: int,
        base_ratio: float | Tensor,
        is_masked: Callable[[Block], bool] = lambda block: True,
        log_weights: Tensor | None = None,
        shared: bool = False,
    ):
        precise = torch.float32 if bits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        ratio = torch.as_tensor(base_ratio, dtype=precise, device=bits.device)
        self.base_ratio = ratio.expand(image_length)
        self.log_weights = log_weights if log_weights is None else log_weights.to(bits.device)
        self.has_base = bool(self.base_ratio.any())
        self.make = make
        self.bits = bits
        self.text_length = text_length
        self.shared = shared
        self.start = len(bits) - image_length  # of the base branch in the sequence
        self.end = self.start + text_length + image_length
        self.is_masked = is_masked
        self.made: dict[tuple[str, bool], MaskedAttention] = {}

    @property
    def streams(self) -> int:
        """How many image streams the single blocks have."""
        return 1 + (self.has_base and not self.shared)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        """q, k, v and the result: (B, heads, L, head_dim), L as at the top of this file."""
        attend = self.attention_of(block.kind, self.is_masked(block))
        base = None
        if self.has_base:
            base = plain_attention(*(x[:, :, self.start : self.end] for x in (q, k, v)), block)
        return attend(q, k, v, base)

    def attention_of(self, kind: str, is_masked: bool) -> MaskedAttention:
        """What blocks of this kind ask, masked or not; it is made when the first of them asks."""
        if (kind, is_masked) not in self.made:
            self.made[kind, is_masked] = self.make(self.tokens(kind, is_masked))
        return self.made[kind, is_masked]

    def tokens(self, kind: str, is_masked: bool) -> Tokens:
        """The sequence of blocks of this kind."""
        base_only = self.text_length if self.has_base else 0
        if kind == "single" and self.streams == 2:
            base_only += len(self.base_ratio)
        bits = self.bits if is_masked else (self.bits != 0).long()
        log_weights = self.log_weights if is_masked else None
        return in_one_sequence(bits, base_only, self.text_length, self.base_ratio, log_weights)

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """The sequence of the single blocks; the image stream is duplicated here."""
        return torch.cat([txt, img, img], dim=1) if self.streams == 2 else text_then_image(txt, img)
