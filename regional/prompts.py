"""Prompts to embeddings: T5's of all, CLIP's pooled one of the base prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from errors import describe, warn
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from regional.extension import Conditioning
from regional.layout import Layout, RegionLora
from regional.mask import RegionTokens

# (t5 or clip, ids (1, L), the LoRAs of the prompt's region) -> embeddings
Encode = Callable[[str, Tensor, Sequence[RegionLora]], Tensor]


def encode_prompts(
    layout: Layout, tokens: RegionTokens | None, t5: T5Tokenizer, clip: CLIPTokenizer,
    encode: Encode,
) -> Conditioning:  # fmt: skip
    """Encode a filled layout's prompts; with CLIP the base prompt alone, by rpg all."""
    prompts = tokens.prompts if tokens else []
    base = tokenize(t5, [layout.prompt], layout.max_sequence_length)
    txt = encode("t5", base, ())
    states = []
    if prompts:
        loras = [region.loras for region in layout.regions] + [()]  # the background's
        ids = tokenize(t5, prompts, layout.region_max_sequence_length)
        # One at a time: in a batch, rounding would depend on the others.
        states = [encode("t5", row[None], own) for row, own in zip(ids, loras)]
    ids, cut = clip([layout.prompt] + prompts * (layout.method == "rpg"))
    if cut[0]:
        warn(f"CLIP reads 77 tokens of the base prompt, not {describe(cut[0])}")
    y = torch.cat([encode("clip", row[None], ()) for row in ids])
    return Conditioning(txt, torch.cat(states) if states else None, y)


def moved(conditioning: Conditioning, *where: Any) -> Conditioning:
    """The same on this device, in this dtype."""
    txt, regions, y, image = conditioning
    if regions is not None:
        regions = [x.to(*where) for x in regions]
    if image is not None:
        image = image.to(*where)
    return Conditioning(txt.to(*where), regions, y.to(*where), image)


def tokenize(tokenizer: T5Tokenizer, prompts: list[str], length: int) -> Tensor:
    """Ids (len(prompts), length)."""
    ids, cut = tokenizer(prompts, length)
    for prompt, rest in zip(prompts, cut):
        if rest:
            warn(f"{prompt[:40]!r}... has over {length} tokens; cut off: {describe(rest)}")
    return ids
