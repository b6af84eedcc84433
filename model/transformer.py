"""FLUX.1's transformer: text and image tokens in, the velocity of the image tokens out.

It knows nothing of regions; functions given to `forward` change what it computes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import layers
from model.attention import (
    AfterBlock,
    Attention,
    Block,
    Join,
    plain_attention,
    rope,
    rope_axes,
    text_then_image,
)
from model.layers import DoubleStreamBlock, LastLayer, SingleStreamBlock, Vectors


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a transformer; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_hidden: int = 12288
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    theta: float = 10_000
    guidance_embed: bool = True


def as_it_is(x: Tensor, block: Block) -> Tensor:
    return x


class Hidden(NamedTuple):
    """The tokens between two blocks: img (B, L_img, D), txt (B, L_txt, D), their rotary
    embeddings pe (B, L, d / 2, 2), and L_img. After the double blocks, img is joined."""

    img: Tensor
    txt: Tensor | None
    pe: Tensor
    length: int


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a cached tensor may be used in training too
def known_rope(
    ids: bytes, shape: torch.Size, ids_dtype: torch.dtype, params: FluxParams,
    dtype: torch.dtype, device: torch.device,
) -> Tensor:  # fmt: skip
    """`rope`, cached: every step needs the same, and a GPU would wait for it."""
    positions = torch.frombuffer(bytearray(ids), dtype=ids_dtype).reshape(shape)
    axes = rope_axes(params.hidden_size // params.num_heads)
    return rope(positions, axes, params.theta, dtype).to(device)


class Streams(nn.Module):
    """What FLUX.1 and its ControlNets share: the embedders and the blocks."""

    def __init__(self, params: FluxParams):
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        sizes = (hidden, params.num_heads, params.mlp_hidden)
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.time_in = layers.mlp_embedder(256, hidden)
        self.vector_in = layers.mlp_embedder(params.vec_in_dim, hidden)
        if params.guidance_embed:
            self.guidance_in = layers.mlp_embedder(256, hidden)
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        double = [DoubleStreamBlock(*sizes) for _ in range(params.depth)]
        single = [SingleStreamBlock(*sizes) for _ in range(params.depth_single_blocks)]
        self.double_blocks = nn.ModuleList(double)
        self.single_blocks = nn.ModuleList(single)

    @property
    def modulated(self) -> list[nn.Module]:
        """The modules of the modulation's entries."""
        return [*self.double_blocks, *self.single_blocks]

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector that modulates every block, (B, D)."""
        time = layers.timestep_embedding(timesteps, 256, y.dtype)
        vec = self.time_in(time) + self.vector_in(y)
        if self.params.guidance_embed:
            scale = layers.timestep_embedding(guidance, 256, y.dtype)
            vec = vec + self.guidance_in(scale)
        return vec

    def modulation(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> list:
        """The vectors of each module in `modulated`. timesteps: (B,) in [0, 1]; y: (B, vec),
        the pooled CLIP embedding; guidance: (B,), None for schnell."""
        vec = self.conditioning(timesteps, y, guidance)
        return [module.vectors([vec])[0] for module in self.modulated]

    def modulations(self, times: list[float], y: Tensor, guidance: Tensor | None) -> list[list]:
        """`modulation` at all these times: each layer is fetched only once."""
        batches = [torch.full((len(y),), t, device=y.device) for t in times]
        vecs = [self.conditioning(t, y, guidance) for t in batches]
        by_module = [module.vectors(vecs) for module in self.modulated]
        return [list(vectors) for vectors in zip(*by_module)]

    def positions(self, ids: Tensor, x: Tensor) -> Tensor:
        """Rotary embeddings of ids (B, L, 3), (B, L, d / 2, 2), where x is."""
        precise = torch.promote_types(x.dtype, torch.float32)
        key = (ids.cpu().numpy().tobytes(), ids.shape, ids.dtype)
        return known_rope(*key, self.params, precise, x.device)

    def embed(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor) -> Hidden:
        """What the first block takes, of the arguments of Flux.forward."""
        img = self.img_in(img)
        txt = self.txt_in(txt)
        pe = [self.positions(ids, img) for ids in (txt_ids, img_ids)]
        return Hidden(img, txt, torch.cat(pe, dim=1), img.shape[1])

    def blocks(
        self, hidden: Hidden, modulation: list[Vectors], attention: Attention = plain_attention,
        join: Join = text_then_image, after_block: AfterBlock = as_it_is,
        first: int = 0, last: int | None = None,
    ) -> Hidden:  # fmt: skip
        """The blocks from `first` up to `last`, the double blocks counted first. The very last
        one computes only L_img rows: nothing reads the others."""
        img, txt, pe, length = hidden
        del hidden  # its tensors must not stay in memory while the blocks run
        depth = len(self.double_blocks)
        modules = [*self.double_blocks, *self.single_blocks]
        for i in range(len(modules))[first:last]:
            if i < depth:
                block = Block("double", i)
                img, txt = modules[i](img, txt, modulation[i], pe, attention, block)
            else:
                block = Block("single", i - depth)
                if i == depth:
                    img = join(txt, img)
                    pe = join(*pe.split([txt.shape[1], length], dim=1))
                    txt = None
                rows = length if i + 1 == len(modules) else None
                img = modules[i](img, modulation[i], pe, attention, block, rows)
            img = after_block(img, block)
        return Hidden(img, txt, pe, length)


class Flux(Streams):
    def __init__(self, params: FluxParams):
        super().__init__(params)
        self.final_layer = LastLayer(params.hidden_size, params.out_channels)

    @property
    def modulated(self) -> list[nn.Module]:
        return [*super().modulated, self.final_layer]

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, modulation: list[Vectors],
        attention: Attention = plain_attention, join: Join = text_then_image,
        after_block: AfterBlock = as_it_is,
    ) -> Tensor:  # fmt: skip
        """The velocity, (B, L_img, out_channels).

        img: (B, L_img, in_channels), packed latents.
        txt: (B, L_txt, context), T5's output.
        img_ids, txt_ids: (B, L, 3), positions.
        join: (txt, img) -> the sequence of the single blocks, which ends with the tokens to
            decode. It is also called with the rotary embeddings, so it may only repeat, drop
            and reorder rows (dimension 1).
        after_block: (x, block) -> what replaces a block's output: img, or the sequence.
        """
        hidden = self.embed(img, img_ids, txt, txt_ids)
        hidden = self.blocks(hidden, modulation, attention, join, after_block)
        return self.decode(hidden, modulation)

    def decode(self, hidden: Hidden, modulation: list[Vectors]) -> Tensor:
        return self.final_layer(hidden.img[:, -hidden.length :], modulation[-1])

    def compile_blocks(self) -> None:
        """Compile what comes before and after attention."""
        for block in *self.double_blocks, *self.single_blocks:
            block.project = torch.compile(block.project, dynamic=True)
            block.finish = torch.compile(block.finish, dynamic=True)
