"""Variants of the method that benchmarks/control.py measures and that are no settings of the program: each an extension
of the sampling loop (docs/extensions.md)."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model.attention import Block, plain_attention, text_then_image  # noqa: E402
from model.transformer import Flux, Hidden  # noqa: E402
from pocket.judge import Case  # noqa: E402
from regional.attention import (  # noqa: E402
    OPEN_BIT,
    MaskedAttention,
    RegionalAttention,
    Tokens,
    portable_attention,
)
from regional.extension import Branches, Extension, Forward, Pass  # noqa: E402
from regional.mask import BACKGROUND_BIT  # noqa: E402
from sampler.flow import text_ids  # noqa: E402


def texts_at_corners(case: Case, prompts: int) -> Extension:
    """Gives each region's prompt the position of its region's upper left token, in place of 0. prompts: those of the
    regional pass, the background's included."""
    tops, lefts = (case.areas.any(axis).argmax(1) // 16 for axis in (2, 1))

    def extend(forward: Forward, branches: Branches) -> Forward:
        if branches.is_masked is None:  # a plain pass
            return forward

        def at_corners(given: Pass, step: int) -> Tensor:
            ids = given.txt_ids.clone()
            length = (ids.shape[1] - branches.has_base * branches.text_length) // prompts
            for i, corner in enumerate(zip(tops, lefts)):
                ids[:, i * length : (i + 1) * length, 1:] = torch.tensor(corner)
            return forward(given._replace(txt_ids=ids), step)

        return at_corners

    return extend


def open_images(blocks: Callable[[Block], bool]) -> Extension:
    """In these blocks all image tokens see each other; prompts stay apart (IDAttn's harmonious mask)."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        if branches.is_masked is None:
            return forward
        bits = branches.region_bits.clone()
        bits[-len(branches.order) :] |= 1 << OPEN_BIT
        lengths = (branches.text_length, len(branches.order))
        how = (branches.base_ratio, branches.is_masked, branches.log_weights)
        is_shared = branches.has_base and branches.streams == 1
        opened = RegionalAttention(portable_attention, bits, *lengths, *how, is_shared)

        def mixed(given: Pass, step: int) -> Tensor:
            def attention(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
                return (opened if blocks(block) else given.attention)(q, k, v, block)

            return forward(given._replace(attention=attention), step)

        return mixed

    return extend


def one_way() -> Extension:
    """The background's image tokens see those of all regions, not the other way round (LayerBind, eq. 8)."""

    def attention(tokens: Tokens, image_length: int) -> MaskedAttention:
        bits = tokens.bits
        is_image = torch.arange(len(bits), device=bits.device) >= len(bits) - image_length
        is_background = is_image & (bits == 1 << BACKGROUND_BIT)
        mask = (bits[:, None] & bits != 0) | is_background[:, None] & is_image

        def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, mask)
            return tokens.blend(out.nan_to_num(0.0), base)  # rows of the base branch see nothing

        return masked

    def extend(forward: Forward, branches: Branches) -> Forward:
        if branches.is_masked is None:
            return forward
        lengths = (branches.text_length, len(branches.order))
        how = (branches.base_ratio, branches.is_masked)
        make = partial(attention, image_length=len(branches.order))
        other = RegionalAttention(make, branches.region_bits, *lengths, *how)

        def seen(given: Pass, step: int) -> Tensor:
            return forward(given._replace(attention=other), step)

        return seen

    return extend


def hard_binding(steps: int, regions: int) -> Extension:
    """RAG's (arXiv 2411.06558, eq. 2-4), of the latents: in the first steps each region is drawn alone, as an image of
    its own tokens, whose positions begin at 0, by its own prompt."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        if branches.is_masked is None:
            return forward
        image = branches.region_bits[-len(branches.order) :]
        own = [(image >> i & 1).nonzero().flatten() for i in range(regions)]

        def bound(given: Pass, step: int) -> Tensor:
            velocity = forward(given, step)
            if step >= steps:
                return velocity
            texts = given.txt.shape[1] - branches.has_base * branches.text_length
            length = texts // len((branches.region_bits[:texts]).unique())
            total, count = torch.zeros_like(velocity), torch.zeros_like(velocity)
            for i, rows in enumerate(own):
                ids = given.img_ids[:, rows]
                alone = given._replace(
                    img=given.img[:, rows], img_ids=ids - ids.amin(dim=1, keepdim=True),
                    txt=given.txt[:, i * length : (i + 1) * length], txt_ids=text_ids(length),
                    attention=plain_attention, join=text_then_image,
                )  # fmt: skip
                total[:, rows] += forward(alone, step)
                count[:, rows] += 1
            return torch.where(count > 0, total / count.clamp(min=1), velocity)

        return bound

    return extend


class StepCache:
    """First-block cache: the blocks after the first are skipped while the first one's residual has changed by less than
    `threshold` since they were last computed. skipped: how many passes."""

    def __init__(self, flux: Flux, threshold: float):
        self.flux, self.threshold, self.skipped = flux, threshold, 0

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        kept: list[Tensor] = []  # the first block's residual, and what the others added

        def cached(given: Pass, step: int) -> Tensor:
            img, img_ids, txt, txt_ids, modulation, *hooks = given[:8]
            embedded = self.flux.embed(img, img_ids, txt, txt_ids)
            first = self.flux.blocks(embedded, modulation, *hooks, 0, 1)
            residual = first.img - embedded.img
            if kept and (residual - kept[0]).abs().mean() < self.threshold * kept[0].abs().mean():
                self.skipped += 1
                return self.flux.decode(Hidden(first.img + kept[1], None, first.pe, first.length), modulation)
            last = self.flux.blocks(first, modulation, *hooks, 1)
            kept[:] = residual, last.img[:, -last.length :] - first.img
            return self.flux.decode(last, modulation)

        return cached
