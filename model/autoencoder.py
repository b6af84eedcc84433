"""FLUX.1's autoencoder: pictures to latents (8 times smaller, 16 channels) and back. Names are the official ones."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(m(h), "B C h w -> B 1 (h w) C").contiguous() for m in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next where there is one (`downsample` or `upsample`)."""

    def __init__(self, blocks: list[ResnetBlock]):
        super().__init__()
        self.block = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    def __init__(self, p: AutoEncoderParams):
        super().__init__()
        self.conv_in = conv(3, p.ch)
        self.down = nn.ModuleList()
        channels = p.ch
        for i, mult in enumerate(p.ch_mult):
            blocks = []
            for _ in range(p.num_res_blocks):
                blocks.append(ResnetBlock(channels, p.ch * mult, p.norm_groups))
                channels = p.ch * mult
            level = Level(blocks)
            if i != len(p.ch_mult) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = Mid(channels, p.norm_groups)
        self.norm_out = norm(p.norm_groups, channels)
        self.conv_out = conv(channels, 2 * p.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, p: AutoEncoderParams):
        super().__init__()
        channels = p.ch * p.ch_mult[-1]
        self.conv_in = conv(p.z_channels, channels)
        self.mid = Mid(channels, p.norm_groups)
        levels: list[Level] = []  # from the smallest resolution up; the checkpoint numbers them the other way round
        for i, mult in reversed(list(enumerate(p.ch_mult))):
            blocks = []
            for _ in range(p.num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, p.ch * mult, p.norm_groups))
                channels = p.ch * mult
            level = Level(blocks)
            if i != 0:
                level.upsample = Upsample(channels)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(p.norm_groups, channels)
        self.conv_out = conv(channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 16, H/8, W/8): the mean of the posterior, shifted and scaled."""
        mean, _logvar = self.encoder(picture).chunk(2, dim=1)
        return self.params.scale_factor * (mean - self.params.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 16, H/8, W/8), as the transformer makes them -> picture (B, 3, H, W), about [-1, 1]."""
        return self.decoder(latents / self.params.scale_factor + self.params.shift_factor)


def to_uint8(picture: Tensor) -> Tensor:
    """(B, 3, H, W) about [-1, 1] -> (B, H, W, 3) uint8."""
    return rearrange(((picture.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8), "B C H W -> B H W C")
