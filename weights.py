"""Which file feeds which module: parts are recognised from safetensors headers, then loaded strictly onto meta modules.

Top to bottom: a header says what a file stores (`Stored`, `Pile`); a layout says which rows of the file each name of a
module is made of (`Rows`, `Layout`); a recognised part is a `Source`; `find` collects the four parts of a model and its
tokenizers (`Checkpoint`); `load_flux` and its sisters make the modules. File names never decide what a file is.
"""

import json
import math
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # httpx's own, from whichever httpx the hub library uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor, nn

from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.errors import InputError
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams

POCKET = Path(__file__).parent / "pocket" / "checkpoint"

TOKENIZER_REPOSITORY = "black-forest-labs/FLUX.1-schnell"  # Apache-2.0, and dev's tokenizers are the same
TOKENIZERS = ["tokenizer/*", "tokenizer_2/*"]
SINGLE_FILES = ["flux1-*.safetensors", "ae.safetensors", "text_encoder/*", "text_encoder_2/*", *TOKENIZERS]
DIFFUSERS_FOLDERS = ["transformer/*", "vae/*", "text_encoder/*", "text_encoder_2/*", *TOKENIZERS]

WHAT = {"flux": "FLUX.1 transformer", "t5": "T5 encoder", "clip": "CLIP text encoder", "ae": "FLUX.1 autoencoder"}
SUBFOLDER = {"flux": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "ae": "vae"}

# ---------------------------------------------------------------------------------------------------------- headers

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = FLOATS | FP8 | {"U8": torch.uint8}

MAX_HEADER = 100_000_000  # bytes; the format's own limit
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
UNREAD_SUFFIXES = PICKLE_SUFFIXES | {".gguf"}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # torch.save's zip file, and its older stream


class Stored(NamedTuple):
    """One tensor as its file's header describes it: bytes [start, stop) of the file, and the scale of an fp8 weight."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    scale: "Stored | None" = None


class Pile(NamedTuple):
    """One file, or all the shards of one index: what they store, by key, and their metadata."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Pile:
    """What one safetensors file stores: 8 bytes with the header's length, the header in JSON, then the tensors."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if length <= min(size, MAX_HEADER) else file.read(64)
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read ({error.strerror}).") from error
    refuse_other_formats(path, start + text[:64])
    if len(text) < length:
        raise InputError(f"{path}: the file is cut off inside its header ({size:,} bytes); download it again.")
    header = parse(path, text)
    metadata = header.pop("__metadata__", {})
    try:
        tensors = {key: describe_tensor(path, key, entry, 8 + length) for key, entry in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the safetensors header is damaged; download the file again.") from error
    end = max((stored.stop for stored in tensors.values()), default=0)
    if size < end:
        raise InputError(f"{path}: the file is cut off, {size:,} of {end:,} bytes are there; download it again.")
    return Pile(path, tensors, metadata)


def refuse_other_formats(path: Path, start: bytes) -> None:
    """InputError unless a file begins like safetensors, with a small number and a brace."""
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: this is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder.")
    if start.startswith(b"GGUF") or path.suffix == ".gguf":
        raise InputError(f"{path}: GGUF files are not supported; use a safetensors file in bf16 or fp8.")
    if start.startswith(PICKLE_STARTS) or path.suffix in PICKLE_SUFFIXES:
        raise InputError(f"{path}: pickled checkpoints can run code and are never read; use a safetensors file.")
    if start[8:9] not in (b"{", b"") or int.from_bytes(start[:8], "little") > MAX_HEADER or len(start) < 8:
        raise InputError(f"{path}: this is not a safetensors file; it begins with {start[:16]!r}.")


def parse(path: Path, text: str | bytes) -> dict:
    """The JSON object in `text`, which came from `path`."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged, a JSON object was expected ({error}); download it again.") from error


