"""The blocks of FLUX.1's transformer, named as in the official checkpoint.

B images, L tokens, D hidden size, H heads, d = D / H.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.attention import Attention, Block, apply_rope

# Shifts, scales and gates, concatenated, (B, 1, n D), or (B, L, n D) where tokens differ. A
# double block has two, the image's and the text's.
Vectors = Tensor | tuple[Tensor, Tensor]


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoids of 1000 t, cosine first: t (B,) in [0, 1] -> (B, dim)."""
    # bfloat16 would round a guidance of 3500 to 3504.
    precise = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(dim // 2, dtype=precise, device=t.device)
    freqs = torch.exp(-math.log(10000) * steps / (dim // 2))
    args = 1000.0 * t.to(precise)[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1).to(dtype)


def embedding(count: int, width: int) -> nn.Embedding:
    """torch's, but not initialized on the meta device, where that takes a second."""
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(count, width, _weight=weight)


def sequence(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def mlp_embedder(in_dim: int, hidden: int) -> nn.Sequential:
    start = nn.Linear(in_dim, hidden)
    return sequence(in_layer=start, silu=nn.SiLU(), out_layer=nn.Linear(hidden, hidden))


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    rrms = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + 1e-6)
    return (precise * rrms).type_as(x) * scale


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projection (B, L, 3 D) into q, k, v (B, H, L, d); normalize q and k."""
        q, k, v = rearrange(qkv, "B L (three H d) -> three B H L d", three=3, H=heads)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The projections of one stream; attention runs over both, in DoubleStreamBlock."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, hidden * 3)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> normalized q, k and v (B, H, L, d)."""
        shift, scale, *_ = vectors.chunk(6, dim=-1)
        return self.norm(self.qkv(modulate(x, shift, scale)), self.heads)


class Modulation(nn.Module):
    """adaLN: the conditioning vector (B, D) -> shifts, scales and gates, (B, 1, n D)."""

    def __init__(self, hidden: int, multiplier: int):
        super().__init__()
        self.lin = nn.Linear(hidden, multiplier * hidden)

    def forward(self, vec: Tensor) -> Tensor:
        return self.lin(F.silu(vec)[:, None, :])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def mlp(hidden: int, mlp_hidden: int) -> nn.Sequential:
    gelu = nn.GELU(approximate="tanh")
    return nn.Sequential(nn.Linear(hidden, mlp_hidden), gelu, nn.Linear(mlp_hidden, hidden))


class FusedLinear(nn.Linear):
    """Several layers that read the same input; `rows` selects some of their outputs."""

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return F.linear(x, self.weight[rows], self.bias[rows])


class DoubleStreamBlock(nn.Module):
    """Text and image have their own weights and meet in one attention."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.img_mod = Modulation(hidden, 6)
        self.img_attn = SelfAttention(hidden, heads)
        self.img_mlp = mlp(hidden, mlp_hidden)
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn = SelfAttention(hidden, heads)
        self.txt_mlp = mlp(hidden, mlp_hidden)

    def vectors(self, vecs: list[Tensor]) -> list[Vectors]:
        """For each vec (B, D) the 6 vectors of the image and of the text."""
        # One layer after the other, as their weights may have to be fetched.
        img = [self.img_mod(vec) for vec in vecs]
        txt = [self.txt_mod(vec) for vec in vecs]
        return list(zip(img, txt))

    def forward(
        self, img: Tensor, txt: Tensor, vectors: Vectors, pe: Tensor, attention: Attention,
        block: Block,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """img (B, L_img, D), txt (B, L_txt, D), pe (B, L, d / 2, 2) -> new img, txt."""
        attn = attention(*self.project(img, txt, vectors, pe), block)
        return self.finish(img, txt, vectors, attn)

    def project(self, img: Tensor, txt: Tensor, vectors: Vectors, pe: Tensor) -> tuple:
        """What attention is given: q, k, v (B, H, L, d), L = L_txt + L_img."""
        img_q, img_k, img_v = self.img_attn(img, vectors[0])
        txt_q, txt_k, txt_v = self.txt_attn(txt, vectors[1])
        q = apply_rope(torch.cat([txt_q, img_q], dim=2), pe)
        k = apply_rope(torch.cat([txt_k, img_k], dim=2), pe)
        return q, k, torch.cat([txt_v, img_v], dim=2)

    def finish(self, img: Tensor, txt: Tensor, vectors: Vectors, attn: Tensor) -> tuple:
        """All that follows attention, whose output `attn` is (B, H, L, d)."""
        attn = rearrange(attn, "B H L d -> B L (H d)")
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)
        img = self.finish_stream(img, vectors[0], self.img_attn.proj(img_attn), self.img_mlp)
        txt = self.finish_stream(txt, vectors[1], self.txt_attn.proj(txt_attn), self.txt_mlp)
        return img, txt

    def finish_stream(self, x: Tensor, vectors: Tensor, attn: Tensor, mlp: nn.Module) -> Tensor:
        _, _, gate1, shift, scale, gate2 = vectors.chunk(6, dim=-1)
        x = x + gate1 * attn
        return x + gate2 * mlp(modulate(x, shift, scale))


class SingleStreamBlock(nn.Module):
    """One stream; attention and MLP side by side, between linear1 and linear2."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.heads = heads
        self.linear1 = FusedLinear(hidden, hidden * 3 + mlp_hidden)
        self.linear2 = nn.Linear(hidden + mlp_hidden, hidden)
        self.norm = QKNorm(hidden // heads)
        self.modulation = Modulation(hidden, 3)

    def vectors(self, vecs: list[Tensor]) -> list[Vectors]:
        """For each vec (B, D) the 3 vectors."""
        return [self.modulation(vec) for vec in vecs]

    def forward(
        self, x: Tensor, vectors: Vectors, pe: Tensor, attention: Attention, block: Block,
        last: int | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, L, D), pe (B, L, d / 2, 2) -> new x, or only its `last` rows."""
        *qkv, h = self.project(x, vectors, pe)
        attn = attention(*qkv, block)
        del qkv  # what follows needs the most memory
        if last is not None:
            first = x.shape[1] - last
            x = x[:, first:]
            h = h[:, first:]
            attn = attn[:, :, first:]
        return self.finish(x, h, vectors, attn)

    def project(self, x: Tensor, vectors: Vectors, pe: Tensor) -> tuple:
        """What attention is given, and h (B, L, D), the MLP's input."""
        shift, scale, _ = vectors.chunk(3, dim=-1)
        h = modulate(x, shift, scale)
        q, k, v = self.norm(self.linear1(h, rows=slice(0, 3 * x.shape[-1])), self.heads)
        return apply_rope(q, pe), apply_rope(k, pe), v, h

    def finish(self, x: Tensor, h: Tensor, vectors: Vectors, attn: Tensor) -> Tensor:
        gate = vectors.chunk(3, dim=-1)[2]
        # Where tokens have vectors of their own, x may be the last of them alone.
        gate = gate[:, max(0, gate.shape[1] - x.shape[1]) :]
        # Nested, so that the layer's output is free when the next one begins.
        mlp = F.gelu(self.linear1(h, rows=slice(3 * x.shape[-1], None)), approximate="tanh")
        attn = rearrange(attn, "B H L d -> B L (H d)")
        return x + gate * self.linear2(torch.cat([attn, mlp], dim=-1))


class LastLayer(nn.Module):
    def __init__(self, hidden: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def vectors(self, vecs: list[Tensor]) -> list[Vectors]:
        """For each vec (B, D) the 2 vectors."""
        return [self.adaLN_modulation(vec[:, None, :]) for vec in vecs]

    def forward(self, x: Tensor, vectors: Vectors) -> Tensor:
        return self.linear(modulate(x, *vectors.chunk(2, dim=-1)))
