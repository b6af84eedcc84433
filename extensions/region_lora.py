"""LoRAs of single regions, an extension of sampling.

They act on the region's prompt and image tokens in every stream, and add up where regions
overlap; one of the whole image also acts on the base prompt, like a merged one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from extensions.lora import MODULATION, Loras, added, can_be_regional, hooks_for, stream_of
from model.layers import Vectors
from model.transformer import Flux
from regional.extension import Branches, Extension, Forward, Pass
from regional.layout import Layout, RegionLora


class OwnModulation:
    """Modulation, entry by entry: vectors for each token take gigabytes."""

    def __init__(self, flux: Flux, given: Pass):
        self.modules = flux.modulated
        self.vec = flux.conditioning(given.timesteps, given.y, given.guidance)

    def __getitem__(self, index: int) -> Vectors:
        return self.modules[index].vectors([self.vec])[0]


def region_loras(
    flux: Flux, layout: Layout, loras: Loras, device: torch.device, dtype: torch.dtype,
    part: Callable[[Tensor], Tensor] = lambda x: x,
) -> Extension:  # fmt: skip
    """device, dtype: of the layers' inputs; part: of the tokens (L,), a process's."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        is_plain = branches.base_ratio is None and branches.prompt == 0
        found = []
        for i, region in enumerate(layout.regions):
            mine = branches.region_bits.cpu() & (1 << i) != 0
            streams = tokens_of(mine, branches, part)
            for lora in region.loras if mine.any() else ():
                if is_plain and not lora.plain_steps:
                    continue
                for change in filter(can_be_regional, loras[lora.file].changes["flux"]):
                    tokens = streams[stream_of(change.name)]
                    found.append((change, lora.scale, tokens))
        hooks = hooks_for(flux, found, device, dtype)
        changes_modulation = any(MODULATION.search(layer) for layer in hooks)

        def with_loras(given: Pass, step: int) -> Tensor:
            with added(flux, hooks):
                if changes_modulation:
                    given = given._replace(modulation=OwnModulation(flux, given))
                return forward(given, step)

        return with_loras if hooks else forward

    return extend


def prompt_loras(
    encoder: nn.Module, name: str, own: Sequence[RegionLora], loras: Loras, length: int,
    device: torch.device, dtype: torch.dtype,
) -> AbstractContextManager:  # fmt: skip
    """While it lasts, T5 or CLIP (`name`) encodes a prompt with its region's LoRAs."""
    everywhere = torch.ones(length, dtype=torch.bool)
    found = []
    for entry in own:
        for change in loras[entry.file].changes[name]:
            found.append((change, entry.scale, everywhere))
    return added(encoder, hooks_for(encoder, found, device, dtype))


def tokens_of(mine: Tensor, branches: Branches, part: Callable) -> dict[str, Tensor]:
    """A region's tokens by stream, (L,) bool; mine: those in region_bits."""
    length = len(branches.order)
    txt, img = mine.split([len(mine) - length, length])
    base = img.all().expand(branches.text_length * branches.has_base)
    txt = part(torch.cat([txt, base]))
    img = part(img)
    return {"txt": txt, "img": img, "both": torch.cat([txt] + [img] * branches.streams)}