def describe_tensor(path: Path, key: str, entry: dict, data: int) -> Stored:
    begin, end = entry["data_offsets"]
    stored = Stored(path, key, entry["dtype"], tuple(entry["shape"]), data + begin, data + end)
    if stored.dtype in DTYPES and math.prod(stored.shape) * DTYPES[stored.dtype].itemsize != end - begin:
        raise ValueError(key)
    return stored


def read_config(path: Path) -> dict:
    return parse(path, path.read_bytes()) if path.is_file() else {}


def read_shards(index: Path) -> Pile:
    """All the shards that a `*.safetensors.index.json` names, as one pile."""
    tensors, metadata = {}, {}
    for name in sorted(set(read_config(index).get("weight_map", {}).values())):
        if not (index.parent / name).is_file():
            raise InputError(
                f"{index.parent}: the shard {name} is missing, which {index.name} names; download it again."
            )
        shard = read_header(index.parent / name)
        tensors |= shard.tensors
        metadata |= shard.metadata
    return Pile(index.parent, tensors, metadata)


def piles_in(place: Path) -> list[Pile]:
    """The safetensors of a file or of a folder's top: an index with its shards is one pile, any other file is one."""
    if place.is_file():
        return [read_header(place)]
    indexes = sorted(place.glob("*.safetensors.index.json"))
    shards = {place / name for index in indexes for name in read_config(index).get("weight_map", {}).values()}
    files = sorted({*place.glob("*.safetensors"), *place.glob("*.sft")} - shards)
    for file in files:
        if re.search(r"-\d{5}-of-\d{5}\.", file.name):
            raise InputError(
                f"{file}: this shard has no *.safetensors.index.json beside it; download the folder again."
            )
    return [read_shards(index) for index in indexes] + [read_header(file) for file in files]


def read(stored: Stored) -> Tensor:
    """The tensor as it is stored, a copy-on-write view of its file.

    Only its own pages are mapped, so dropping the tensor gives their memory back: what is copied is never held twice.
    """
    page = stored.start - stored.start % mmap.ALLOCATIONGRANULARITY
    with open(stored.file, "rb") as file:
        view = mmap.mmap(file.fileno(), stored.stop - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(view, dtype=DTYPES[stored.dtype], offset=stored.start - page).reshape(stored.shape)


# ---------------------------------------------------------------------------------------------------------- layouts


class Rows(NamedTuple):
    """Rows [start, stop) of the tensor `key` of a file; all of them when nothing else is said."""

    key: str
    start: int = 0
    stop: int | None = None


# What a file stores, by key without prefix; tests give anything that has a `shape`.
Tensors = dict[str, Stored]


class Layout(NamedTuple):
    """A way of naming a part's tensors.

    `pattern` matches keys that only this layout has, after a prefix. `rows(name, tensors)` says which rows of the file
    make the module's tensor `name`, stacked along dimension 0.
    """

    part: str
    name: str
    pattern: str
    rows: Callable[[str, Tensors], list[Rows]]


def same_name(name: str, tensors: Tensors) -> list[Rows]:
    return [Rows(name)]


DIFFUSERS_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DIFFUSERS_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
DIFFUSERS_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def flux_from_diffusers(name: str, tensors: Tensors) -> list[Rows]:
    module, leaf = name.replace("_norm.scale", "_norm.weight").rsplit(".", 1)
    kind, _, inner = module.partition("_blocks.")
    if inner:
        index, inner = inner.split(".", 1)
        table = DIFFUSERS_DOUBLE if kind == "double" else DIFFUSERS_SINGLE
        stem = f"transformer_blocks.{index}." if kind == "double" else f"single_transformer_blocks.{index}."
        return [Rows(f"{stem}{theirs}.{leaf}") for theirs in table[inner].split()]
    key = f"{DIFFUSERS_OUTER[module]}.{leaf}"
    if module == "final_layer.adaLN_modulation.1" and key in tensors:  # theirs is (scale, shift), ours (shift, scale)
        half = tensors[key].shape[0] // 2
        return [Rows(key, half), Rows(key, 0, half)]
    return [Rows(key)]


def t5_from_hf(name: str, tensors: Tensors) -> list[Rows]:
    twin = "encoder.embed_tokens.weight"  # files hold the table under one name, the other, or both
    return [Rows(twin if name == "shared.weight" and name not in tensors and twin in tensors else name)]


def clip_from_hf(name: str, tensors: Tensors) -> list[Rows]:
    return [Rows(name.removeprefix("text_model."))]  # where the file says text_model., it counts as its prefix


OPENAI_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.": "",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".self_attn.": ".attn.",
    ".layer_norm": ".ln_",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
}


