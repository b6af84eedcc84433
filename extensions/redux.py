"""FLUX.1 Redux: images as further tokens of a prompt, the base prompt's or a region's.

SigLIP's tokens of an image, projected to the width of T5's, follow those of the prompt.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regional.extension import Conditioning
from regional.layout import ImagePrompt, Layout
from regional.mask import RegionTokens


class ProjectorParams(NamedTuple):
    width: int = 1152  # SigLIP's
    hidden_size: int = 12288
    context_in_dim: int = 4096


class Projector(nn.Module):
    def __init__(self, params: ProjectorParams):
        super().__init__()
        self.redux_up = nn.Linear(params.width, params.hidden_size)
        self.redux_down = nn.Linear(params.hidden_size, params.context_in_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, context_in_dim)."""
        return self.redux_down(F.silu(self.redux_up(x)))


class Vision(NamedTuple):
    """A layout's image prompts, by their files, (1, 3, size, size). name: of the files of what
    encodes them; load: on this device, in this dtype, its networks, one after the other."""

    layout: Layout
    images: dict[str, Tensor]
    name: str
    load: Callable[[torch.device, torch.dtype], Sequence[nn.Module]]

    def extended(
        self, pipeline: Any, conditioning: Conditioning, tokens: RegionTokens | None
    ) -> Conditioning:  # fmt: skip
        """The conditioning with each image's tokens, times its strength, after its prompt's."""

        networks = cache(partial(self.load, pipeline.device, pipeline.dtype))  # while it lasts

        def joined(txt: Tensor, prompts: Sequence[ImagePrompt]) -> Tensor:
            own = [x.strength * self.encoded(x.file, pipeline, networks) for x in prompts]
            return torch.cat([txt, *own])

        txt = joined(conditioning.txt[0], self.layout.image_prompts)[None]
        regions = conditioning.regions
        if tokens and self.layout.regional_steps():
            own = [region.image_prompts for region in self.layout.regions]
            own.append(())  # The background has none.
            regions = [joined(text, prompts) for text, prompts in zip(regions, own)]
        return conditioning._replace(txt=txt, regions=regions)

    def encoded(self, file: str, pipeline: Any, networks: Callable) -> Tensor:
        """An image's tokens (L, context_in_dim), on the CPU; kept with the prompts'."""
        image = self.images[file]
        digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        key = f"redux {self.name} {digest}"
        if key not in pipeline.embeddings:
            x = image.to(pipeline.device, pipeline.dtype)
            for network in networks():
                x = network(x)
            pipeline.embeddings[key] = x[0].cpu()
        return pipeline.embeddings[key]
