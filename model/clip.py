"""CLIP-L's text encoder, named as in Hugging Face's. FLUX.1 uses the pooled vector."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.layers import embedding


@dataclass(frozen=True)
class CLIPParams:
    """Sizes of the text encoder; the defaults are CLIP-L's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    max_positions: int = 77


class SelfAttention(nn.Module):
    def __init__(self, p: CLIPParams):
        super().__init__()
        self.num_heads = p.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(p.hidden_size, p.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        qkv = (rearrange(y(x), "B L (H d) -> B H L d", H=self.num_heads) for y in layers)
        out = F.scaled_dot_product_attention(*qkv, is_causal=True)
        return self.out_proj(rearrange(out, "B H L d -> B L (H d)"))


class MLP(nn.Module):
    def __init__(self, p: CLIPParams):
        super().__init__()
        self.fc1 = nn.Linear(p.hidden_size, p.intermediate_size)
        self.fc2 = nn.Linear(p.intermediate_size, p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # "quick GELU"


class Layer(nn.Module):
    def __init__(self, p: CLIPParams):
        super().__init__()
        self.self_attn = SelfAttention(p)
        self.layer_norm1 = nn.LayerNorm(p.hidden_size)
        self.mlp = MLP(p)
        self.layer_norm2 = nn.LayerNorm(p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEncoder(nn.Module):
    def __init__(self, params: CLIPParams):
        super().__init__()
        self.params = params
        layers = nn.ModuleList(Layer(params) for _ in range(params.num_layers))
        self.text_model = nn.Module()
        tokens = embedding(params.vocab_size, params.hidden_size)
        positions = embedding(params.max_positions, params.hidden_size)
        embeddings = {"token_embedding": tokens, "position_embedding": positions}
        self.text_model.embeddings = nn.ModuleDict(embeddings)
        self.text_model.encoder = nn.ModuleDict({"layers": layers})
        self.text_model.final_layer_norm = nn.LayerNorm(params.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, hidden_size): the state at the first end token, the largest id."""
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids)
        x = x + embeddings.position_embedding.weight[: ids.shape[1]]
        for layer in self.text_model.encoder["layers"]:
            x = layer(x)
        x = self.text_model.final_layer_norm(x)
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