def clip_from_openai(name: str, tensors: Tensors) -> list[Rows]:
    for ours, theirs in OPENAI_CLIP.items():
        name = name.replace(ours, theirs)
    fused = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name)
    if not fused:
        return [Rows(name)]
    key = f"{fused[1]}in_proj_{fused[3]}"
    width = tensors[key].shape[0] // 3 if key in tensors else 0
    at = "qkv".index(fused[2]) * width
    return [Rows(key, at, at + width)]


DIFFUSERS_VAE = {
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.mid\.attn_1\.proj_out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
    r"\.(down|up)\.(\d+)\.block\.": r".\1_blocks.\2.resnets.",
    r"\.(down|up)\.(\d+)\.\1sample\.": r".\1_blocks.\2.\1samplers.0.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
}
OLD_DIFFUSERS_VAE = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def ae_from_diffusers(name: str, tensors: Tensors) -> list[Rows]:
    last = highest(tensors, r"decoder\.up_blocks\.(\d+)\.")  # they count the decoder's levels from the other end
    name = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up.{last - int(level[1])}", name)
    for ours, theirs in DIFFUSERS_VAE.items():
        name = re.sub(ours, theirs, name)
    for new, old in OLD_DIFFUSERS_VAE.items():
        name = name if name in tensors else name.replace(new, old)
    return [Rows(name)]


def highest(tensors: Tensors, pattern: str) -> int:
    """The largest number in the group of `pattern` among the keys; -1 when no key matches."""
    return max((int(found[1]) for key in tensors if (found := re.match(pattern, key))), default=-1)


