"""ControlNets in a run with regions: their pictures, which steps, image tokens and streams their residuals reach.

In the double blocks there is one image stream. In the single blocks of a regional step with a base branch there are
two, [..., base img, img]; both get the residuals, unless `residuals: published` asks for the last one alone.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import InputError
from extensions.controlnet import ControlNet, Residuals
from model.attention import Block
from model.transformer import FluxParams
from regional.images import read_image
from regional.layout import Control, Layout
from regional.mask import region_tokens


class ActiveControl(NamedTuple):
    """A loaded ControlNet. tokens: (1, L_img, in_channels), its picture; share: (L_img, 1), its scale on each image
    token. Both in the order of the run's image tokens."""

    net: ControlNet
    tokens: Tensor
    share: Tensor
    setting: Control

    def sorted(self, order: Tensor) -> "ActiveControl":
        return self._replace(tokens=self.tokens[:, order], share=self.share[order])


def control_picture(image: str, preprocess: str | None, width: int, height: int) -> tuple[Tensor, list[str]]:
    """The control picture at this size, (1, 3, height, width) in [-1, 1], and warnings."""
    picture, warnings = read_image(image), []
    if abs(picture.width * height - picture.height * width) > max(width, height):
        size = f"{picture.width} x {picture.height}"
        warnings.append(f"{image}: its {size} pixels are stretched to {width} x {height}, another aspect ratio")
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    if preprocess == "canny":
        pixels = canny(pixels)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1, warnings


def canny(pixels: np.ndarray) -> np.ndarray:
    """White edges on black: (height, width, 3) uint8 in and out."""
    try:
        import cv2
    except ImportError as error:
        problem = f"needs OpenCV, which is missing here ({error}); pip install opencv-python-headless"
        raise InputError("preprocess", "canny", problem) from error
    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200)
    return np.repeat(edges[:, :, None], 3, axis=2)


def image_share(control: Control, layout: Layout) -> Tensor:
    """The control's scale on each image token, (L_img, 1) float32, row by row: 0 outside its region."""
    if control.region is None:
        return torch.full((layout.width * layout.height // 256, 1), control.scale)
    inside = region_tokens(layout).image_bits >> control.region & 1
    return control.scale * inside[:, None].float()


def control_hook(
    controls: list[ActiveControl],
    params: FluxParams,
    steps: int,
    conditions: dict[str, Tensor],
    part: Callable[[Tensor], Tensor] = lambda x: x,
) -> Callable[[Tensor, Tensor, int, int], Callable[[Tensor, Block], Tensor]]:
    """What gives Flux.forward its `after_block` at img (1, L_img, 64) and t (1,), in this step, for so many image
    streams.

    steps: of the run. conditions: img_ids, txt, txt_ids, y and guidance of the base prompt, which is what a ControlNet
    is given in every step, also a regional one. part: which of the image tokens x has.
    """
    depths = {"double": params.depth, "single": params.depth_single_blocks}

    def hook(img: Tensor, t: Tensor, step: int, streams: int) -> Callable[[Tensor, Block], Tensor]:
        added = []
        for net, tokens, share, setting in controls:
            if setting.acts(step, steps):
                mode = setting.mode_index
                residuals = net(img, timesteps=t, control=tokens, mode=mode, **conditions).scaled(share)
                residuals = Residuals(*([part(residual) for residual in kind] for kind in residuals))
                in_turn = net.params.hint_width > 0
                added.append((residuals, in_turn, 1 if setting.residuals == "published" else streams))
        return partial(add_residuals, added, depths, part(img).shape[1])

    return hook


def add_residuals(
    added: list[tuple[Residuals, bool, int]], depths: dict[str, int], length: int, x: Tensor, block: Block
) -> Tensor:
    """x with what each ControlNet adds after this block to its last `length` tokens, in the single blocks to the last
    `length` tokens of each of so many streams. It is added in place: x is the block's own result."""
    for residuals, in_turn, streams in added:
        residual = residuals.after(block, depths[block.kind], in_turn)
        if residual is not None:
            streams = min(streams, x.shape[1] // length) if block.kind == "single" else 1  # the last block gives one
            x[:, x.shape[1] - streams * length :].unflatten(1, (streams, length)).add_(residual[:, None])
    return x
