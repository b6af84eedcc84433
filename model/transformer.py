"""FLUX.1's transformer: text and image tokens in, the velocity of the image tokens out.

It knows nothing of regions. Three functions passed to `forward` change what it computes: `attention`; `join`, which
puts the streams together where the double blocks end; and `after_block`, through which ControlNets add residuals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from model.attention import Attention, Block, plain_attention, rope, rope_axes
from model.layers import DoubleStreamBlock, LastLayer, MLPEmbedder, SingleStreamBlock, Vectors, timestep_embedding


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a FLUX.1-like transformer; weights.py reads them off the checkpoint. The defaults are FLUX.1-dev's."""

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


def text_then_image(txt: Tensor, img: Tensor) -> Tensor:
    """The plain sequence of the single blocks: txt (B, L_txt, ...), img (B, L_img, ...) -> (B, L_txt + L_img, ...)."""
    return torch.cat([txt, img], dim=1)


def as_it_is(x: Tensor, block: Block) -> Tensor:
    return x


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may serve training too
def known_rope(
    ids: bytes,
    shape: torch.Size,
    ids_dtype: torch.dtype,
    axes: tuple[int, ...],
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`rope`, remembered: every step asks for the same tables, and a GPU would wait for them in each."""
    positions = torch.frombuffer(bytearray(ids), dtype=ids_dtype).reshape(shape)
    return rope(positions, axes, theta, dtype).to(device)


# Gives a block, or the last layer, the vectors that modulate its tokens
Modulate = Callable[[nn.Module], Vectors]


class Streams(nn.Module):
    """What FLUX.1 and its ControlNets share: the embedders and the blocks."""

    def __init__(self, params: FluxParams):
        super().__init__()
        self.params = params
        hidden, heads, mlp_hidden = params.hidden_size, params.num_heads, params.mlp_hidden
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(params.vec_in_dim, hidden)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(256, hidden)
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(hidden, heads, mlp_hidden) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden, heads, mlp_hidden) for _ in range(params.depth_single_blocks)
        )

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector that modulates every block, (B, D): timesteps (B,), y (B, vec), guidance (B,)."""
        vec = self.time_in(timestep_embedding(timesteps, 256, y.dtype)) + self.vector_in(y)
        if self.params.guidance_embed:
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256, y.dtype))
        return vec

    def modulation(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Modulate:
        """What modulates every block at these timesteps; each block's vectors are computed when they are asked for."""
        vec = self.conditioning(timesteps, y, guidance)
        return lambda module: module.vectors(vec)[0]

    def positions(self, ids: Tensor, x: Tensor) -> Tensor:
        """RoPE's table for ids (B, L, 3), where x is, (B, L, d / 2, 2) in float32 or wider."""
        axes = rope_axes(self.params.hidden_size // self.params.num_heads)
        precise = torch.promote_types(x.dtype, torch.float32)
        return known_rope(ids.cpu().numpy().tobytes(), ids.shape, ids.dtype, axes, self.params.theta, precise, x.device)

    def blocks(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        modulation: Modulate,
        attention: Attention = plain_attention,
        join: Callable[[Tensor, Tensor], Tensor] = text_then_image,
        after_block: Callable[[Tensor, Block], Tensor] = as_it_is,
    ) -> Tensor:
        """All blocks: img (B, L_img, D), txt (B, L_txt, D) -> (B, L_img, D), the last rows of what the last one gives.
        Nothing reads the others, so it doesn't compute them."""
        txt_pe, img_pe = self.positions(txt_ids, img), self.positions(img_ids, img)
        pe = torch.cat([txt_pe, img_pe], dim=1)
        for index, double_block in enumerate(self.double_blocks):
            block = Block("double", index)
            img, txt = double_block(img, txt, modulation(double_block), pe, attention, block)
            img = after_block(img, block)

        x, pe = join(txt, img), join(txt_pe, img_pe)
        for index, single_block in enumerate(self.single_blocks):
            block = Block("single", index)
            last = img.shape[1] if index + 1 == len(self.single_blocks) else None
            x = after_block(single_block(x, modulation(single_block), pe, attention, block, last), block)
        return x[:, x.shape[1] - img.shape[1] :]


class Flux(Streams):
    def __init__(self, params: FluxParams):
        super().__init__(params)
        self.final_layer = LastLayer(params.hidden_size, params.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        attention: Attention = plain_attention,
        join: Callable[[Tensor, Tensor], Tensor] = text_then_image,
        after_block: Callable[[Tensor, Block], Tensor] = as_it_is,
        modulation: Modulate | None = None,
    ) -> Tensor:
        """The velocity at `timesteps`, (B, L_img, out_channels).

        img (B, L_img, in_channels) packed latents; img_ids (B, L_img, 3); txt (B, L_txt, context) T5 states; txt_ids
        (B, L_txt, 3); timesteps (B,) in [0, 1]; y (B, vec) CLIP's pooled vector; guidance (B,), needed exactly when
        the checkpoint has a guidance embedder.

        `join(txt, img)` makes the sequence of the single blocks; whatever it makes must end with the image tokens to
        decode. It is also given the position tables, so it may only repeat, drop and reorder rows (dimension 1).
        `after_block(x, block)` gives what goes on from a block: x is img (B, L_img, D) in the double blocks, and the
        sequence that `join` made in the single ones; after the last of those only its last L_img rows are left.
        `modulation`: what `self.modulation` gives for these timesteps, y and guidance, if it is known already.
        """
        modulation = modulation or self.modulation(timesteps, y, guidance)
        x = self.blocks(self.img_in(img), img_ids, self.txt_in(txt), txt_ids, modulation, attention, join, after_block)
        return self.final_layer(x, modulation(self.final_layer))

    def modulations(self, timesteps: list[float], y: Tensor, guidance: Tensor | None) -> list[Modulate]:
        """`modulation` at each of these timesteps, computed at once, one layer after the other: the same numbers, after
        which the weights behind them (27 % of FLUX.1's) are not needed any more."""
        vecs = [self.conditioning(torch.full((len(y),), t, device=y.device), y, guidance) for t in timesteps]
        modules = *self.double_blocks, *self.single_blocks, self.final_layer
        vectors = {module: module.vectors(*vecs) for module in modules}
        return [lambda module, step=step: vectors[module][step] for step in range(len(timesteps))]

    def compile_blocks(self) -> None:
        """Have torch.compile make the blocks' two halves, before and after attention, at their first call. All blocks
        of a kind share what is made, at any length of the sequence."""
        for block in *self.double_blocks, *self.single_blocks:
            block.project = torch.compile(block.project, dynamic=True)
            block.finish = torch.compile(block.finish, dynamic=True)
