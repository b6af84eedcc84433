"""Prompts to embeddings: T5's for every prompt, and CLIP's pooled one for the base prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from errors import MISSING, InputError, warn
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from regional.extension import Conditioning
from regional.layout import Layout, RegionLora
from regional.mask import RegionTokens

# (t5 or clip, ids (1, L), the LoRAs of the prompt's region) -> embeddings
Encode = Callable[[str, Tensor, Sequence[RegionLora]], Tensor]


def encode_prompts(
    layout: Layout, tokens: RegionTokens | None, t5: T5Tokenizer, clip: CLIPTokenizer, encode: Encode
) -> Conditioning:
    """Encode a filled layout's prompts; with CLIP the base prompt alone, or for method rpg all.

    Each prompt is encoded by itself: in a batch, rounding would depend on the others.
    """
    regions = tokens.prompts if tokens else []
    base_ids = tokenize(t5, [layout.prompt], layout.max_sequence_length)[0]
    region_ids = tokenize(t5, regions, layout.region_max_sequence_length) if regions else []
    clip_ids, cut = clip([layout.prompt] + regions * (layout.method == "rpg"))
    if cut[0]:
        warn(f"CLIP reads 77 tokens of the base prompt; it ignores: {cut[0]!r}")
    loras = [region.loras for region in layout.regions]
    loras += [()] * (len(regions) - len(loras))  # the background has none
    states = [encode("t5", ids[None], own) for ids, own in zip(region_ids, loras)]
    y = torch.cat([encode("clip", ids[None], ()) for ids in clip_ids])
    txt = encode("t5", base_ids[None], ())
    return Conditioning(txt, torch.cat(states) if states else None, y)


def tokenize(tokenizer: T5Tokenizer, prompts: list[str], length: int) -> Tensor:
    """Ids (len(prompts), length)."""
    ids, cut = tokenizer(prompts, length)
    for prompt, rest in zip(prompts, cut):
        if rest:
            warn(f"{prompt[:40]!r}... has more than {length} tokens; cut off: {rest!r}")
    return ids


def check_vocabulary(ids: Tensor, size: int, tokenizer: Path, encoder: Path) -> None:
    """InputError if a tokenizer gives ids that its encoder does not have."""
    if ids.max() >= size:
        problem = f"its ids exceed the {size} tokens of {encoder}; they don't match"
        raise InputError(tokenizer, MISSING, problem)
