"""The encoder of T5 v1.1, in Hugging Face's names, as its checkpoints."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.layers import embedding, rms_norm

linear = partial(nn.Linear, bias=False)
MAX_DISTANCE = 128  # Beyond it all are in the last bucket.


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


class T5LayerNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def relative_buckets(length: int, num_buckets: int) -> Tensor:
    """Buckets of (query, key) distances: exact up to num_buckets / 4, then logarithmic."""
    position = torch.arange(length)
    relative = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = num_buckets // 4
    distance = relative.abs()
    # In float32: the buckets' borders are part of the trained model.
    log = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class SelfAttention(nn.Module):
    def __init__(self, p: T5Params, has_bias: bool):
        super().__init__()
        inner = p.num_heads * p.d_kv
        self.num_heads = p.num_heads
        self.q = linear(p.d_model, inner)
        self.k = linear(p.d_model, inner)
        self.v = linear(p.d_model, inner)
        self.o = linear(inner, p.d_model)
        if has_bias:  # in the first block; all use it
            self.relative_attention_bias = embedding(p.num_buckets, p.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, d_model), bias (1, H, L, L), added to the unscaled scores."""
        layers = self.q, self.k, self.v
        qkv = (rearrange(y(x), "B L (H d) -> B H L d", H=self.num_heads) for y in layers)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=bias, scale=1.0)
        return self.o(rearrange(out, "B H L d -> B L (H d)"))


class GatedMLP(nn.Module):
    def __init__(self, p: T5Params):
        super().__init__()
        self.wi_0 = linear(p.d_model, p.d_ff)
        self.wi_1 = linear(p.d_model, p.d_ff)
        self.wo = linear(p.d_ff, p.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(nn.Module):
    def __init__(self, p: T5Params, has_bias: bool):
        super().__init__()
        layers = {"SelfAttention": SelfAttention(p, has_bias), "DenseReluDense": GatedMLP(p)}
        self.layer = nn.ModuleList()
        for name, layer in layers.items():
            norm = T5LayerNorm(p.d_model)
            self.layer.append(nn.ModuleDict({name: layer, "layer_norm": norm}))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + mlp["DenseReluDense"](mlp["layer_norm"](x))


class T5Encoder(nn.Module):
    def __init__(self, params: T5Params):
        super().__init__()
        self.params = params
        self.shared = embedding(params.vocab_size, params.d_model)
        self.encoder = nn.Module()
        blocks = [T5Block(params, has_bias=i == 0) for i in range(params.num_layers)]
        self.encoder.block = nn.ModuleList(blocks)
        self.encoder.final_layer_norm = T5LayerNorm(params.d_model)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> states (B, L, d_model). FLUX.1 was trained with the padding taking part."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        buckets = relative_buckets(ids.shape[1], self.params.num_buckets).to(ids.device)
        bias = rearrange(table(buckets), "q k H -> 1 H q k").contiguous()
        x = self.shared(ids)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
