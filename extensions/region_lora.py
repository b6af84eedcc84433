"""LoRAs of single regions, an extension of sampling: which tokens they act on.

A region's LoRA is never merged. What it adds is computed for the region's text and image tokens, in
every stream that has them, and where regions overlap the additions add up. Only a LoRA whose region
is the whole image acts on the base prompt's tokens too, and so it is the same as a merged one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from extensions.lora import MODULATION, Addition, Change, Loras, added, hooks_for
from model.layers import Vectors
from model.transformer import Flux
from regional.extension import Branches, Extension, Forward, Pass
from regional.layout import Layout, RegionLora

# By the first part of a tensor's name.
STREAMS = {"img_in": "img", "txt_in": "txt", "single_blocks": "both", "final_layer": "img"}


def stream_of(name: str) -> str | None:
    """Which tokens a tensor of Flux works on: "img", "txt", "both" in a single block; None for the
    embedders of time, guidance and CLIP's embedding."""
    first, *rest = name.split(".")
    return rest[1][:3] if first == "double_blocks" else STREAMS.get(first)


def all_of(x: Tensor, dim: int = 1) -> Tensor:
    return x


def can_be_regional(change: Change) -> bool:
    return stream_of(change.name) is not None and not change.name.endswith("_norm.scale")


class OwnModulation:
    """A modulation whose entries are computed when they are read: with vectors for each token, all
    of them at once would take gigabytes."""

    def __init__(self, flux: Flux, given: Pass):
        self.modules = flux.modulated
        self.vec = flux.conditioning(given.timesteps, given.y, given.guidance)

    def __getitem__(self, index: int) -> Vectors:
        return self.modules[index].vectors([self.vec])[0]


def region_loras(
    flux: Flux, layout: Layout, loras: Loras, device: torch.device, dtype: torch.dtype,
    part: Callable[[Tensor], Tensor] = all_of,
) -> Extension:  # fmt: skip
    """The regions' own LoRAs; in plain steps those of them that ask for it. device, dtype: of the
    layers' inputs. part: which of a stream's tokens, along dimension 0, this process has."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        is_plain = branches.base_ratio is None and branches.prompt == 0
        own = additions(layout, loras, branches, is_plain, part)
        hooks = hooks_for(flux, own, device, dtype)
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
    """While it lasts, T5 or CLIP (`name`) encodes a prompt of this length with its region's LoRAs."""
    everywhere = torch.ones(length, dtype=torch.bool)
    changes = [(change, x.scale) for x in own for change in loras[x.file].changes[name]]
    found = [Addition(change, scale, everywhere) for change, scale in changes]
    return added(encoder, hooks_for(encoder, found, device, dtype))


def additions(
    layout: Layout, loras: Loras, branches: Branches, is_plain: bool,
    part: Callable[[Tensor], Tensor],
) -> list[Addition]:  # fmt: skip
    """What the regions' LoRAs add in passes of this kind."""
    found = []
    for i, region in enumerate(layout.regions):
        mine = branches.region_bits.cpu() & (1 << i) != 0
        streams = tokens_of(mine, branches, part)
        for lora in region.loras if mine.any() else ():
            changes = loras[lora.file].changes["flux"] if lora.plain_steps or not is_plain else ()
            for change in filter(can_be_regional, changes):
                found.append(Addition(change, lora.scale, streams[stream_of(change.name)]))
    return found


def tokens_of(
    mine: Tensor, branches: Branches, part: Callable[[Tensor], Tensor] = all_of
) -> dict[str, Tensor]:  # fmt: skip
    """A region's tokens in each stream of regional/attention.py's sequences, (L,) bool each. mine:
    (L,) bool, which of the tokens in branches.region_bits are the region's."""
    length = len(branches.order)
    texts, img = mine.split([len(mine) - length, length])
    base = img.all().expand(branches.text_length * branches.has_base)
    txt = part(torch.cat([texts, base]))
    img = part(img)
    return {"txt": txt, "img": img, "both": torch.cat([txt] + [img] * branches.streams)}