LAYOUTS = (
    Layout("flux", "bfl", r"double_blocks\.\d+\.img_attn\.", same_name),
    Layout("flux", "diffusers", r"transformer_blocks\.\d+\.attn\.", flux_from_diffusers),
    Layout("t5", "hf", r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.", t5_from_hf),
    Layout("clip", "hf", r"encoder\.layers\.\d+\.self_attn\.", clip_from_hf),
    Layout("clip", "openai", r"transformer\.resblocks\.\d+\.attn\.", clip_from_openai),
    Layout("ae", "bfl", r"decoder\.up\.\d+\.block\.", same_name),
    Layout("ae", "diffusers", r"decoder\.up_blocks\.\d+\.resnets\.", ae_from_diffusers),
)

# Keys that a part's files may hold and its module has no use for.
IGNORED = {
    "t5": r"encoder\.embed_tokens\.|decoder\.|lm_head\.",
    "clip": r"(embeddings\.)?position_ids$|text_projection|logit_scale$|vision_model\.|visual",
}

# ------------------------------------------------------------------------------------------------------ recognition


@dataclass(frozen=True)
class Source:
    """Where one part's tensors are: a file or a folder of shards, the prefix of its keys there, and their layout.

    `tensors` is the header without the prefix; `config` is the config.json beside the weights, {} if there is none.
    """

    part: str
    path: Path
    prefix: str
    layout: Layout
    tensors: Tensors = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    config: dict = field(repr=False)


# Files that hold something else, by a key that gives them away. The order matters: a ControlNet and some LoRAs also
# have a transformer's keys.
STRANGERS = {
    r"lora_(down|up|A|B|linear_layer)\b|_lora\d?\.(down|up)\.|\.lora\.|lokr_|hada_": "a LoRA",
    r"ip_adapter": "an XLabs IP-Adapter",
    r"controlnet_blocks\.\d+\.linear\.": "a Mistoline ControlNet",
    r"controlnet_(blocks|x_embedder)|input_hint_block": "a ControlNet",
    r"(double|single)_stream_modulation": "FLUX.2",
    r"distilled_guidance_layer\.": "Chroma",
    r"redux_(up|down)\.": "FLUX.1 Redux",
    r"\.quant_state\.bitsandbytes|\.absmax$|\.quant_map$": "quantised by bitsandbytes",
    r"\.qweight$|\.wscales$|\.smooth_factor$": "quantised by nunchaku",
}
VARIANTS = {128: "FLUX.1 Canny or Depth", 384: "FLUX.1 Fill"}  # by the input channels of the transformer


def config_beside(pile: Pile) -> dict:
    return read_config((pile.path if pile.path.is_dir() else pile.path.parent) / "config.json")


def stranger(pile: Pile) -> str | None:
    """What a pile is if no part can come from it, in words that follow "is"; None for all others."""
    for pattern, name in STRANGERS.items():
        if any(re.search(pattern, key) for key in pile.tensors):
            return f"{name} (not supported here)"
    for key, stored in pile.tensors.items():
        width = stored.shape[1] if len(stored.shape) > 1 else 0
        if re.search(r"(^|\.)(img_in|x_embedder)\.weight$", key) and width in VARIANTS:
            return f"{VARIANTS[width]} ({key} takes {width} channels), which is not supported yet"
        if re.search(r"(^|\.)decoder\.conv_in\.weight$", key) and width != 16:
            return f"an autoencoder of {width} latent channels (4 is Stable Diffusion 1.5 and XL); FLUX.1's has 16"
    quantization = config_beside(pile).get("quantization_config")
    if quantization:
        return f"quantised by diffusers ({quantization.get('quant_method', 'unknown method')}), which is not supported"
    return None


def prefix_of(pile: Pile, layout: Layout) -> str | None:
    """What stands before the layout's keys, such as `model.diffusion_model.`; None if the pile has none of them."""
    pattern = re.compile(rf"(?!.*vision|.*visual)((?:.*\.)?){layout.pattern}")
    return next((found[1] for key in pile.tensors if (found := pattern.match(key))), None)


def recognise(pile: Pile, part: str) -> Source | None:
    for layout in LAYOUTS:
        prefix = prefix_of(pile, layout) if layout.part == part else None
        if prefix is not None and not stranger(pile):
            own = {key[len(prefix) :]: stored for key, stored in pile.tensors.items() if key.startswith(prefix)}
            tensors = attach_scales(own, pile.metadata)
            return Source(part, pile.path, prefix, layout, tensors, pile.metadata, config_beside(pile))
    return None


def describe(pile: Pile) -> str:
    parts = [
        f"a {WHAT[layout.part]} in {layout.name} names" for layout in LAYOUTS if prefix_of(pile, layout) is not None
    ]
    return (
        stranger(pile) or " and ".join(parts) or f"none that is known (a key of it: {next(iter(pile.tensors), None)})"
    )


def attach_scales(tensors: Tensors, metadata: dict[str, str]) -> Tensors:
    """Give each fp8 weight its scale (`X.scale_weight`, or newer `X.weight_scale`); drop what only describes.

    Input scales serve fp8 matrix products and leave the weights' values alone. Any other scale stays among the tensors,
    where the strict check will report it: ignoring one would silently give wrong pictures.
    """
    formats = {name: layer.get("format") for name, layer in layers_of(metadata).items()}
    formats |= {
        key: json.loads(bytes(read(s).tolist()))["format"] for key, s in tensors.items() if ends(key, "comfy_quant")
    }
    for key, form in formats.items():
        if form not in ("float8_e4m3fn", "float8_e5m2"):
            raise InputError(
                f"{next(iter(tensors.values())).file}: {key} is quantised as {form}; only float8 is supported."
            )
    kept = {k: s for k, s in tensors.items() if not ends(k, "comfy_quant", "scaled_fp8", "scale_input", "input_scale")}
    for key in [key for key in kept if ends(key, "scale_weight", "weight_scale")]:
        weight = key.rpartition(".")[0] + ".weight"
        if weight in kept and kept[weight].dtype in FP8:
            kept[weight] = kept[weight]._replace(scale=check_scale(kept.pop(key), kept[weight]))
    return kept


def layers_of(metadata: dict[str, str]) -> dict:
    return json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})


