"""ControlNets for FLUX.1: its first blocks, which give residuals by a control image.

InstantX's and Shakker-Labs' take the image's latents, and a mode if they are `union` models; XLabs'
read its pixels by eight convolutions (`input_hint_block`). Names are the files': the official ones
for what FLUX has too, else diffusers' or XLabs'.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import Block
from model.layers import Vectors, embedding
from model.transformer import FluxParams, Streams
from regional.layout import Control


@dataclass(frozen=True)
class ControlNetParams(FluxParams):
    """modes: those of a union model, or 0. hint_width: channels in input_hint_block, or 0."""

    modes: int = 0
    hint_width: int = 0


class Residuals(NamedTuple):
    """What a ControlNet adds after the blocks of each kind: tensors (B, L_img, D)."""

    double: list[Tensor]
    single: list[Tensor]

    def after(self, block: Block, depth: int, in_turn: bool) -> Tensor | None:
        """That for this block, of `depth` of its kind, if there are any of the kind: spread over
        groups of neighbors, or taken `in_turn` (XLabs)."""
        residuals = getattr(self, block.kind)
        if not residuals:
            return None
        if in_turn:
            return residuals[block.index % len(residuals)]
        return residuals[block.index // math.ceil(depth / len(residuals))]


def hint_block(width: int, out_channels: int) -> nn.Sequential:
    """The eight convolutions of XLabs: (B, 3, H, W) -> (B, out_channels, H / 8, W / 8)."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
    for stride in (1, 2) * 3:
        layers += [nn.Conv2d(width, width, 3, padding=1, stride=stride), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1))


class ControlNet(Streams):
    def __init__(self, params: ControlNetParams):
        super().__init__(params)
        hidden = params.hidden_size
        self.controlnet_x_embedder = nn.Linear(params.in_channels, hidden)
        counts = (params.depth, params.depth_single_blocks)
        heads = ([nn.Linear(hidden, hidden) for _ in range(count)] for count in counts)
        self.controlnet_blocks, self.controlnet_single_blocks = map(nn.ModuleList, heads)
        if params.modes:
            self.controlnet_mode_embedder = embedding(params.modes, hidden)
        if params.hint_width:
            self.input_hint_block = hint_block(params.hint_width, params.in_channels // 4)

    def read(self, image: Tensor) -> Tensor:
        """XLabs': an image (B, 3, H, W) in [-1, 1] -> tokens (B, L_img, in_channels)."""
        hint = self.input_hint_block(image)
        return rearrange(hint, "B c (h ph) (w pw) -> B (h w) (c ph pw)", ph=2, pw=2)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor,
        modulation: list[Vectors], control: Tensor, mode: int | None = None,
    ) -> Residuals:  # fmt: skip
        """The first five are Flux.forward's. control: (B, L_img, in_channels), the control image's
        packed latents, or `read`. mode: for union models alone, one more token before the prompt."""
        length = img.shape[1]
        hidden = self.embed(img, img_ids, txt, txt_ids)
        hidden = hidden._replace(img=hidden.img + self.controlnet_x_embedder(control))
        if self.params.modes:
            token = self.controlnet_mode_embedder.weight[mode].expand(len(txt), 1, -1)
            origin = self.positions(torch.zeros_like(txt_ids[:, :1]), token)
            txt = torch.cat([token, hidden.txt], dim=1)
            hidden = hidden._replace(txt=txt, pe=torch.cat([origin, hidden.pe], dim=1))
        residuals = Residuals([], [])
        heads = {"double": self.controlnet_blocks, "single": self.controlnet_single_blocks}

        def collect(x: Tensor, block: Block) -> Tensor:
            residual = heads[block.kind][block.index](x[:, -length:])
            getattr(residuals, block.kind).append(residual)
            return x

        self.blocks(hidden, modulation, after_block=collect)
        return residuals


class LoadedControl(NamedTuple):
    """tokens: (1, L_img, in_channels), what the net reads of the control image; scale: (L_img, 1),
    of each token's residuals. Both are row by row."""

    net: ControlNet
    tokens: Tensor
    scale: Tensor
    setting: Control
