"""The building blocks of the FLUX.1 transformer. Modules carry the names of the official checkpoint.

Notation: B images, L tokens, D hidden size, H heads, d = D / H.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.attention import Attention, Block, apply_rope

# What modulates a block's tokens: the concatenated shifts, scales and gates, (B, 1, n D), or
# (B, L, n D) where tokens differ. A double block has two of them, the image's and the text's.
Vectors = Tensor | tuple[Tensor, Tensor]


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoids of 1000 t, cosine first: t (B,) in [0, 1] -> (B, dim).

    Computed in float32 (float64 for a float64 model): bfloat16 would round a guidance of 3500 to 3504.
    """
    precise = torch.promote_types(dtype, torch.float32)
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=precise, device=t.device) / (dim // 2))
    args = 1000.0 * t.to(precise)[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1).to(dtype)


def embedding(count: int, width: int) -> nn.Embedding:
    """torch's, but on the meta device without its random initialization, which takes a second there."""
    weight = torch.empty(count, width)
    return nn.Embedding(count, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


class MLPEmbedder(nn.Module):
    """(B, in_dim) -> (B, D)."""

    def __init__(self, in_dim: int, hidden: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or more."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        rrms = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + 1e-6)
        return (precise * rrms).type_as(x) * self.scale


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split the fused projection (B, L, 3 D) into q, k, v (B, H, L, d) and normalize q and k."""
        q, k, v = rearrange(qkv, "B L (three H d) -> three B H L d", three=3, H=heads)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The projections around attention; the attention itself runs over both streams, in DoubleStreamBlock."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(hidden, hidden * 3)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)


class Modulation(nn.Module):
    """adaLN: the conditioning vector (B, D) -> shift, scale and gate, once or twice, concatenated: (B, 1, n D)."""

    def __init__(self, hidden: int, multiplier: int):
        super().__init__()
        self.lin = nn.Linear(hidden, multiplier * hidden)

    def forward(self, vec: Tensor) -> Tensor:
        return self.lin(F.silu(vec)[:, None, :])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift: x (B, L, D), shift and scale (B, 1, D)."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def mlp(hidden: int, mlp_hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden))


class FusedLinear(nn.Linear):
    """Several layers that read the same input, as one matrix; `rows` gives the outputs of some of them alone."""

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return F.linear(x, self.weight[rows], self.bias[rows])


class DoubleStreamBlock(nn.Module):
    """Text and image keep weights of their own and meet in one attention over [txt, img]."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.heads = heads
        self.img_mod = Modulation(hidden, 6)
        self.img_attn = SelfAttention(hidden, heads)
        self.img_mlp = mlp(hidden, mlp_hidden)
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn = SelfAttention(hidden, heads)
        self.txt_mlp = mlp(hidden, mlp_hidden)

    def vectors(self, vecs: list[Tensor]) -> list[Vectors]:
        """For each vec (B, D) the vectors that `forward` takes, 6 for the image and 6 for the text.

        One layer handles all of them before the other does: their weights may have to be fetched.
        """
        img = [self.img_mod(vec) for vec in vecs]
        txt = [self.txt_mod(vec) for vec in vecs]
        return list(zip(img, txt))

    def forward(
        self, img: Tensor, txt: Tensor, vectors: Vectors, pe: Tensor, attention: Attention, block: Block
    ) -> tuple[Tensor, Tensor]:
        """img (B, L_img, D), txt (B, L_txt, D), pe (B, L_txt + L_img, d / 2, 2) -> new img, txt."""
        return self.finish(img, txt, vectors, attention(*self.project(img, txt, vectors, pe), block))

    def project(self, img: Tensor, txt: Tensor, vectors: Vectors, pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is given: q, k, v (B, H, L_txt + L_img, d), normalized and rotated."""
        (img_shift, img_scale, *_), (txt_shift, txt_scale, *_) = (x.chunk(6, dim=-1) for x in vectors)
        img_q, img_k, img_v = self.img_attn.norm(self.img_attn.qkv(modulate(img, img_shift, img_scale)), self.heads)
        txt_q, txt_k, txt_v = self.txt_attn.norm(self.txt_attn.qkv(modulate(txt, txt_shift, txt_scale)), self.heads)
        q = apply_rope(torch.cat([txt_q, img_q], dim=2), pe)
        k = apply_rope(torch.cat([txt_k, img_k], dim=2), pe)
        return q, k, torch.cat([txt_v, img_v], dim=2)

    def finish(self, img: Tensor, txt: Tensor, vectors: Vectors, attn: Tensor) -> tuple[Tensor, Tensor]:
        """All that follows attention, whose output `attn` is (B, H, L_txt + L_img, d)."""
        img_vectors, txt_vectors = vectors
        _, _, img_gate1, img_shift, img_scale, img_gate2 = img_vectors.chunk(6, dim=-1)
        _, _, txt_gate1, txt_shift, txt_scale, txt_gate2 = txt_vectors.chunk(6, dim=-1)
        attn = rearrange(attn, "B H L d -> B L (H d)")
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift, img_scale))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift, txt_scale))
        return img, txt


class SingleStreamBlock(nn.Module):
    """One stream, attention and MLP side by side: linear1 makes q, k, v and the MLP's input, linear2 joins them."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.heads = heads
        self.linear1 = FusedLinear(hidden, hidden * 3 + mlp_hidden)
        self.linear2 = nn.Linear(hidden + mlp_hidden, hidden)
        self.norm = QKNorm(hidden // heads)
        self.modulation = Modulation(hidden, 3)

    def vectors(self, vecs: list[Tensor]) -> list[Vectors]:
        """For each vec (B, D) the 3 vectors that `forward` takes, concatenated."""
        return [self.modulation(vec) for vec in vecs]

    def forward(
        self, x: Tensor, vectors: Vectors, pe: Tensor, attention: Attention, block: Block, last: int | None = None
    ) -> Tensor:
        """x (B, L, D), pe (B, L, d / 2, 2) -> new x; with `last` only its last so many rows."""
        *qkv, h = self.project(x, vectors, pe)
        attn = attention(*qkv, block)
        del qkv  # what follows needs the most memory
        if last is not None:
            first = x.shape[1] - last
            x, h, attn = x[:, first:], h[:, first:], attn[:, :, first:]
        return self.finish(x, h, vectors, attn)

    def project(self, x: Tensor, vectors: Vectors, pe: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What attention is given, q, k, v (B, H, L, d), and h (B, L, D), which the MLP reads too."""
        shift, scale, _ = vectors.chunk(3, dim=-1)
        h = modulate(x, shift, scale)
        q, k, v = self.norm(self.linear1(h, rows=slice(0, 3 * x.shape[-1])), self.heads)
        return apply_rope(q, pe), apply_rope(k, pe), v, h

    def finish(self, x: Tensor, h: Tensor, vectors: Vectors, attn: Tensor) -> Tensor:
        """All that follows attention, whose output `attn` is (B, H, L, d)."""
        gate = vectors.chunk(3, dim=-1)[2]
        # where tokens have vectors of their own, x may be the last of them alone
        gate = gate[:, max(0, gate.shape[1] - x.shape[1]) :]
        mlp = F.gelu(self.linear1(h, rows=slice(3 * x.shape[-1], None)), approximate="tanh")
        return x + gate * self.linear2(torch.cat([rearrange(attn, "B H L d -> B L (H d)"), mlp], dim=-1))


class LastLayer(nn.Module):
    """(B, L, D) -> (B, L, out_channels)."""

    def __init__(self, hidden: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def vectors(self, vecs: list[Tensor]) -> list[Vectors]:
        """For each vec (B, D) the 2 vectors that `forward` takes, concatenated."""
        return [self.adaLN_modulation(vec[:, None, :]) for vec in vecs]

    def forward(self, x: Tensor, vectors: Vectors) -> Tensor:
        return self.linear(modulate(x, *vectors.chunk(2, dim=-1)))