def ends(key: str, *leaves: str) -> bool:
    return key.rpartition(".")[2] in leaves


def check_scale(scale: Stored, weight: Stored) -> Stored:
    if scale.shape in ((), (1,), weight.shape[:1], (*weight.shape[:1], 1)):
        return scale
    raise InputError(
        f"{scale.file}: {scale.key} has shape {scale.shape}; expected one number, or one per row of {weight.shape}."
    )


# ------------------------------------------------------------------------------------------------------------- sizes


def shape_of(source: Source, name: str, dims: int = 2) -> tuple[int, ...]:
    """The shape that the module's tensor `name` gets from a file. InputError if the file lacks it or it has not `dims`."""
    rows = source.layout.rows(name, source.tensors)
    for row in rows:
        if row.key not in source.tensors:
            raise InputError(f"{source.path}: the key {source.prefix}{row.key} is missing; {looks_like(source)}.")
        if len(source.tensors[row.key].shape) != dims:
            raise misshapen(source, row.key, f"{dims} dimensions")
    return stacked_shape(rows, source.tensors)


def stacked_shape(rows: list[Rows], tensors: Tensors) -> tuple[int, ...]:
    """The shape of these rows, one tensor's below the other's."""
    length = sum(len(range(*slice(row.start, row.stop).indices(tensors[row.key].shape[0]))) for row in rows)
    return (length, *tensors[rows[0].key].shape[1:])


def looks_like(source: Source) -> str:
    return f"all in all this looks like a {WHAT[source.part]} in {source.layout.name} names"


def misshapen(source: Source, key: str, expected: str) -> InputError:
    stored = source.tensors[key]
    return InputError(
        f"{stored.file}: {stored.key} has shape {stored.shape}; expected {expected}; {looks_like(source)}."
    )


