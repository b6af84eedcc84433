"""SigLIP's vision encoder, so400m/14 at 384 pixels in FLUX.1 Redux, named as in Hugging Face's
files below `vision_model.`."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from model.layers import embedding
from regional.images import read_image


@dataclass(frozen=True)
class SiglipParams:
    """Sizes of the encoder; the defaults are so400m/14's at 384 pixels."""

    hidden_size: int = 1152
    mlp_hidden: int = 4304
    num_heads: int = 16
    num_layers: int = 27
    patch_size: int = 14
    image_size: int = 384

    @property
    def tokens(self) -> int:
        """Whole patches of an image; what is left at the right and the bottom is not seen."""
        return (self.image_size // self.patch_size) ** 2


class SelfAttention(nn.Module):
    def __init__(self, p: SiglipParams):
        super().__init__()
        self.num_heads = p.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(p.hidden_size, p.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        qkv = (rearrange(y(x), "B L (H d) -> B H L d", H=self.num_heads) for y in layers)
        out = F.scaled_dot_product_attention(*qkv)
        return self.out_proj(rearrange(out, "B H L d -> B L (H d)"))


class MLP(nn.Module):
    def __init__(self, p: SiglipParams):
        super().__init__()
        self.fc1 = nn.Linear(p.hidden_size, p.mlp_hidden)
        self.fc2 = nn.Linear(p.mlp_hidden, p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, p: SiglipParams):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(p.hidden_size, eps=1e-6)
        self.self_attn = SelfAttention(p)
        self.layer_norm2 = nn.LayerNorm(p.hidden_size, eps=1e-6)
        self.mlp = MLP(p)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip(nn.Module):
    def __init__(self, params: SiglipParams):
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        patch = params.patch_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, hidden, patch, stride=patch)
        self.embeddings.position_embedding = embedding(params.tokens, hidden)
        layers = nn.ModuleList(Layer(params) for _ in range(params.num_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(hidden, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, image_size, image_size) in [-1, 1] -> (B, tokens, hidden_size)."""
        patches = self.embeddings.patch_embedding(image)
        x = rearrange(patches, "B D h w -> B (h w) D")
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x)


def pixels_of(file: str, size: int) -> Tensor:
    """An image as SigLIP was trained on them, stretched to a square: (1, 3, size, size) in
    [-1, 1]."""
    image = read_image(file).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
    return pixels.float() / 127.5 - 1
