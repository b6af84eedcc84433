"""What a layout asks for besides prompts and regions: read and checked, encoded, then its
extensions of sampling in their order."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from errors import MISSING, InputError, warn
from extensions import flux_tools, guidance, kontext, repaint
from extensions.controlnet import controlnets, more_channels
from extensions.region_lora import region_loras
from model.transformer import Flux, FluxParams
from regional.extension import Conditioning, Extension
from regional.layout import Layout
from regional.mask import RegionTokens
from regional.prompts import moved
from sampler.flow import pack

Encode = Callable[[Layout, RegionTokens | None], Conditioning]


class Extras:
    """A layout's LoRAs, ControlNets, images and negative prompts. files: loading.Files.

    channels: (1, L_img, C), joined to the image's: a control image's, or Fill's.
    negative: the negative prompts. references: kontext.References.
    """

    def __init__(self, layout: Layout, files: Any):
        """Most that can be wrong with them is an InputError here, before models are loaded."""
        self.layout = layout
        self.files = files
        check_together(layout, files.params)
        self.start = repaint.start_of(layout)
        area = repaint.repainted(layout) if layout.image and layout.image.repaint else None
        self.tools = flux_tools.channels_for(layout, files.params, self.start, area)
        self.references = kontext.read_references(layout)
        if self.references and self.tools:
            problem = "do not go with FLUX.1 Fill, Canny, Depth and control LoRAs"
            raise InputError("references", MISSING, problem)
        self.channels: Tensor | None = None
        self.negative: Conditioning | None = None

    def encode(
        self, pipeline: Any, conditioning: Conditioning, tokens: RegionTokens | None,
        encode: Encode,
    ) -> Conditioning:  # fmt: skip
        """Encode the images and negative prompts; the conditioning with what it gains."""
        layout = self.layout
        if self.references and pipeline.parallel:
            check_parallel(layout)

        def latents_of(image: Tensor) -> Tensor:
            """Packed, (1, L, 64), of pixels (1, 3, H, W) in [-1, 1]."""
            vae = pipeline.parts.get("ae")
            return pack(vae.encode(image.to(pipeline.device, pipeline.dtype))).cpu()

        self.files.encode_controls(latents_of)
        if self.tools:
            self.channels = self.tools.encoded(latents_of)
        if layout.true_cfg_scale > 1:
            self.negative = encode(*guidance.negative(layout, tokens))
        if self.start is not None:
            conditioning = conditioning._replace(image=latents_of(self.start))
        if self.references:
            self.references.encode(latents_of)
        if self.files.vision:
            conditioning = self.files.vision.extended(pipeline, conditioning, tokens)
        return conditioning


def check_together(layout: Layout, params: FluxParams) -> None:
    """InputError for what does not go together, or not with a transformer of these sizes."""
    flux_tools.check_channels(layout, params)
    prompts = [key for part in (layout, *layout.regions) for key in part.image_prompts]
    if layout.true_cfg_scale > 1 and prompts:
        problem = "does not go with image_prompts, which negative prompts lack"
        raise InputError("true_cfg_scale", layout.true_cfg_scale, problem)
    parts = (layout, *layout.regions)
    if any(part.references for part in parts) and any(x.loras for x in layout.regions):
        raise InputError("references", MISSING, "do not go with LoRAs of regions")
    if any(part.negative_prompt for part in parts) and layout.true_cfg_scale == 1:
        warn("negative_prompt has no effect with true_cfg_scale 1")


def check_parallel(layout: Layout) -> None:
    """InputError where processes could not tell references and image tokens apart."""
    two_streams = layout.regional_steps() and layout.base_stream == "separate"
    if two_streams or layout.controlnets:
        problem = "references need base_stream: shared there, and no ControlNets"
        raise InputError("--parallel", "ulysses", problem)


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
        found.append(region_loras(flux, layout, extras.files.loras, *where, partial(part, dim=0)))
    if parallel:
        found.append(parallel.extend)
    if extras is None:
        return [*found, *own]
    if extras.channels is not None:
        found.append(more_channels(extras.channels.to(*where)))
    found += own
    if extras.references:
        found.append(extras.references.extend)
    if extras.negative:
        negative = moved(extras.negative, *where)
        found.append(guidance.true_cfg(flux, layout, negative))
    if layout.controlnets:  # they read the image without further channels
        controls = extras.files.load_controls(*where, pipeline.parts.controlnets)
        found.append(controlnets(controls, flux.params, layout.run_steps(), conditioning, part))
    if layout.image and layout.image.repaint and not flux_tools.is_fill(flux.params):
        found.append(repaint.kept(layout, conditioning.image, seed))
    return found
