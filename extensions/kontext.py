"""FLUX.1 Kontext's references: images to work from, as tokens between prompts and image.

The layout's are seen by both branches, in all steps; a region's, which have its bit, by its
prompt and image tokens alone. A regional step's sequence is [txt_1 .. txt_R, txt, references,
img], in single blocks [.., references, base img, img]. The layout's take their own rows from
the base branch alone, or where there is none, from attention among themselves: through them
no region sees what another one draws.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from errors import warn
from extensions.pictures import as_pixels
from regional.attention import MaskedAttention, RegionalAttention, Tokens
from regional.extension import Branches, Forward, Pass
from regional.images import read_image
from regional.layout import Layout
from sampler.flow import image_ids

Make = Callable[[Tokens], MaskedAttention]
TALL = {672: 1568, 688: 1504, 720: 1456, 752: 1392, 800: 1328, 832: 1248, 880: 1184, 944: 1104}
SIZES = sorted([*TALL.items(), (1024, 1024), *zip(TALL.values(), TALL)])  # width, height
EVERY = 2**63 - 1  # the bits of the layout's: those of all regions and the background


def read_references(layout: Layout) -> "References | None":
    """A resolved layout's and its regions'; InputError for what can't be read."""
    named = [(file, EVERY, i) for i, file in enumerate(layout.references, 1)]
    first = 1 + len(named)
    for i, region in enumerate(layout.regions):
        if region.mask_inject_steps:
            named += [(file, 1 << i, j) for j, file in enumerate(region.references, first)]
        elif region.references:
            warn(f"regions[{i}].references are unused: none of its steps is regional")
    return References([(pixels_of(file), *more) for file, *more in named]) if named else None


class References:
    """images: (1, 3, H, W) in [-1, 1], each with its bits and its positions' first number."""

    def __init__(self, images: list[tuple[Tensor, int, int]]):
        self.images = images

    def encode(self, latents_of: Callable[[Tensor], Tensor]) -> None:
        """latents_of: of an image, packed, (1, L, 64)."""
        found = []
        for image, bits, first in self.images:
            ids = image_ids(*image.shape[:1:-1]) + torch.tensor([first, 0, 0])  # width, height
            found.append((latents_of(image), ids, torch.full(ids.shape[:2], bits)))
        self.tokens = [torch.cat(x, dim=1) for x in zip(*found)]

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        bits = self.tokens[-1][0]
        is_regional = branches.base_ratio is not None
        own = 1 << branches.prompt - 1 if branches.prompt else EVERY  # one region's, of rpg
        seen = is_regional | (bits == EVERY) | (bits == own)
        if not seen.any():
            return forward
        img, ids, (bits,) = (x[:, seen] for x in self.tokens)
        img = img.to(branches.region_bits.device)
        made = lru_cache(lambda make: ReferenceAttention(make, branches, bits))

        def with_references(given: Pass, step: int) -> Tensor:
            length = given.img.shape[1]
            own = img.to(given.img.dtype).expand(len(given.img), -1, -1)
            both = [torch.cat(x, dim=1) for x in zip((own, ids), (given.img, given.img_ids))]
            longer = Pass(*both, *given[2:])
            if is_regional:
                attention = made(given.attention.make)
                longer = longer._replace(attention=attention, join=attention.join)
            return forward(longer, step)[:, -length:]

        return with_references


class ReferenceAttention(RegionalAttention):
    """Regional attention with references before the image, which have these bits."""

    def __init__(self, make: Make, branches: Branches, bits: Tensor):
        self.length = len(branches.order)
        text, image = branches.region_bits.tensor_split([-self.length])
        every = torch.cat([text, bits.to(text.device), image])
        ratio = torch.cat([(bits == EVERY).double(), branches.base_ratio])
        weights = branches.log_weights
        weights = None if weights is None else F.pad(weights, (0, 0, len(bits), 0))
        base_text = branches.text_length * branches.has_base
        super().__init__(make, every, base_text, len(ratio), ratio, branches.is_masked, weights)
        self.streams = branches.streams
        lends = torch.ones(base_text), bits == EVERY, branches.has_base * torch.ones(self.length)
        self.base = len(text) + torch.cat(lends).nonzero().flatten().to(text.device)

    def tokens(self, kind: str, is_masked: bool) -> Tokens:
        found = super().tokens("double", is_masked)
        row = torch.zeros_like(found.base_row)
        row[self.base] = torch.arange(len(self.base), device=row.device)
        found = found._replace(base_row=row)
        if kind == "double" or self.streams == 1:
            return found
        image = slice(len(row) - self.length, len(row))  # here the base branch's alone
        found = Tokens(*(x if x is None else torch.cat([x, x[image]]) for x in found))
        found.bits[image] = 0
        found.base_weight[image] = 1
        return found

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        return torch.cat([txt, img, *[img[:, -self.length :]] * (self.streams - 1)], dim=1)


def pixels_of(file: str) -> Tensor:
    """An image in the size of SIZES whose aspect ratio is nearest, (1, 3, H, W) in [-1, 1]."""
    image = read_image(file)
    size = min(SIZES, key=lambda x: abs(image.width / image.height - x[0] / x[1]))
    return as_pixels(np.array(image.resize(size, Image.Resampling.LANCZOS)))
