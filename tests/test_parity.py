"""Our networks against diffusers' and transformers' on small random models in float64: no difference above 1e-9.

In float64 a wrong constant or a swapped half shows at any size, and rounding hides nothing. Some steps of those
libraries are float32 whatever the model's dtype; the fixtures below make them float64:
- diffusers' sinusoids of time and guidance (get_timestep_embedding),
- diffusers' table of RoPE and its application (FluxPosEmbed, get_1d_rotary_pos_embed, apply_rotary_emb),
- the variance in transformers' T5LayerNorm.
Our code rounds none of these in a float64 model. The mapping of names is written here once more, so that a mistake in
weights.py can't hide itself.
"""

import math
import re
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams

TOLERANCE = 1e-9


def sinusoids(timesteps: Tensor, embedding_dim: int, flip_sin_to_cos: bool, **kwargs: float) -> Tensor:
    """What get_timestep_embedding gives with FLUX.1's arguments, from float64 frequencies."""
    assert flip_sin_to_cos and kwargs["downscale_freq_shift"] == 0
    count = embedding_dim // 2
    frequencies = torch.tensor([math.pow(10_000, -i / count) for i in range(count)], dtype=torch.float64)
    angles = timesteps.double()[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


@pytest.fixture
def diffusers(monkeypatch) -> ModuleType:
    library = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    import diffusers.models.embeddings as embeddings

    monkeypatch.setattr(embeddings, "get_timestep_embedding", sinusoids)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # RoPE: table and application
    return library


@pytest.fixture
def transformers(monkeypatch) -> ModuleType:
    library = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    from transformers.models.t5 import modeling_t5

    def precise_norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", precise_norm)
    return library


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters random: with biases of 0 and norms of 1 some mistakes don't show."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval().requires_grad_(False)
    for parameter in module.parameters():
        deviation = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype == torch.float64 and ours.shape == theirs.shape and theirs.std() > 0.01
    return (ours - theirs).abs().max().item()


def load_renamed(ours: nn.Module, theirs: nn.Module, renames: dict) -> None:
    """Fill ours from theirs: regular expressions turn our name into theirs, and {a,b} means both, concatenated."""
    state, unused = {}, set(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        other = name
        for pattern, replacement in renames.items():
            other = re.sub(pattern, replacement, other)
        before, _, rest = other.partition("{")
        parts, _, after = rest.partition("}")
        others = [before + part + after for part in parts.split(",")]
        state[name] = torch.cat([theirs.state_dict()[key] for key in others]).reshape(tensor.shape)
        unused -= set(others)
    assert not unused
    ours.double().requires_grad_(False).load_state_dict(state)


FLUX_NAMES = {
    r"^img_in": "x_embedder", r"^txt_in": "context_embedder",
    r"^time_in": "time_text_embed.timestep_embedder",
    r"^guidance_in": "time_text_embed.guidance_embedder",
    r"^vector_in": "time_text_embed.text_embedder", r"\.in_layer": ".linear_1",
    r"\.out_layer": ".linear_2", r"^double_blocks": "transformer_blocks",
    r"img_mod\.lin": "norm1.linear", r"txt_mod\.lin": "norm1_context.linear",
    r"img_attn\.qkv": "attn.{to_q,to_k,to_v}",
    r"txt_attn\.qkv": "attn.{add_q_proj,add_k_proj,add_v_proj}",
    r"img_attn\.norm\.(.).*\.scale": r"attn.norm_\1.weight",
    r"txt_attn\.norm\.(.).*\.scale": r"attn.norm_added_\1.weight",
    r"img_attn\.proj": "attn.to_out.0", r"txt_attn\.proj": "attn.to_add_out",
    r"img_mlp\.": "ff.net.", r"txt_mlp\.": "ff_context.net.", r"net\.0": "net.0.proj",
    r"^single_blocks": "single_transformer_blocks", r"modulation\.lin": "norm.linear",
    r"linear1\.": "{attn.to_q,attn.to_k,attn.to_v,proj_mlp}.", r"linear2": "proj_out",
    r"(\d)\.norm\.(.).*\.scale": r"\1.attn.norm_\2.weight", r"^final_layer\.linear": "proj_out",
    r"^final_layer\.adaLN_modulation\.1": "norm_out.linear",
}  # fmt: skip


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("head_dim, axes, heads, depth", [(32, (4, 14, 14), 3, (1, 3)), (64, (8, 28, 28), 2, (3, 1))])
def test_our_flux_is_diffusers_flux(diffusers, guidance, head_dim, axes, heads, depth):
    hidden, (double, single) = head_dim * heads, depth
    theirs = randomized(
        diffusers.FluxTransformer2DModel(
            in_channels=12, num_layers=double, num_single_layers=single, attention_head_dim=head_dim,
            num_attention_heads=heads, joint_attention_dim=40, pooled_projection_dim=24,
            guidance_embeds=guidance, axes_dims_rope=axes,
        )
    )  # fmt: skip
    ours = Flux(FluxParams(12, 12, 24, 40, hidden, 4 * hidden, heads, double, single, guidance_embed=guidance))
    load_renamed(ours, theirs, FLUX_NAMES)
    final = ours.final_layer.adaLN_modulation[1]  # diffusers keeps (scale, shift), the official names (shift, scale)
    for parameter in (final.weight, final.bias):
        parameter.copy_(parameter.roll(hidden, dims=0))

    rows, columns, words = 3, 5, 7
    img, txt, y = random(2, rows * columns, 12), random(2, words, 40, seed=2), random(2, 24, seed=3)
    img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).double()
    txt_ids = torch.zeros(words, 3).double()
    time, strength = torch.tensor([0.317, 1.0]).double(), torch.tensor([3.5, 1.1]).double() if guidance else None
    wanted = theirs(img, txt, y, time, img_ids, txt_ids, strength, return_dict=False)[0]
    modulation = ours.modulation(time, y, strength)
    got = ours(img, img_ids.expand(2, -1, -1), txt, txt_ids.expand(2, -1, -1), modulation)
    assert largest_difference(got, wanted) < TOLERANCE


@pytest.mark.parametrize("channels, groups, blocks", [((32, 32, 64, 96), 16, 2), ((32, 64), 32, 1)])
def test_our_autoencoder_is_diffusers_autoencoder(diffusers, channels, groups, blocks):
    levels = len(channels)
    theirs = randomized(
        diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels, block_out_channels=channels,
            layers_per_block=blocks, latent_channels=6, norm_num_groups=groups,
            use_quant_conv=False, use_post_quant_conv=False,
        )
    )  # fmt: skip
    shift, scale = 0.2, 0.7
    factors = tuple(c // channels[0] for c in channels)
    ours = AutoEncoder(AutoEncoderParams(channels[0], factors, blocks, 6, groups, scale, shift))
    names = {
        r"\.mid\.block_1": ".mid_block.resnets.0", r"\.mid\.block_2": ".mid_block.resnets.1",
        r"\.mid\.attn_1": ".mid_block.attentions.0",
        r"attentions\.0\.norm": "attentions.0.group_norm",
        r"attentions\.0\.([qkv])\.": r"attentions.0.to_\1.",
        r"attentions\.0\.proj_out": "attentions.0.to_out.0", r"\.norm_out": ".conv_norm_out",
        r"nin_shortcut": "conv_shortcut", r"\.(down|up)\.(\d)\.block": r".\1_blocks.\2.resnets",
        r"\.(down|up)\.(\d)\.\1sample\.": r".\1_blocks.\2.\1samplers.0.",
        r"decoder\.up_blocks\.(\d)": lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}",  # theirs in order of use
    }  # fmt: skip
    load_renamed(ours, theirs, names)
    side = 2 ** (levels - 1)

    picture = random(2, 3, 3 * side, 5 * side)
    mean = theirs.encode(picture).latent_dist.mean
    assert largest_difference(ours.encode(picture), (mean - shift) * scale) < TOLERANCE
    latents = random(2, 6, 5, 3, seed=2)
    assert largest_difference(ours.decode(latents), theirs.decode(latents / scale + shift).sample) < TOLERANCE


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("buckets, layers", [(32, 3), (16, 1)])
def test_our_t5_is_transformers_t5(transformers, length, buckets, layers):
    """300 tokens reach past the distance of 128 from which on all distances share a bucket."""
    config = transformers.T5Config(
        vocab_size=90, d_model=24, d_ff=56, d_kv=16, num_heads=3, num_layers=layers,
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    theirs = randomized(transformers.T5EncoderModel(config))
    ours = T5Encoder(T5Params(90, 24, 56, 16, 3, layers, buckets)).double()
    state = theirs.state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # shared.weight once more
    ours.load_state_dict(state)
    ids = torch.randint(90, (2, length), generator=torch.Generator().manual_seed(3))
    ids[0, length // 2 :] = 0  # padding takes part: no mask on either side
    assert largest_difference(ours(ids), theirs(ids).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("eos_token_id", [2, 89], ids=["largest_id", "first_end"])
@pytest.mark.parametrize("length", [77, 20])
def test_our_clip_is_transformers_clip(transformers, eos_token_id, length):
    """With the end token 2 of older configurations, transformers looks for the largest id, else for the end token."""
    config = transformers.CLIPTextConfig(
        vocab_size=90, hidden_size=36, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=3, hidden_act="quick_gelu", bos_token_id=88, eos_token_id=eos_token_id,
    )  # fmt: skip
    theirs = randomized(transformers.CLIPTextModel(config))
    ours = CLIPTextEncoder(CLIPParams(90, 36, 80, 3, 3)).double()
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in theirs.state_dict().items()}
    state.pop("text_model.embeddings.position_ids", None)
    ours.load_state_dict(state)
    ids = torch.randint(3, 88, (3, length), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 88
    for row, end in enumerate((1, 9, length - 1)):
        ids[row, end:] = 89
    assert largest_difference(ours(ids), theirs(ids).pooler_output) < TOLERANCE