def flux_params(source: Source) -> FluxParams:
    """Sizes of the transformer, from the shapes in the header; RoPE's theta from the metadata where it stands there."""
    hidden, in_channels = shape_of(source, "img_in.weight")
    (head_dim,) = shape_of(source, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    if head_dim == 0 or hidden % head_dim:
        raise InputError(f"{source.path}: heads of {head_dim} do not divide the hidden size {hidden}.")
    return FluxParams(
        in_channels=in_channels,
        out_channels=shape_of(source, "final_layer.linear.weight")[0],
        vec_in_dim=shape_of(source, "vector_in.in_layer.weight")[1],
        context_in_dim=shape_of(source, "txt_in.weight")[1],
        hidden_size=hidden,
        mlp_hidden=shape_of(source, "double_blocks.0.img_mlp.0.weight")[0],
        num_heads=hidden // head_dim,
        depth=highest(source.tensors, r"(?:double|transformer)_blocks\.(\d+)\.") + 1,
        depth_single_blocks=highest(source.tensors, r"single_(?:transformer_)?blocks\.(\d+)\.") + 1,
        theta=float(source.metadata.get("theta", FluxParams.theta)),
        guidance_embed=any(re.match(r"guidance_in\.|time_text_embed\.guidance", key) for key in source.tensors),
    )


def flux_metadata(source: Source) -> dict[str, str]:
    """What the transformer's file says of itself in `__metadata__`; {} if it says nothing."""
    return source.metadata


def t5_params(source: Source) -> T5Params:
    vocab_size, d_model = shape_of(source, "shared.weight")
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shape_of(source, f"{attention}.relative_attention_bias.weight")
    return T5Params(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=shape_of(source, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        d_kv=shape_of(source, f"{attention}.q.weight")[0] // max(num_heads, 1),
        num_heads=num_heads,
        num_layers=highest(source.tensors, r"encoder\.block\.(\d+)\.") + 1,
        num_buckets=num_buckets,
    )


def clip_params(source: Source) -> CLIPParams:
    """Sizes of the text encoder. Shapes do not tell the heads: config.json does, else they are of 64 like CLIP-L's."""
    vocab_size, hidden = shape_of(source, "text_model.embeddings.token_embedding.weight")
    return CLIPParams(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=shape_of(source, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=source.config.get("num_attention_heads", max(hidden // 64, 1)),
        num_layers=highest(source.tensors, r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.") + 1,
        max_positions=shape_of(source, "text_model.embeddings.position_embedding.weight")[0],
    )


def ae_params(source: Source) -> AutoEncoderParams:
    """Sizes of the autoencoder; what shapes do not tell, from config.json, else FLUX.1's."""
    ch = shape_of(source, "encoder.conv_in.weight", 4)[0]
    levels = highest(source.tensors, r"encoder\.down(?:_blocks)?\.(\d+)\.") + 1
    channels = [shape_of(source, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    config = {key: value for key, value in source.config.items() if value is not None}
    return AutoEncoderParams(
        ch=ch,
        ch_mult=tuple(c // ch for c in channels),
        num_res_blocks=highest(source.tensors, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\.") + 1,
        z_channels=shape_of(source, "decoder.conv_in.weight", 4)[1],
        norm_groups=config.get("norm_num_groups", AutoEncoderParams.norm_groups),
        scale_factor=config.get("scaling_factor", AutoEncoderParams.scale_factor),
        shift_factor=config.get("shift_factor", AutoEncoderParams.shift_factor),
    )


# ----------------------------------------------------------------------------------------------------------- loading


def load_flux(source: Source, device: torch.device | str, dtype: torch.dtype) -> Flux:
    return load(Flux, flux_params(source), source, device, dtype)


def load_t5(source: Source, device: torch.device | str, dtype: torch.dtype) -> T5Encoder:
    return load(T5Encoder, t5_params(source), source, device, dtype)


def load_clip(source: Source, device: torch.device | str, dtype: torch.dtype) -> CLIPTextEncoder:
    return load(CLIPTextEncoder, clip_params(source), source, device, dtype)


def load_autoencoder(source: Source, device: torch.device | str, dtype: torch.dtype) -> AutoEncoder:
    return load(AutoEncoder, ae_params(source), source, device, dtype)


def load(kind: type[nn.Module], params, source: Source, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A module of this kind with its weights, frozen and in eval mode.

    It is made on the meta device, which holds no memory, and its tensors are assigned, not copied into it. On the CPU, a
    tensor that the file stores as the module wants it stays a view of the file.
    """
    with torch.device("meta"):
        module = kind(params)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    recipe = check(shapes, source)
    state = {name: assemble(rows, source.tensors, shapes[name], device, dtype) for name, rows in recipe.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check(shapes: dict[str, tuple[int, ...]], source: Source) -> dict[str, list[Rows]]:
    """The rows that make each of the module's tensors. InputError for a key that is missing, misshapen or too many."""
    recipe = {name: source.layout.rows(name, source.tensors) for name in shapes}
    for name, rows in recipe.items():
        for row in rows:
            if row.key not in source.tensors:
                raise InputError(f"{source.path}: the key {source.prefix}{row.key} is missing; {looks_like(source)}.")
            if source.tensors[row.key].dtype not in FLOATS | FP8:
                stored = source.tensors[row.key]
                raise InputError(f"{stored.file}: {stored.key} is stored as {stored.dtype}, which is not supported.")
        found = stacked_shape(rows, source.tensors)
        if found + (1,) * (len(shapes[name]) - len(found)) != shapes[name]:  # 1 x 1 convolutions come as matrices too
            raise misshapen(source, rows[0].key, f"{shapes[name]}")
    used = {row.key for rows in recipe.values() for row in rows}
    for key in source.tensors:
        if key not in used and not re.match(IGNORED.get(source.part, r"(?!)"), key):
            stored = source.tensors[key]
            kind = "an unknown scale" if "scale" in key.rpartition(".")[2] else "a key that does not belong there"
            raise InputError(f"{stored.file}: {stored.key} {stored.shape} is {kind}; {looks_like(source)}.")
    return recipe


def assemble(rows: list[Rows], tensors: Tensors, shape: tuple[int, ...], device, dtype: torch.dtype) -> Tensor:
    """One tensor of a module: its rows stacked, on `device`, in `dtype`."""
    if len(rows) == 1 and rows[0].stop is None:
        return dequantised(tensors[rows[0].key], device, dtype).reshape(shape)
    out, at = torch.empty(shape, device=device, dtype=dtype), 0
    for row in rows:
        piece = dequantised(tensors[row.key], device, dtype)[row.start : row.stop]
        out[at : at + len(piece)] = piece.reshape(-1, *shape[1:])
        at += len(piece)
    return out


def dequantised(stored: Stored, device, dtype: torch.dtype) -> Tensor:
    """The values that a stored tensor stands for; a view of the file where nothing has to be moved or converted."""
    tensor = read(stored).to(device)
    if stored.scale is not None:
        scale = read(stored.scale).to(device, torch.float32)
        tensor = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
    return tensor.to(dtype)


# ----------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Checkpoint:
    """Where everything is that makes a picture. `name` is what the user called it.

    `clip_tokenizer` is a folder with vocab.json and merges.txt, `t5_tokenizer` a tokenizer.json or else a spiece.model.
    """

    name: str
    flux: Source
    t5: Source
    clip: Source
    ae: Source
    clip_tokenizer: Path
    t5_tokenizer: Path


def find(
    model: str | None = None,
    flux: str | None = None,
    t5: str | None = None,
    clip: str | None = None,
    ae: str | None = None,
) -> Checkpoint:
    """Find a model's parts from headers alone: no weight is read. InputError if one is not to be found.

    `model` is a repository id, a folder in either layout, an all-in-one file, or "pocket" (the default) for the built-in
    model; the others name single parts by a file or a folder, and go before it.
    """
    given = {"flux": flux, "t5": t5, "clip": clip, "ae": ae}
    place = model_place(str(model or "pocket")) if model or not all(given.values()) else None
    sources = {
        part: pick(part, f"--{part}", existing(f"--{part}", path)) if path else pick(part, "--model", place)
        for part, path in given.items()
    }
    check_widths(**sources)
    return Checkpoint(
        name=str(flux or model or "pocket"),
        **sources,
        clip_tokenizer=clip_tokenizer(sources["clip"], place),
        t5_tokenizer=t5_tokenizer(sources["t5"], place),
    )


def existing(flag: str, path: str | Path) -> Path:
    place = Path(path).expanduser()
    if not place.is_file() and not place.is_dir():
        raise InputError(f"{flag} {path}: there is no such file or folder.")
    return place


def model_place(model: str) -> Path:
    """The folder (or all-in-one file) that --model names; a repository is downloaded unless the cache has it."""
    if model == "pocket":
        if not POCKET.is_dir():
            raise InputError(f"--model pocket: the built-in model is not in {POCKET}; name another with --model.")
        return POCKET
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        instead = "download it elsewhere and use --model /path"
        return fetch(model, [SINGLE_FILES, DIFFUSERS_FOLDERS], f"--model {model}", instead)
    return existing("--model", model)


def pick(part: str, flag: str, place: Path) -> Source:
    """The one `part` in a file, or in a folder: at its top, else in the subfolder where diffusers keeps that part."""
    seen = []
    for spot in [place] if place.is_file() else [place, place / SUBFOLDER[part]]:
        piles = piles_in(spot)
        found = [source for pile in piles if (source := recognise(pile, part))]
        if len(found) > 1:
            both = f"{found[0].path.name} and {found[1].path.name}"
            raise InputError(f"{flag} {place}: {both} could each be the {WHAT[part]}; choose one with --{part}.")
        if found:
            return found[0]
        seen += [f"{pile.path.name} is {describe(pile)}" for pile in piles]
    if place.is_dir():
        seen += [
            f"{path.name} is not safetensors" for path in sorted(place.iterdir()) if path.suffix in UNREAD_SUFFIXES
        ]
    raise InputError(
        f"{flag} {place}: no {WHAT[part]} here: {'; '.join(seen) or 'no safetensors file'}; name one with --{part}."
    )


def check_widths(flux: Source, t5: Source, clip: Source, ae: Source) -> None:
    """InputError when the text encoders are of another width than the transformer was trained with."""
    sizes = flux_params(flux)
    ae_params(ae)
    for source, width, expected in (
        (t5, t5_params(t5).d_model, sizes.context_in_dim),
        (clip, clip_params(clip).hidden_size, sizes.vec_in_dim),
    ):
        if width != expected:
            raise InputError(
                f"{source.path}: this {WHAT[source.part]} is {width} wide, but {flux.path} expects {expected}; "
                f"name one that fits with --{source.part}."
            )


def clip_tokenizer(clip: Source, place: Path | None) -> Path:
    return tokenizer_folder("tokenizer", [("vocab.json", "merges.txt")], clip, place)


def t5_tokenizer(t5: Source, place: Path | None) -> Path:
    folder = tokenizer_folder("tokenizer_2", [("tokenizer.json",), ("spiece.model",)], t5, place)
    return next(file for file in (folder / "tokenizer.json", folder / "spiece.model") if file.is_file())


def tokenizer_folder(name: str, choices: list[tuple[str, ...]], source: Source, place: Path | None) -> Path:
    """The folder with all files of one choice: near the encoder, else in the model's folder, else from the hub."""

    def complete(folder: Path) -> bool:
        return any(all((folder / file).is_file() for file in files) for files in choices)

    base = source.path if source.path.is_dir() else source.path.parent
    nearby = [base / name, base, base.parent / name] + ([place / name] if place else [])
    folder = next(filter(complete, nearby), None)
    if folder is None:
        purpose = f"{source.path}: no {name}/ with {' and '.join(choices[0])} is near, and {TOKENIZER_REPOSITORY}"
        folder = fetch(TOKENIZER_REPOSITORY, [TOKENIZERS], purpose, f"copy {name}/ of any FLUX.1 into {base}") / name
    return folder


# --------------------------------------------------------------------------------------------------- Hugging Face hub


def fetch(repo: str, choices: list[list[str]], purpose: str, instead: str) -> Path:
    """A repository's folder in the cache with all files of one choice of patterns, downloaded if they are not there yet.

    An InputError begins with `purpose` and ends with `instead`, another way to reach the same.
    """
    for cached in (True, False):
        for patterns in choices:
            folder = snapshot(repo, patterns, cached, purpose, instead)
            if folder and all(any(folder.glob(pattern)) for pattern in patterns):
                return folder
    wanted = ", nor ".join(" ".join(patterns) for patterns in choices)
    raise InputError(f"{purpose}: the repository has not all of {wanted}; {instead}.")


def snapshot(repo: str, patterns: list[str], cached: bool, purpose: str, instead: str) -> Path | None:
    """The repository's folder in the cache, with these files; None if nothing but the cache is asked and it lacks some."""
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=cached))
    except (HTTPError, OSError, ValueError) as error:
        if cached and isinstance(error, LocalEntryNotFoundError):
            return None
        raise InputError(f"{purpose}: {hub_reason(repo, error)}, or {instead}.") from error


def hub_reason(repo: str, error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, GatedRepoError):  # before its parent, RepositoryNotFoundError
        page = f"https://huggingface.co/{repo}"
        return f"the repository asks for a licence: accept it at {page}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, nor a folder of that name; a private one needs `hf auth login` or HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError):
        return "not in the cache, and huggingface.co is out of reach; go online (and unset HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError):
        return f"huggingface.co answers with status {error.response.status_code}; try again later"
    return f"the download failed ({type(error).__name__}: {' '.join(str(error).split())}); try again"
