"""FLUX.1's autoencoder, named as in the official checkpoint."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.layers import sequence


@dataclass(frozen=True)
class AutoEncoderParams:
    """Sizes, and the factors of the latents. The defaults are FLUX.1's."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


def conv(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = norm(groups, in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = norm(groups, out_channels)
        self.conv2 = conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One attention head over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(groups, channels)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, conv(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        layers = (self.q, self.k, self.v)
        qkv = (rearrange(y(h), "B C h w -> B 1 (h w) C").contiguous() for y in layers)
        h = F.scaled_dot_product_attention(*qkv)
        return x + self.proj_out(rearrange(h, "B 1 (h w) C -> B C h w", h=x.shape[2]))


def level(count: int, in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    """The `count` blocks of one resolution; a step to the next may be appended."""
    sizes = [in_channels] + [out_channels] * count
    blocks = [ResnetBlock(*pair, groups) for pair in zip(sizes, sizes[1:])]
    return sequence(block=nn.Sequential(*blocks))


def middle(channels: int, groups: int) -> nn.Sequential:
    before = ResnetBlock(channels, channels, groups)
    after = ResnetBlock(channels, channels, groups)
    return sequence(block_1=before, attn_1=AttnBlock(channels, groups), block_2=after)


def encoder(p: AutoEncoderParams) -> nn.Sequential:
    channels = p.ch
    levels = []
    for mult in p.ch_mult:
        levels.append(level(p.num_res_blocks, channels, p.ch * mult, p.norm_groups))
        channels = p.ch * mult
        if len(levels) < len(p.ch_mult):
            half = nn.Conv2d(channels, channels, 3, stride=2)
            levels[-1].downsample = sequence(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=half)
    return sequence(
        conv_in=conv(3, p.ch), down=nn.Sequential(*levels),
        mid=middle(channels, p.norm_groups), norm_out=norm(p.norm_groups, channels),
        silu=nn.SiLU(), conv_out=conv(channels, 2 * p.z_channels),
    )  # fmt: skip


def decoder(p: AutoEncoderParams) -> nn.Sequential:
    channels = p.ch * p.ch_mult[-1]
    start = conv(p.z_channels, channels)
    mid = middle(channels, p.norm_groups)
    up = nn.Sequential()  # The checkpoint numbers the resolutions from the largest.
    for i, mult in reversed(list(enumerate(p.ch_mult))):
        up.add_module(str(i), level(p.num_res_blocks + 1, channels, p.ch * mult, p.norm_groups))
        channels = p.ch * mult
        if i > 0:
            enlarge = nn.Upsample(scale_factor=2.0, mode="nearest")
            up[-1].upsample = sequence(enlarge=enlarge, conv=conv(channels, channels))
    return sequence(
        conv_in=start, mid=mid, up=up, norm_out=norm(p.norm_groups, channels),
        silu=nn.SiLU(), conv_out=conv(channels, 3),
    )  # fmt: skip


class AutoEncoder(nn.Module):
    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.params = params
        self.encoder = encoder(params)
        self.decoder = decoder(params)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 8, W / 8), the posterior's mean."""
        mean, _ = self.encoder(image).chunk(2, dim=1)
        return self.params.scale_factor * (mean - self.params.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, H / 8, W / 8) -> image (B, 3, H, W), about [-1, 1]."""
        return self.decoder(latents / self.params.scale_factor + self.params.shift_factor)


def to_uint8(image: Tensor) -> Tensor:
    """(B, 3, H, W) about [-1, 1] -> (B, H, W, 3) uint8."""
    levels = ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return rearrange(levels.to(torch.uint8), "B C H W -> B H W C")
