"""Regions as one integer per token. `allowed` is the whole mask; it is never stored.

To try another mask rule, change `allowed` here, and its line of Triton in kernel.py; every attention here uses it.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from regional.layout import Layout, Region, read_mask

BACKGROUND_BIT = 61  # the written regions have bits 0-60


def allowed(bits_q: Tensor, bits_k: Tensor) -> Tensor:
    """May a query with these region bits look at a key with those? int64 in, bool out, broadcasting.

    Whatever the rule, a token without bits must see nothing and be seen by nobody: padding has none.
    """
    return (bits_q & bits_k) != 0


class RegionTokens(NamedTuple):
    """The regions on the token grid: a prompt and a bit for each region (the background last, where it is needed),
    and the bits of the image tokens, (h w,) int64, row by row."""

    prompts: list[str]
    prompt_bits: list[int]
    image_bits: Tensor
    warnings: list[str]

    def bits(self, text_length: int) -> Tensor:
        """Bits of the sequence [txt_1 .. txt_R, img] with texts of `text_length` tokens each, (L,) int64."""
        text = torch.tensor([1 << bit for bit in self.prompt_bits]).repeat_interleave(text_length)
        return torch.cat([text, self.image_bits])

    def sorted(self) -> tuple["RegionTokens", Tensor]:
        """The same with the image tokens of equal bits side by side, and their old positions, (h w,) int64.

        Attention does not care about the order of tokens, but tiles of equal bits need no mask. The order is that of
        the reflected Gray code, in which neighbours differ in few regions.
        """
        rank = self.image_bits
        for shift in (1, 2, 4, 8, 16, 32):
            rank = rank ^ (rank >> shift)
        order = rank.argsort(stable=True)
        return self._replace(image_bits=self.image_bits[order]), order


def region_tokens(layout: Layout) -> RegionTokens:
    """Rasterise a layout's regions to its grid of (height / 16) x (width / 16) tokens."""
    inside, warnings = [], []
    for i, region in enumerate(layout.regions):
        tokens = token_grid(region, layout)
        if not tokens.any():
            tokens = most_covered(region, layout)
            warnings.append(f"regions[{i}] covers no token's centre; it gets the one token it covers most.")
        inside.append(tokens)
    owned = np.stack(inside)
    if layout.overlap == "last":
        for i in range(len(owned) - 1):
            owned[i] &= ~owned[i + 1 :].any(axis=0)
            if not owned[i].any():
                warnings.append(f"regions[{i}] lies wholly under later regions and will not show.")
    prompts, bits = [r.prompt for r in layout.regions], list(range(len(owned)))
    image_bits = sum(o.astype(np.int64) << bit for o, bit in zip(owned, bits))
    if (uncovered := image_bits == 0).any():
        prompts, bits = prompts + [layout.background_prompt], bits + [BACKGROUND_BIT]
        image_bits[uncovered] = 1 << BACKGROUND_BIT
    return RegionTokens(prompts, bits, torch.from_numpy(image_bits.flatten()), warnings)


def token_grid(region: Region, layout: Layout) -> np.ndarray:
    """Which tokens' centre pixels, (16 j + 8, 16 i + 8), lie in the region: (height / 16, width / 16) bool."""
    h, w = layout.height // 16, layout.width // 16
    if region.box:
        x0, y0, x1, y1 = region.box
        x, y = 16 * np.arange(w) + 8, 16 * np.arange(h) + 8
        return ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
    mask = read_mask(region.mask)
    row = ((np.arange(h) + 0.5) * mask.shape[0] / h).astype(int)
    column = ((np.arange(w) + 0.5) * mask.shape[1] / w).astype(int)
    return mask[row][:, column]


def most_covered(region: Region, layout: Layout) -> np.ndarray:
    """The one token that a very small region covers most, (height / 16, width / 16) bool."""
    h, w = layout.height // 16, layout.width // 16
    if region.box:
        x0, y0, x1, y1 = region.box
        overlap = [
            np.clip(np.minimum(high, 16 * np.arange(n) + 16) - np.maximum(low, 16 * np.arange(n)), 0, None)
            for low, high, n in ((y0, y1, h), (x0, x1, w))
        ]
        area = np.outer(*overlap)
    else:
        area = np.asarray(
            Image.fromarray(read_mask(region.mask).astype(np.float32)).resize((w, h), Image.Resampling.BOX)
        )
    one = np.zeros(h * w, dtype=bool)
    one[area.argmax()] = True
    return one.reshape(h, w)
