"""LoRAs of single regions: which of a step's tokens they act on.

A region's LoRA is never merged. What it adds is computed for the region's text tokens and for its image tokens, in
every stream that carries them, and where regions overlap the additions add up. The base prompt's tokens belong to no
region: only a LoRA whose region is the whole picture acts on them, and so it is the same as one that is merged.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from extensions.lora import Addition, Change, Lora
from regional.layout import Region

STREAMS = {"img_in": "img", "txt_in": "txt", "single_blocks": "both", "final_layer": "img"}  # by a name's first part


def stream_of(name: str) -> str | None:
    """Which tokens a tensor of Flux works on: "img", "txt", or "both" in a single block; None for what has no tokens
    (the time, guidance and CLIP vectors)."""
    first, *rest = name.split(".")
    return rest[1][:3] if first == "double_blocks" else STREAMS.get(first)


def can_be_regional(change: Change) -> bool:
    return stream_of(change.name) is not None and not change.name.endswith("_norm.scale")


def additions(
    regions: Sequence[Region],
    loras: Mapping[str, Lora],
    tokens_of: Callable[[int], dict[str, Tensor]],
    in_plain_steps: bool = False,
) -> list[Addition]:
    """What the regions' own LoRAs, or those of them that act in plain steps too, add in a step. `tokens_of` gives the
    tokens in each stream of a region, known by its bit: 1 for the first, 2, 4, ... (see below)."""
    found = []
    for i, region in enumerate(regions):
        chosen = [lora for lora in region.loras if lora.plain_steps or not in_plain_steps]
        streams = tokens_of(1 << i) if chosen else {}
        for lora in chosen:
            changes = [change for change in loras[lora.file].changes["flux"] if can_be_regional(change)]
            found += [Addition(change, lora.scale, streams[stream_of(change.name)]) for change in changes]
    return found


def all_of(x: Tensor, dim: int = 1) -> Tensor:
    return x


def regional_step(
    mine: Tensor,
    text_length: int,
    image_length: int,
    has_base: bool,
    streams: int,
    part: Callable[[Tensor, int], Tensor] = all_of,
) -> dict[str, Tensor]:
    """A region's tokens in a regional step, in each stream of regional/attention.py's sequences, (L,) bool each.

    mine: (L,) bool, which tokens of [txt_1 .. txt_R, img] are the region's. streams: image streams in single blocks.
    part: which of a stream's tokens this process has.
    """
    texts, img = mine.split([len(mine) - image_length, image_length])
    txt = part(torch.cat([texts, img.all().expand(text_length * has_base)]), 0)
    img = part(img, 0)
    return {"txt": txt, "img": img, "both": torch.cat([txt] + [img] * streams)}


def plain_step(img: Tensor, text_length: int, part: Callable[[Tensor, int], Tensor] = all_of) -> dict[str, Tensor]:
    """The same in a plain step, from the region's image tokens (L_img,) bool."""
    return regional_step(img, text_length, len(img), has_base=True, streams=1, part=part)
