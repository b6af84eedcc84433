"""ControlNets and control LoRAs as extensions of sampling.

In the double blocks there is one image stream. In the single blocks of a regional step with a base
branch there are two, [..., base img, img]; both get a ControlNet's residuals, unless `residuals:
published` asks for the last one alone. In every step a ControlNet is given the base prompt.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import InputError, warn
from extensions.controlnet import ControlNet, Residuals
from model.attention import Block
from model.transformer import FluxParams
from regional.extension import Branches, Conditioning, Extension, Forward, Pass
from regional.images import read_image
from regional.layout import Control, Layout
from regional.mask import region_tokens
from sampler.flow import text_ids


class LoadedControl(NamedTuple):
    """tokens: (1, L_img, in_channels), the control image as the net reads it; scale: (L_img, 1), of
    each image token's residuals. Both are row by row."""

    net: ControlNet
    tokens: Tensor
    scale: Tensor
    setting: Control


def controlnets(
    controls: Sequence[LoadedControl], params: FluxParams, steps: int, conditioning: Conditioning,
    part: Callable[[Tensor], Tensor] = lambda x: x,
) -> Extension:  # fmt: skip
    """params: the transformer's; steps: the layout's; part: which of a stream's tokens, along
    dimension 1, this process has."""
    depths = {"double": params.depth, "single": params.depth_single_blocks}
    txt = conditioning.txt
    y = conditioning.y[:1]

    def residuals_of(control: LoadedControl, given: Pass, order: Tensor) -> Residuals:
        net, tokens, scale, setting = control
        modulation = net.modulation(given.timesteps, y, given.guidance)
        inputs = given.img, given.img_ids, txt, text_ids(txt.shape[1]), modulation
        found = net(*inputs, tokens[:, order], setting.mode)
        return found.each(lambda residual: part(residual * scale[order]))

    def extend(forward: Forward, branches: Branches) -> Forward:
        def with_residuals(given: Pass, step: int) -> Tensor:
            acting = [control for control in controls if control.setting.acts(step, steps)]
            found = [residuals_of(control, given, branches.order) for control in acting]

            def after_block(x: Tensor, block: Block) -> Tensor:
                x = given.after_block(x, block)
                for (net, *_, setting), residuals in zip(acting, found):
                    residual = residuals.after(block, depths[block.kind], net.params.hint_width > 0)
                    if residual is not None:
                        alone = setting.residuals == "published"
                        add(x, residual, 1 if alone else branches.streams)
                return x

            return forward(given._replace(after_block=after_block), step)

        return with_residuals

    return extend


def add(x: Tensor, residual: Tensor, streams: int) -> None:
    """Add a residual (B, L_img, D) to each of the last `streams` image streams of x (B, L, D), or to
    the one that double blocks and the last block give; in place: x is the block's own result."""
    length = residual.shape[1]
    streams = min(streams, x.shape[1] // length)
    x[:, x.shape[1] - streams * length :].unflatten(1, (streams, length)).add_(residual[:, None])


def control_lora(latents: Tensor) -> Extension:
    """A control LoRA's image next to the noisy one: packed latents (1, L_img, 64), row by row."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        own = latents[:, branches.order]

        def with_image(given: Pass, step: int) -> Tensor:
            return forward(given._replace(img=torch.cat([given.img, own], dim=-1)), step)

        return with_image

    return extend


def control_image(file: str, preprocess: str | None, layout: Layout) -> Tensor:
    """A control image at the layout's size, (1, 3, height, width) in [-1, 1]."""
    image = read_image(file)
    width, height = layout.width, layout.height
    if abs(image.width * height - image.height * width) > max(width, height):
        sizes = f"{image.width} x {image.height} pixels are stretched to {width} x {height}"
        warn(f"{file}: its {sizes}, another aspect ratio")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    if preprocess == "canny":
        pixels = canny(pixels)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def canny(pixels: np.ndarray) -> np.ndarray:
    """White edges on black: (height, width, 3) uint8 in and out."""
    try:
        import cv2
    except ImportError as error:
        problem = f"needs OpenCV ({error}); pip install opencv-python-headless"
        raise InputError("preprocess", "canny", problem) from error
    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200)
    return np.repeat(edges[:, :, None], 3, axis=2)


def scale_of(control: Control, layout: Layout) -> Tensor:
    """The scale for each image token, (L_img, 1) float32, row by row: 0 outside its region."""
    if control.region is None:
        return torch.full((layout.width * layout.height // 256, 1), control.scale)
    inside = region_tokens(layout).image_bits >> control.region & 1
    return control.scale * inside[:, None].float()
