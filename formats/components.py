"""A component's network: its sizes, from a file's header, then `load`, which is strict."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from formats.key_names import IGNORED, count
from formats.loader import Device, Loader, Merges, Recipe, State, fit_layers, fp8_layers
from formats.recognize import Source, stacked_shape
from formats.safetensors import wrong
from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams


def flux_params(source: Source) -> FluxParams:
    out_channels, _ = source.shape("final_layer.linear.weight")
    return FluxParams(**stream_sizes(source), out_channels=out_channels)


def stream_sizes(source: Source) -> dict[str, Any]:
    """Sizes shared by the transformer and its ControlNets."""
    tensors = source.tensors
    block = "double_blocks.0"
    hidden, in_channels = source.shape("img_in.weight")
    (head_dim,) = source.shape(f"{block}.img_attn.norm.query_norm.scale", dims=1)
    if head_dim == 0 or hidden % head_dim:
        key = source.key_names.rows("img_in.weight", tensors)[0].key
        raise source.misshapen(key, f"a multiple of {head_dim} rows, the size of a head")
    guidance = re.compile(r"guidance_in\.|time_text_embed\.guidance")
    return dict(
        in_channels=in_channels,
        vec_in_dim=source.shape("vector_in.in_layer.weight")[1],
        context_in_dim=source.shape("txt_in.weight")[1],
        hidden_size=hidden,
        mlp_hidden=source.shape(f"{block}.img_mlp.0.weight")[0],
        num_heads=hidden // head_dim,
        depth=count(tensors, r"(?:double|transformer)_blocks\.(\d+)\."),
        depth_single_blocks=count(tensors, r"single_(?:transformer_)?blocks\.(\d+)\."),
        theta=source.number("the metadata", "theta", FluxParams.theta),
        guidance_embed=any(map(guidance.match, tensors)),
    )


def model_defaults(source: Source) -> dict[str, int]:
    """The fields of regional.layout.Defaults."""
    sizes = flux_params(source)
    steps, length = (24, 512) if sizes.guidance_embed else (4, 256)  # schnell has no guidance
    length = source.number("the metadata", "max_sequence_length", length)
    return dict(
        steps=steps,
        max_sequence_length=int(length),
        size=int(source.number("the metadata", "sample_size", 1024)),
        depth=sizes.depth,
        depth_single_blocks=sizes.depth_single_blocks,
    )


def t5_params(source: Source) -> T5Params:
    layer = "encoder.block.0.layer"
    vocab_size, d_model = source.shape("shared.weight")
    bias = f"{layer}.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = source.shape(bias)
    d_ff, _ = source.shape(f"{layer}.1.DenseReluDense.wi_0.weight")
    width, _ = source.shape(f"{layer}.0.SelfAttention.q.weight")
    d_kv = width // max(heads, 1)
    layers = count(source.tensors, r"enc(?:oder\.block|\.blk)\.(\d+)\.")
    return T5Params(vocab_size, d_model, d_ff, d_kv, heads, layers, buckets)


def clip_params(source: Source) -> CLIPParams:
    """config.json has the number of heads; without it they have CLIP-L's size, 64."""
    embeddings = "text_model.embeddings"
    vocab_size, hidden = source.shape(f"{embeddings}.token_embedding.weight")
    positions, _ = source.shape(f"{embeddings}.position_embedding.weight")
    heads = max(hidden // 64, 1)
    heads = int(source.number("config.json", "num_attention_heads", heads))
    if heads == 0 or hidden % heads:
        problem = f"config.json's {heads} heads do not divide the hidden size {hidden}"
        raise wrong(source.path, problem)
    mlp_hidden, _ = source.shape("text_model.encoder.layers.0.mlp.fc1.weight")
    blocks = r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\."
    layers = count(source.tensors, blocks)
    return CLIPParams(vocab_size, hidden, mlp_hidden, heads, layers, positions)


def ae_params(source: Source) -> AutoEncoderParams:
    """What shapes don't tell is in config.json, or FLUX.1's."""
    defaults = AutoEncoderParams
    number = partial(source.number, "config.json")
    levels = count(source.tensors, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    convs = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    channels = [source.shape(conv, dims=4)[0] for conv in convs]
    ch = source.shape("encoder.conv_in.weight", dims=4)[0]
    groups = int(number("norm_num_groups", defaults.norm_groups))
    sizes = (ch, *channels)
    if not levels or groups == 0 or any(c == 0 or c % ch or c % groups for c in sizes):
        problem = f"channels {ch}, {channels} do not fit {groups} norm groups"
        raise wrong(source.path, f"{problem}; {source.rest}")
    blocks = r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\."
    return AutoEncoderParams(
        ch=ch,
        ch_mult=tuple(c // ch for c in channels),
        num_res_blocks=count(source.tensors, blocks),
        z_channels=source.shape("decoder.conv_in.weight", dims=4)[1],
        norm_groups=groups,
        scale_factor=number("scaling_factor", defaults.scale_factor),
        shift_factor=number("shift_factor", defaults.shift_factor),
    )


# ------------------------------------------------------------------------ loading


NOTHING: Merges = {}


class Kind(NamedTuple):
    module: type[nn.Module]
    params: Callable[[Source], Any]  # reads its sizes from a header


KINDS = {
    "flux": Kind(Flux, flux_params),
    "t5": Kind(T5Encoder, t5_params),
    "clip": Kind(CLIPTextEncoder, clip_params),
    "ae": Kind(AutoEncoder, ae_params),
}


def load(
    source: Source, device: Device, dtype: torch.dtype, merges: Merges = NOTHING,
    on_host: Callable[[str], bool] = lambda name: False, fp8: bool = False,
    kind: Kind | None = None,
) -> nn.Module:  # fmt: skip
    """A source's network with its weights, frozen. On the CPU, a tensor stored in this
    dtype stays a view of its file. on_host: which tensors stay in host memory. fp8: the
    layers of Flux's blocks become FP8. kind: the network, if it is no component."""
    module, recipe = check_loads(source, kind)
    loader = Loader(source.tensors, recipe, module.state_dict(), device, dtype, merges)
    in_fp8 = fp8_layers(module) if fp8 else set()

    def load_one(name: str) -> State:
        """The tensor of this name, and its scales if it is an FP8 weight."""
        stays = on_host(name)
        layer = name.removesuffix(".weight")
        if layer not in in_fp8:
            return {name: loader.tensor(name, "cpu" if stays else device)}
        weight, scale = loader.fp8(name)  # even if it stays: a GPU converts faster
        loaded = {name: weight, f"{layer}.scale": scale}
        return {key: x.cpu() for key, x in loaded.items()} if stays else loaded

    state = {}
    with ThreadPoolExecutor(4) as pool:
        for loaded in pool.map(load_one, recipe):
            state |= loaded
    fit_layers(module, in_fp8, state, torch.device(device))
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def on_meta(source: Source, kind: Kind | None = None) -> nn.Module:
    kind = kind or KINDS[source.part]
    with torch.device("meta"):
        return kind.module(kind.params(source))


def check_loads(source: Source, kind: Kind | None = None) -> tuple[nn.Module, Recipe]:
    """The module on the meta device and where its tensors are: all, and no others."""
    module = on_meta(source, kind)
    recipe = {}
    used = set()
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        rows = recipe[name] = source.key_names.rows(name, source.tensors)
        used |= {row.key for row in rows}
        for row in rows:
            stored = source.present(row.key, f"shape {shape}")
            if not stored.is_float:
                found = f"{stored.key} is stored as {stored.dtype}"
                raise wrong(stored.file, f"{found}, which is not supported")
        found = stacked_shape(rows, source.tensors)
        ones = (1,) * (len(shape) - len(found))  # 1 x 1 convolutions may be matrices
        if found + ones != shape:
            raise source.misshapen(rows[-1].key, f"{shape} for {name}")
    ignored = re.compile(IGNORED.get(source.part, "(?!)"))
    for key, tensor in source.tensors.items():
        if key not in used and not ignored.match(key):
            found = f"{tensor.key}, of shape {tensor.shape}, is a key that does not belong"
            raise wrong(tensor.file, f"{found}; {source.rest}")
    return module, recipe
