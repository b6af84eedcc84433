"""True classifier-free guidance: away from negative prompts, by a second forward pass."""

import torch
from msgspec.structs import replace
from torch import Tensor

from model.layers import Vectors
from model.transformer import Flux
from regional.extension import Branches, Conditioning, Extension, Forward, Pass
from regional.layout import Layout
from regional.mask import RegionTokens

Prompts = tuple[Layout, RegionTokens | None]


def negative(layout: Layout, tokens: RegionTokens | None) -> Prompts:
    """The layout and its regions with their negative prompts, the layout's for those without."""
    text = layout.negative_prompt
    if tokens:
        own = [region.negative_prompt for region in layout.regions]
        own = [text if prompt is None else prompt for prompt in own]
        tokens = tokens._replace(prompts=[*own, text][: len(tokens.prompts)])
    return replace(layout, prompt=text), tokens


def true_cfg(flux: Flux, layout: Layout, negative: Conditioning) -> Extension:
    """negative + true_cfg_scale * (velocity - negative), as in diffusers."""
    scale = layout.true_cfg_scale

    def extend(forward: Forward, branches: Branches) -> Forward:
        if branches.base_ratio is not None:
            base = negative.txt[0, : branches.text_length * branches.has_base]
            txt = torch.cat([*negative.regions, base])[None]
        elif branches.prompt:
            txt = negative.regions[branches.prompt - 1][None]
        else:
            txt = negative.txt
        y = negative.y[branches.prompt, None]
        modulations: dict[int, list[Vectors]] = {}  # by the id of the prompt's own

        def guided(given: Pass, step: int) -> Tensor:
            key = id(given.modulation)
            if key not in modulations:
                modulations[key] = flux.modulation(given.timesteps, y, given.guidance)
            away = given._replace(txt=txt, y=y, modulation=modulations[key])
            if layout.cfg_batch:
                both, other = forward(stacked(given, away), step).chunk(2)
            else:
                both = forward(given, step)
                other = forward(away, step)
            return other + scale * (both - other)

        return guided

    return extend


def stacked(first: Pass, second: Pass) -> Pass:
    """Two passes that differ in prompt and modulation as one, of a batch of two."""

    def both(one: Vectors, two: Vectors) -> Vectors:
        if isinstance(one, tuple):
            return tuple(map(both, one, two))
        return torch.cat([one, two])

    names = ("img", "txt", "timesteps", "y", "guidance")
    joined = {name: both(getattr(first, name), getattr(second, name)) for name in names}
    modulation = list(map(both, first.modulation, second.modulation))
    return first._replace(modulation=modulation, **joined)
