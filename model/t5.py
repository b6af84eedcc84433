"""The encoder of T5 v1.1. Modules carry Hugging Face's names, so that its checkpoints load as they are."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.layers import embedding


@dataclass(frozen=True)
class T5Params:
    """Sizes of the encoder; the defaults are T5 v1.1 XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_ff: int = 10240
    d_kv: int = 64
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


MAX_DISTANCE = 128  # beyond it all distances share the last bucket; the same in every T5


class T5LayerNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in float32 or wider."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.type_as(x)


def relative_buckets(length: int, num_buckets: int) -> Tensor:
    """The bucket of each (query, key) distance, (length, length): exact up to num_buckets / 4, then logarithmic."""
    position = torch.arange(length)
    relative = position[None, :] - position[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    distance = relative.abs()
    # in float32 as everywhere else: bucket borders are part of the trained model
    log = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + log.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class SelfAttention(nn.Module):
    def __init__(self, p: T5Params, has_bias: bool):
        super().__init__()
        inner = p.num_heads * p.d_kv
        self.num_heads = p.num_heads
        self.q = nn.Linear(p.d_model, inner, bias=False)
        self.k = nn.Linear(p.d_model, inner, bias=False)
        self.v = nn.Linear(p.d_model, inner, bias=False)
        self.o = nn.Linear(inner, p.d_model, bias=False)
        if has_bias:  # only the first block's attention holds the table; all blocks use it
            self.relative_attention_bias = embedding(p.num_buckets, p.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, d_model), bias (1, H, L, L), added to the unscaled scores."""
        q, k, v = (rearrange(m(x), "B L (H d) -> B H L d", H=self.num_heads) for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(out, "B H L d -> B L (H d)"))


class AttentionLayer(nn.Module):
    def __init__(self, p: T5Params, has_bias: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(p, has_bias)
        self.layer_norm = T5LayerNorm(p.d_model)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedMLP(nn.Module):
    def __init__(self, p: T5Params):
        super().__init__()
        self.wi_0 = nn.Linear(p.d_model, p.d_ff, bias=False)
        self.wi_1 = nn.Linear(p.d_model, p.d_ff, bias=False)
        self.wo = nn.Linear(p.d_ff, p.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class MLPLayer(nn.Module):
    def __init__(self, p: T5Params):
        super().__init__()
        self.DenseReluDense = GatedMLP(p)
        self.layer_norm = T5LayerNorm(p.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, p: T5Params, has_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(p, has_bias), MLPLayer(p)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nn.Module):
    def __init__(self, p: T5Params):
        super().__init__()
        self.block = nn.ModuleList(T5Block(p, has_bias=i == 0) for i in range(p.num_layers))
        self.final_layer_norm = T5LayerNorm(p.d_model)


class T5Encoder(nn.Module):
    def __init__(self, params: T5Params):
        super().__init__()
        self.params = params
        self.shared = embedding(params.vocab_size, params.d_model)
        self.encoder = T5Stack(params)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> states (B, L, d_model). No attention mask: FLUX.1 was trained with the padding taking part."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        buckets = relative_buckets(ids.shape[1], self.params.num_buckets).to(ids.device)
        bias = rearrange(table(buckets), "q k H -> 1 H q k").contiguous()
        x = self.shared(ids)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
