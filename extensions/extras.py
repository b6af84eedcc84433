"""What a layout asks for besides prompts and regions: read and checked, encoded, then its
extensions of sampling in their order."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from errors import InputError, warn
from extensions import flux_tools, guidance, kontext, loading, redux, repaint
from extensions.controlnet import controlnets, more_channels
from extensions.lora import Loras
from extensions.region_lora import region_loras
from formats.components import flux_params
from model.transformer import Flux
from regional.extension import Conditioning, Extension
from regional.layout import Layout
from regional.mask import RegionTokens
from regional.prompts import moved
from sampler.flow import pack

Encode = Callable[[Layout, RegionTokens | None], Conditioning]


class Extras:
    """A layout's LoRAs, ControlNets, images and negative prompts.

    channels: (1, L_img, C), joined to the image's: a control image's, or Fill's.
    negative: the negative prompts. references: kontext.References.
    """

    def __init__(self, layout: Layout, checkpoint: Any, known: Loras):
        """Most that can be wrong with them is an InputError here, before models are loaded."""
        self.layout = layout
        params = flux_params(checkpoint.flux)
        self.controls = loading.plan_controls(layout, checkpoint.flux)
        self.loras = loading.read_loras(layout, checkpoint, known)
        self.start = repaint.start_of(layout)
        self.tools = flux_tools.channels_for(layout, params, self.start)
        self.vision = redux.vision_of(layout, checkpoint)
        self.references = kontext.read_references(layout)
        check_together(layout)
        self.channels: Tensor | None = None
        self.negative: Conditioning | None = None

    def encode(
        self, pipeline: Any, conditioning: Conditioning, tokens: RegionTokens | None,
        encode: Encode,
    ) -> Conditioning:  # fmt: skip
        """Encode the images and negative prompts; the conditioning with what it gains."""
        layout = self.layout

        def latents_of(image: Tensor) -> Tensor:
            """Packed, (1, L, 64), of pixels (1, 3, H, W) in [-1, 1]."""
            vae = pipeline.parts.get("ae")
            return pack(vae.encode(image.to(pipeline.device, pipeline.dtype))).cpu()

        for i, (source, image) in enumerate(self.controls):
            if not loading.controlnet_params(source).hint_width:
                self.controls[i] = source, latents_of(image)
        if self.tools:
            self.channels = self.tools.encoded(latents_of)
        if layout.true_cfg_scale > 1:
            self.negative = encode(*guidance.negative(layout, tokens))
        if self.start is not None:
            conditioning = conditioning._replace(image=latents_of(self.start))
        if self.references:
            self.references.encode(latents_of)
        if self.vision:
            conditioning = self.vision.extended(pipeline, conditioning, tokens)
        return conditioning


def check_together(layout: Layout) -> None:
    """InputError for two features that do not go together."""
    prompts = [key for part in (layout, *layout.regions) for key in part.image_prompts]
    if layout.true_cfg_scale > 1 and prompts:
        problem = "does not go with image_prompts, which negative prompts lack"
        raise InputError("true_cfg_scale", layout.true_cfg_scale, problem)
    if layout.negative_prompt and layout.true_cfg_scale == 1:
        warn("negative_prompt has no effect with true_cfg_scale 1")


def extensions_of(
    pipeline: Any, flux: Flux, prepared: Any, conditioning: Conditioning,
    own: Sequence[Extension], seed: int,
) -> list[Extension]:  # fmt: skip
    """A layout's extensions and a call's own, the innermost first. Those before `parallel`
    see a process's part of the tokens, the others all. prepared: pipeline.Prepared."""
    layout = prepared.layout
    extras = prepared.extras
    where = (pipeline.device, pipeline.dtype)
    parallel = pipeline.parallel
    part = parallel.part if parallel else lambda x, dim=1: x
    found = []
    if any(region.loras for region in layout.regions):
        found.append(region_loras(flux, layout, extras.loras, *where, partial(part, dim=0)))
    if parallel:
        found.append(parallel.extend)
    if extras is None:
        return [*found, *own]
    if extras.references:
        found.append(extras.references.extend)
    if extras.channels is not None:
        found.append(more_channels(extras.channels.to(*where)))
    found += own
    if extras.negative:
        negative = moved(extras.negative, *where)
        found.append(guidance.true_cfg(flux, layout, negative))
    if extras.controls:  # they read the image without further channels
        nets = pipeline.parts.controlnets
        controls = loading.load_controls(layout, extras.controls, *where, nets)
        found.append(controlnets(controls, flux.params, layout.run_steps(), conditioning, part))
    if layout.image and layout.image.repaint and not flux_tools.is_fill(flux.params):
        found.append(repaint.kept(layout, conditioning.image, seed))
    return found
