"""ControlNets and control LoRAs, as extensions of sampling.

A ControlNet has FLUX.1's first blocks, reads the base prompt and gives residuals by a control
image: InstantX's and Shakker-Labs' take its latents, XLabs' its pixels. Names are the files':
official for what FLUX has too, else diffusers' or XLabs'.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import Block
from model.layers import Vectors, embedding
from model.transformer import FluxParams, Streams
from regional.extension import Branches, Conditioning, Extension, Forward, Pass
from regional.layout import Control
from sampler.flow import text_ids

Residuals = dict[str, list[Tensor]]  # (B, L_img, D), for double and for single blocks


@dataclass(frozen=True)
class ControlNetParams(FluxParams):
    modes: int = 0  # of a union model
    hint_width: int = 0  # of XLabs' convolutions


class ControlNet(Streams):
    def __init__(self, params: ControlNetParams):
        super().__init__(params)
        hidden = params.hidden_size
        width = params.hint_width
        self.controlnet_x_embedder = nn.Linear(params.in_channels, hidden)
        double = [nn.Linear(hidden, hidden) for _ in range(params.depth)]
        single = [nn.Linear(hidden, hidden) for _ in range(params.depth_single_blocks)]
        self.controlnet_blocks = nn.ModuleList(double)
        self.controlnet_single_blocks = nn.ModuleList(single)
        if params.modes:
            self.controlnet_mode_embedder = embedding(params.modes, hidden)
        if width:
            convs = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
            for stride in (1, 2) * 3:
                convs += [nn.Conv2d(width, width, 3, padding=1, stride=stride), nn.SiLU()]
            convs.append(nn.Conv2d(width, params.in_channels // 4, 3, padding=1))
            self.input_hint_block = nn.Sequential(*convs)

    def read(self, image: Tensor) -> Tensor:
        """XLabs': (B, 3, H, W) in [-1, 1] -> tokens (B, L_img, in_channels)."""
        hint = self.input_hint_block(image)  # (B, in_channels / 4, H / 8, W / 8)
        return rearrange(hint, "B c (h ph) (w pw) -> B (h w) (c ph pw)", ph=2, pw=2)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor,
        modulation: list[Vectors], control: Tensor, mode: int | None = None,
    ) -> Residuals:  # fmt: skip
        """control: the image's packed latents (B, L_img, in_channels), or `read`; mode: of a
        union; the rest: Flux.forward's."""
        length = img.shape[1]
        hidden = self.embed(img, img_ids, txt, txt_ids)
        hidden = hidden._replace(img=hidden.img + self.controlnet_x_embedder(control))
        if self.params.modes:  # The mode is a token before the prompt.
            token = self.controlnet_mode_embedder.weight[mode].expand(len(txt), 1, -1)
            txt = torch.cat([token, hidden.txt], dim=1)
            pe = torch.cat([hidden.pe[:, :1], hidden.pe], dim=1)
            hidden = hidden._replace(txt=txt, pe=pe)
        heads = {"double": self.controlnet_blocks, "single": self.controlnet_single_blocks}
        residuals = {kind: [] for kind in heads}

        def collect(x: Tensor, block: Block) -> Tensor:
            head = heads[block.kind][block.index]
            residuals[block.kind].append(head(x[:, -length:]))
            return x

        self.blocks(hidden, modulation, after_block=collect)
        return residuals


def residual_after(block: Block, own: list[Tensor], depth: int, in_turn: bool) -> Tensor:
    """A block's, of its kind's: neighbors share one, or they take turns (XLabs)."""
    group = math.ceil(depth / len(own))
    return own[block.index % len(own) if in_turn else block.index // group]


class LoadedControl(NamedTuple):
    net: ControlNet
    tokens: Tensor  # (1, L_img, in_channels), of the image, row by row
    scale: Tensor  # (L_img, 1), of the residuals, row by row
    setting: Control


def controlnets(
    controls: Sequence[LoadedControl],
    params: FluxParams,
    steps: int,
    conditioning: Conditioning,
    part: Callable[[Tensor], Tensor] = lambda x: x,
) -> Extension:
    """params: the transformer's; part: a process's part of the tokens, dimension 1."""
    depths = {"double": params.depth, "single": params.depth_single_blocks}
    txt, _, y, _ = conditioning

    def residuals_of(control: LoadedControl, given: Pass, order: Tensor) -> Residuals:
        net, tokens, scale, setting = control
        modulation = net.modulation(given.timesteps, y[:1], given.guidance)
        inputs = (given.img, given.img_ids, txt, text_ids(txt.shape[1]))
        found = net(*inputs, modulation, tokens[:, order], setting.mode)
        for kind, own in found.items():
            found[kind] = [part(x * scale[order]) for x in own]
        return found

    def extend(forward: Forward, branches: Branches) -> Forward:
        def with_residuals(given: Pass, step: int) -> Tensor:
            acting = [x for x in controls if x.setting.acts(step, steps)]
            found = [residuals_of(x, given, branches.order) for x in acting]

            def after_block(x: Tensor, block: Block) -> Tensor:
                x = given.after_block(x, block)
                for control, residuals in zip(acting, found):
                    own = residuals[block.kind]
                    if not own:
                        continue
                    in_turn = control.net.params.hint_width > 0
                    residual = residual_after(block, own, depths[block.kind], in_turn)
                    alone = control.setting.residuals == "published"
                    is_one = alone or block.kind == "double"
                    add(x, residual, 1 if is_one else branches.streams)
                return x

            return forward(given._replace(after_block=after_block), step)

        return with_residuals

    return extend


def add(x: Tensor, residual: Tensor, streams: int) -> None:
    """Add (B, L_img, D) to the last image streams of x (B, L, D), which is the block's own, in
    place. The last block has one, or with references may have more."""
    length = residual.shape[1]
    streams = min(streams, x.shape[1] // length)
    x[:, -streams * length :].unflatten(1, (streams, length)).add_(residual[:, None])


def more_channels(latents: Tensor) -> Extension:
    """Joins channels (1, L_img, C) to the image's: packed latents of a control image, row by
    row."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        own = latents[:, branches.order]

        def with_image(given: Pass, step: int) -> Tensor:
            both = torch.cat([given.img, own.expand(len(given.img), -1, -1)], dim=-1)
            return forward(given._replace(img=both), step)

        return with_image

    return extend
