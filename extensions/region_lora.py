"""LoRAs of single regions, an extension of sampling: which tokens they act on.

A region's LoRA is never merged. What it adds is computed for the region's prompt and image tokens,
in every stream that has them; where regions overlap the additions add up. Only a LoRA whose region
is the whole image acts on the base prompt's tokens too, and so it is the same as a merged one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from extensions.lora import MODULATION, Addition, Loras, added, can_be_regional, hooks_for, stream_of
from model.layers import Vectors
from model.transformer import Flux
from regional.extension import Branches, Extension, Forward, Pass
from regional.layout import Layout

TakePart = Callable[[Tensor], Tensor]


def all_of(x: Tensor, dim: int = 1) -> Tensor:
    return x


class OwnModulation:
    """A modulation whose entries are computed when they are read: with vectors for each token,
    all of them at once would take gigabytes."""

    def __init__(self, flux: Flux, given: Pass):
        self.modules = flux.modulated
        self.vec = flux.conditioning(given.timesteps, given.y, given.guidance)

    def __getitem__(self, index: int) -> Vectors:
        return self.modules[index].vectors([self.vec])[0]


def region_loras(
    flux: Flux, layout: Layout, loras: Loras, device: torch.device, dtype: torch.dtype,
    part: TakePart = all_of,
) -> Extension:  # fmt: skip
    """The regions' own LoRAs; in plain steps those of them that ask for it. device, dtype: of the
    layers' inputs. part: which of a stream's tokens, along dimension 0, this process has."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        is_plain = branches.base_ratio is None and branches.prompt == 0
        found = []
        for i, region in enumerate(layout.regions):
            mine = branches.region_bits.cpu() & (1 << i) != 0
            streams = tokens_of(mine, branches, part)
            for lora in region.loras if mine.any() else ():
                acts = lora.plain_steps or not is_plain
                changes = loras[lora.file].changes["flux"] if acts else ()
                for change in filter(can_be_regional, changes):
                    tokens = streams[stream_of(change.name)]
                    found.append(Addition(change, lora.scale, tokens))
        hooks = hooks_for(flux, found, device, dtype)
        changes_modulation = any(MODULATION.search(layer) for layer in hooks)

        def with_loras(given: Pass, step: int) -> Tensor:
            with added(flux, hooks):
                if changes_modulation:
                    given = given._replace(modulation=OwnModulation(flux, given))
                return forward(given, step)

        return with_loras if hooks else forward

    return extend


def tokens_of(mine: Tensor, branches: Branches, part: TakePart = all_of) -> dict[str, Tensor]:
    """A region's tokens in each stream of regional/attention.py's sequences, (L,) bool each.
    mine: (L,) bool, which of the tokens in branches.region_bits are the region's."""
    length = len(branches.order)
    txt, img = mine.split([len(mine) - length, length])
    base = img.all().expand(branches.text_length * branches.has_base)
    txt = part(torch.cat([txt, base]))
    img = part(img)
    return {"txt": txt, "img": img, "both": torch.cat([txt] + [img] * branches.streams)}
