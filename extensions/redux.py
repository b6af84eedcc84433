"""FLUX.1 Redux: images as further tokens of a prompt, the base prompt's or a region's.

SigLIP's tokens of an image, projected to the width of T5's, follow those of the prompt.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, warn
from extensions.siglip import SIGLIP, pixels_of, siglip_params
from formats import components
from formats.hub import locate
from formats.recognize import FOLDERS, POCKET, Source, pick
from formats.safetensors import wrong
from regional.extension import Conditioning
from regional.layout import ImagePrompt, Layout
from regional.mask import RegionTokens

OFFICIAL = "black-forest-labs/FLUX.1-Redux-dev"
POCKET_REDUX = POCKET.parent / "adapters" / "redux"
FILES = [FOLDERS["siglip"] + FOLDERS["redux"]]  # of a repository


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


def projector_params(source: Source) -> ProjectorParams:
    hidden, width = source.shape("redux_up.weight")
    context, _ = source.shape("redux_down.weight")
    return ProjectorParams(width, hidden, context)


PROJECTOR = components.Kind(Projector, projector_params)


class Vision(NamedTuple):
    """A layout's image prompts, by their files, (1, 3, size, size), and what encodes them."""

    layout: Layout
    siglip: Source
    projector: Source
    images: dict[str, Tensor]

    def extended(
        self, pipeline: Any, conditioning: Conditioning, tokens: RegionTokens | None
    ) -> Conditioning:  # fmt: skip
        """The conditioning with each image's tokens, times its strength, after its prompt's."""

        def joined(txt: Tensor, prompts: Sequence[ImagePrompt]) -> Tensor:
            own = [x.strength * self.encoded(pipeline, self.images[x.file]) for x in prompts]
            return torch.cat([txt, *own])

        txt = joined(conditioning.txt[0], self.layout.image_prompts)[None]
        regions = conditioning.regions
        if tokens and self.layout.regional_steps():
            own = [region.image_prompts for region in self.layout.regions]
            own.append(())  # The background has none.
            regions = [joined(text, prompts) for text, prompts in zip(regions, own)]
        return conditioning._replace(txt=txt, regions=regions)

    def encoded(self, pipeline: Any, image: Tensor) -> Tensor:
        """An image's tokens (L, context_in_dim), on the CPU; kept with the prompts'."""
        digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        key = f"redux {self.siglip.path} {self.projector.path} {digest}"
        if key not in pipeline.embeddings:
            where = pipeline.device, pipeline.dtype
            x = image.to(*where)
            for source, kind in ((self.siglip, SIGLIP), (self.projector, PROJECTOR)):
                loaded = pipeline.parts.vision
                if source.path not in loaded:
                    loaded[source.path] = components.load(source, *where, kind=kind)
                x = loaded[source.path](x)
            pipeline.embeddings[key] = x[0].cpu()
        return pipeline.embeddings[key]


def vision_of(layout: Layout, checkpoint: Any) -> Vision | None:
    """What a layout's image prompts need, from headers alone; None without any. InputError for
    files that are not there or do not fit. checkpoint: weights.Checkpoint."""
    own = [prompt for region in layout.regions for prompt in region.image_prompts]
    if own and not layout.regional_steps():
        warn("the regions' image_prompts have no effect without regional steps")
        own = []
    prompts = [*layout.image_prompts, *own]
    if not prompts:
        return None
    siglip, projector = find_redux(checkpoint)
    size = siglip_params(siglip).image_size
    images = {x.file: pixels_of(x.file, size) for x in prompts}
    return Vision(layout, siglip, projector, images)


def find_redux(checkpoint: Any) -> tuple[Source, Source]:
    """SigLIP and the projector: in --redux, or near it where that is the projector's file."""
    default = POCKET_REDUX if checkpoint.name == "pocket" else OFFICIAL
    name = str(checkpoint.redux or default)
    place = locate(name, FILES, f"--redux {name}")
    projector = pick("redux", "--redux", place)
    siglip = pick("siglip", "--redux", place) if place.is_dir() else siglip_near(place)
    components.check_loads(siglip, SIGLIP)
    components.check_loads(projector, PROJECTOR)
    width, _, context = projector_params(projector)
    hidden = siglip_params(siglip).hidden_size
    if width != hidden:
        problem = f"it reads tokens {width} wide, but those of {siglip.path} are {hidden}"
        raise wrong(projector.path, problem)
    expected = components.flux_params(checkpoint.flux).context_in_dim
    if context != expected:
        problem = f"its tokens are {context} wide, but {checkpoint.flux.path} expects {expected}"
        raise wrong(projector.path, problem)
    return siglip, projector


def siglip_near(file: Path) -> Source:
    """SigLIP for a projector's file: in its folder, in the one that a repository has for it, or in
    ComfyUI's, where clip_vision is beside style_models."""
    above = file.absolute().parents[1]
    for folder in (above / "image_encoder", above / "clip_vision"):
        if folder.is_dir():
            with suppress(InputError):
                return pick("siglip", "--redux", folder)
    return pick("siglip", "--redux", file.parent)
