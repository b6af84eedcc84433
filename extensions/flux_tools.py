"""FLUX.1 Fill, Canny and Depth, whose transformers read further channels beside the image's, and
control LoRAs, which make others read them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from errors import MISSING, InputError
from extensions.pictures import control_image
from model.transformer import FluxParams
from regional.layout import Layout
from sampler.flow import pack


class Channels(NamedTuple):
    """What is joined: an image (1, 3, height, width) in [-1, 1], for Fill without what its mask
    (1, 1, height, width) covers."""

    image: Tensor
    mask: Tensor | None = None

    def encoded(self, latents_of: Callable[[Tensor], Tensor]) -> Tensor:
        """(1, L_img, C): packed latents, and of a mask each latent's 8 x 8 pixels."""
        latents = latents_of(self.image)
        if self.mask is None:
            return latents
        pixels = rearrange(self.mask, "B 1 (h ph) (w pw) -> B (ph pw) h w", ph=8, pw=8)
        return torch.cat([latents, pack(pixels).to(latents)], dim=-1)


def is_fill(params: FluxParams) -> bool:
    return params.in_channels == 6 * params.out_channels


def is_control(params: FluxParams) -> bool:
    """FLUX.1 Canny or Depth, which read one more image."""
    return params.in_channels == 2 * params.out_channels


def control_loras(layout: Layout) -> list[str]:
    """Their images."""
    return [lora.image for lora in layout.loras if lora.image]


def check_channels(layout: Layout, params: FluxParams) -> None:
    """InputError where a layout lacks what this transformer reads beside the image, or has what
    it does not read."""
    own = layout.control_image
    loras = control_loras(layout)
    if len(loras) > 1 or loras and params.in_channels != params.out_channels:
        problem = "there can be only one control LoRA, and none for Fill, Canny and Depth"
        raise InputError("loras", loras, problem)
    if is_fill(params) and (layout.image is None or layout.image.repaint is None):
        raise InputError("image", MISSING, "FLUX.1 Fill needs an image, and what to repaint")
    if is_control(params) and own is None:
        raise InputError("control_image", MISSING, "FLUX.1 Canny and Depth need an image")
    if own is not None and not is_control(params):
        problem = "only FLUX.1 Canny and Depth read it; others need a control LoRA or ControlNet"
        raise InputError("control_image", Path(own), problem)


def channels_for(
    layout: Layout, params: FluxParams, start: Tensor | None, repainted: np.ndarray | None
) -> Channels | None:  # fmt: skip
    """What this transformer reads beside the image. start: the image to start from. repainted:
    how far each of its pixels is drawn anew."""
    if is_fill(params):
        mask = torch.from_numpy(repainted >= 0.5).float()[None, None]
        return Channels(start * (1 - mask), mask)
    images = [layout.control_image] if is_control(params) else control_loras(layout)
    return Channels(control_image(images[0], None, layout)) if images else None
