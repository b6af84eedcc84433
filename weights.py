"""Which file feeds which module: parts are recognised from files' headers, and loaded strictly onto meta modules.

A header says what a file stores (model/files.py), a naming which rows of it make each tensor of a module
(model/namings.py). Here, top to bottom: a recognised part is a `Source`, and its shapes give the module's sizes;
`load_flux` and its sisters fill the modules; `find` collects the parts and tokenizers of a model (`Checkpoint`), from
the hub if need be. File names never decide what a file is.
"""

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.controlnet import ControlNet, ControlNetParams
from model.errors import InputError
from model.files import DTYPES, FLOATS, FP8, PICKLES, Pile, Stored, Tensors, parse, piles_in, read, read_bytes, view
from model.fp8 import Fp8Linear, can_multiply, to_fp8
from model.gguf import QUANTISED, dequantized
from model.hub import fetch
from model.namings import IGNORED, NAMINGS, Naming, Rows, count
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams

WHAT = {
    "flux": "FLUX.1 transformer",
    "t5": "T5 encoder",
    "clip": "CLIP text encoder",
    "ae": "FLUX.1 autoencoder",
    "controlnet": "FLUX.1 ControlNet",
}
SUBFOLDER = {  # diffusers'
    "flux": "transformer",
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "ae": "vae",
    "controlnet": "controlnet",
}

POCKET = Path(__file__).parent / "pocket" / "checkpoint"

TOKENIZERS = ["tokenizer/*", "tokenizer_2/*"]
DIFFUSERS_FOLDERS = {part: [f"{folder}/*.safetensors", f"{folder}/*.json"] for part, folder in SUBFOLDER.items()}
SINGLE_FILES = DIFFUSERS_FOLDERS | {"flux": ["flux1-*.safetensors"], "ae": ["ae.safetensors"]}
TOKENIZER_REPOSITORY = "black-forest-labs/FLUX.1-schnell"  # Apache-2.0; every FLUX.1 has the same tokenizers


# ------------------------------------------------------------------------------------------------------ recognition


@dataclass(frozen=True)
class Source:
    """Where one part's tensors are: a file or an index of shards, the prefix of its keys there, and their naming.

    `tensors` is the header, the prefix taken off; `config` is the config.json beside the weights, {} if there is none.
    """

    part: str
    path: Path
    prefix: str
    naming: Naming
    tensors: Tensors = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    config: dict = field(repr=False)


# What else a file may be, by a key that gives it away. In this order: LoRAs and ControlNets can also have a
# transformer's keys.
STRANGERS = {
    r"lora_(down|up|A|B|linear_layer)\b|_lora\d?\.(down|up)\.|\.lora\.|lokr_|hada_": "a LoRA; those belong to --lora",
    r"ip_adapter": "an XLabs IP-Adapter, which is not supported",
    r"controlnet_blocks\.\d+\.linear\.": "a Mistoline ControlNet, which is not supported",
    r"controlnet_(blocks|x_embedder)|input_hint_block": "a ControlNet; those belong to --controlnet",
    r"(double|single)_stream_modulation": "FLUX.2, which is not supported",
    r"distilled_guidance_layer\.": "Chroma, which is not supported",
    r"redux_(up|down)\.": "FLUX.1 Redux, which is not supported",
    r"^blk\.\d+\.": "a language model in llama.cpp's names, which is no part of FLUX.1",
    r"\.quant_state\.bitsandbytes|\.absmax$|\.quant_map$": "quantised by bitsandbytes, which is not supported",
    r"\.qweight$|\.wscales$|\.smooth_factor$": "quantised by nunchaku, which is not supported",
}
VARIANTS = {128: "FLUX.1 Canny or Depth", 384: "FLUX.1 Fill"}  # by the transformer's input channels


def stranger(pile: Pile, part: str) -> str | None:
    """What a pile is, in words that follow "is", if it can't be taken for this part."""
    for pattern, name in STRANGERS.items():
        own = part == "controlnet" and name.startswith("a ControlNet")
        if not own and any(re.search(pattern, key) for key in pile.tensors):
            return name
    for key, tensor in pile.tensors.items():
        width = tensor.shape[1] if len(tensor.shape) > 1 else 0
        if re.search(r"(^|\.)(img_in|x_embedder)\.weight$", key) and width in VARIANTS:
            return f"{VARIANTS[width]} ({key} takes {width} channels), which is not supported yet"
        if re.search(r"(^|\.)decoder\.conv_in\.weight$", key) and width != 16:
            return f"an autoencoder of {width} latent channels; FLUX.1's has 16, Stable Diffusion 1.5's and XL's have 4"
    if method := pile.config.get("quantization_config"):
        kind = method.get("quant_method") if isinstance(method, dict) else method
        return f"quantised by diffusers ({kind}), which is not supported"
    return None


def prefix_of(pile: Pile, naming: Naming) -> str | None:
    """What stands before the naming's keys, such as `model.diffusion_model.`; None if the pile has no such keys."""
    pattern = re.compile(rf"(?!.*(?:vision_model|visual)\.)((?:.*\.)?){naming.pattern}")
    return next((found[1] for key in pile.tensors if (found := pattern.match(key))), None)


def describe(pile: Pile, part: str) -> str:
    names = [
        f"a {WHAT[naming.part]} in {naming.name} names" for naming in NAMINGS if prefix_of(pile, naming) is not None
    ]
    unknown = f"unknown (one of its keys is {next(iter(pile.tensors), None)})"
    return stranger(pile, part) or " and ".join(names) or unknown


def recognise(pile: Pile, part: str) -> Source | None:
    for naming in NAMINGS:
        prefix = prefix_of(pile, naming) if naming.part == part else None
        if prefix is not None and not stranger(pile, part):
            own = {key[len(prefix) :]: tensor for key, tensor in pile.tensors.items() if key.startswith(prefix)}
            tensors = attach_scales(pile.path, own, pile.metadata)
            return Source(part, pile.path, prefix, naming, tensors, pile.metadata, pile.config)
    return None


def attach_scales(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Tensors:
    """Give each fp8 weight its scale, `X.scale_weight` or, newer, `X.weight_scale`; drop what only describes.

    Input scales are for products in fp8 and leave the weights as they are. Any other scale stays among the tensors,
    where the strict check reports it: to ignore one would give wrong pictures without an error.
    """
    layers = parse(path, metadata.get("_quantization_metadata", "{}").encode()).get("layers")
    layers = layers if isinstance(layers, dict) else {}
    formats = {key: parse(path, bytes(read_bytes(tensors[key]))) for key in tensors if leaf(key) == "comfy_quant"}
    for key, form in (layers | formats).items():
        kind = form.get("format") if isinstance(form, dict) else form
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise InputError(f"{path}: {key} says the format {kind}; only float8 is supported.")
    notes = ("comfy_quant", "scaled_fp8", "scale_input", "input_scale")
    kept = {key: tensor for key, tensor in tensors.items() if leaf(key) not in notes}
    for key in [key for key in kept if leaf(key) in ("scale_weight", "weight_scale")]:
        weight = kept.get(name := f"{key.rpartition('.')[0]}.weight")
        if weight and weight.dtype in FP8:
            kept[name] = weight._replace(scale=check_scale(kept.pop(key), weight))
    return kept


def leaf(key: str) -> str:
    return key.rpartition(".")[2]


def check_scale(scale: Stored, weight: Stored) -> Stored:
    rows = weight.shape[:1]
    if scale.dtype in FLOATS and scale.shape in ((), (1,), rows, (*rows, 1)):
        return scale
    found = f"{scale.key} is {scale.dtype} of shape {scale.shape}"
    raise InputError(f"{scale.file}: {found}, expected one float, or one for each row of {weight.shape}.")


# ------------------------------------------------------------------------------------------------------------ sizes


def shape_of(source: Source, name: str, dims: int = 2) -> tuple[int, ...]:
    """The shape that a file gives a module's tensor. InputError if it is not there, or not of `dims` dimensions."""
    rows = source.naming.rows(name, source.tensors)
    for row in rows:
        shape = present(source, row.key, f"{dims} dimensions").shape
        if len(shape) != dims:
            raise misshapen(source, row.key, f"{dims} dimensions")
    return stacked_shape(rows, source.tensors)


def stacked_shape(rows: list[Rows], tensors: Tensors) -> tuple[int, ...]:
    """The shape of these rows, one piece below the other."""
    pieces = [tensors[row.key].shape for row in rows]
    lengths = [len(range(*slice(row.start, row.stop).indices(shape[0]))) for row, shape in zip(rows, pieces) if shape]
    return (sum(lengths), *pieces[0][1:])


def present(source: Source, key: str, expected: str) -> Stored:
    if key in source.tensors:
        return source.tensors[key]
    raise InputError(f"{source.path}: {source.prefix}{key} is missing, expected with {expected}; {rest(source)}.")


def misshapen(source: Source, key: str, expected: str) -> InputError:
    tensor = source.tensors[key]
    return InputError(f"{tensor.file}: {tensor.key} has shape {tensor.shape}, expected {expected}; {rest(source)}.")


def rest(source: Source) -> str:
    return f"the rest looks like a {WHAT[source.part]} in {source.naming.name} names"


def flux_params(source: Source) -> FluxParams:
    """Sizes of the transformer from the header's shapes, and RoPE's theta from its metadata if that has it."""
    return FluxParams(**stream_sizes(source), out_channels=shape_of(source, "final_layer.linear.weight")[0])


def stream_sizes(source: Source) -> dict[str, Any]:
    """The sizes that the transformer and its ControlNets share."""
    hidden, in_channels = shape_of(source, "img_in.weight")
    (head_dim,) = shape_of(source, "double_blocks.0.img_attn.norm.query_norm.scale", dims=1)
    if head_dim == 0 or hidden % head_dim:
        key = source.naming.rows("img_in.weight", source.tensors)[0].key
        raise misshapen(source, key, f"a multiple of {head_dim} rows, the size of a head")
    return dict(
        in_channels=in_channels,
        vec_in_dim=shape_of(source, "vector_in.in_layer.weight")[1],
        context_in_dim=shape_of(source, "txt_in.weight")[1],
        hidden_size=hidden,
        mlp_hidden=shape_of(source, "double_blocks.0.img_mlp.0.weight")[0],
        num_heads=hidden // head_dim,
        depth=count(source.tensors, r"(?:double|transformer)_blocks\.(\d+)\."),
        depth_single_blocks=count(source.tensors, r"single_(?:transformer_)?blocks\.(\d+)\."),
        theta=metadata_number(source, "theta", FluxParams.theta),
        guidance_embed=any(re.match(r"guidance_in\.|time_text_embed\.guidance", key) for key in source.tensors),
    )


def controlnet_params(source: Source) -> ControlNetParams:
    """Sizes of a ControlNet, from the header's shapes; a config.json would say nothing more."""
    union, hint = "controlnet_mode_embedder.weight", any(key.startswith("input_hint_block.") for key in source.tensors)
    sizes = stream_sizes(source)
    width = shape_of(source, "controlnet_x_embedder.weight")[1]
    if width != sizes["in_channels"]:
        key = source.naming.rows("controlnet_x_embedder.weight", source.tensors)[0].key
        raise misshapen(source, key, f"{sizes['in_channels']} columns; inpainting ControlNets are not supported")
    return ControlNetParams(
        **sizes,
        modes=shape_of(source, union)[0] if union in source.tensors else 0,
        hint_width=shape_of(source, "input_hint_block.0.weight", dims=4)[0] if hint else 0,
    )


def metadata_number(source: Source, key: str, default: float) -> float:
    """A number that the file gives in its `__metadata__`, as the pocket model does; the default where it does not."""
    return number(source, "the metadata", source.metadata, key, default)


def config_number(source: Source, key: str, default: float) -> float:
    """A number of the config.json beside the weights; the default where it gives none."""
    return number(source, "config.json", source.config, key, default)


def number(source: Source, where: str, values: dict, key: str, default: float) -> float:
    value = default if values.get(key) is None else values[key]
    try:
        if 0 <= float(value) < 1e9 or key == "shift_factor" and abs(float(value)) < 1e9:
            return float(value)
    except (TypeError, ValueError):
        pass
    raise InputError(f"{source.path}: {where} says {key} = {value!r}, which can't be; download it again.")


def t5_params(source: Source) -> T5Params:
    """Sizes of the T5 encoder, from the header's shapes."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab_size, d_model = shape_of(source, "shared.weight")
    num_buckets, num_heads = shape_of(source, f"{attention}.relative_attention_bias.weight")
    return T5Params(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=shape_of(source, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        d_kv=shape_of(source, f"{attention}.q.weight")[0] // max(num_heads, 1),
        num_heads=num_heads,
        num_layers=count(source.tensors, r"enc(?:oder\.block|\.blk)\.(\d+)\."),
        num_buckets=num_buckets,
    )


def clip_params(source: Source) -> CLIPParams:
    """Sizes of the text encoder. Shapes do not tell the heads: config.json does, or else they have CLIP-L's 64."""
    vocab_size, hidden = shape_of(source, "text_model.embeddings.token_embedding.weight")
    heads = int(config_number(source, "num_attention_heads", max(hidden // 64, 1)))
    if heads == 0 or hidden % heads:
        raise InputError(f"{source.path}: config.json's {heads} heads do not divide the hidden size {hidden}.")
    return CLIPParams(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=shape_of(source, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=heads,
        num_layers=count(source.tensors, r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\."),
        max_positions=shape_of(source, "text_model.embeddings.position_embedding.weight")[0],
    )


def ae_params(source: Source) -> AutoEncoderParams:
    """Sizes of the autoencoder. What shapes do not tell is in config.json, or else as in FLUX.1."""
    levels = count(source.tensors, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    channels = [shape_of(source, f"encoder.down.{i}.block.0.conv1.weight", dims=4)[0] for i in range(levels)]
    ch = shape_of(source, "encoder.conv_in.weight", dims=4)[0]
    groups = int(config_number(source, "norm_num_groups", AutoEncoderParams.norm_groups))
    if not levels or groups == 0 or any(c == 0 or c % ch or c % groups for c in (ch, *channels)):
        raise InputError(f"{source.path}: channels {ch}, {channels} do not fit {groups} norm groups; {rest(source)}.")
    return AutoEncoderParams(
        ch=ch,
        ch_mult=tuple(c // ch for c in channels),
        num_res_blocks=count(source.tensors, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\."),
        z_channels=shape_of(source, "decoder.conv_in.weight", dims=4)[1],
        norm_groups=groups,
        scale_factor=config_number(source, "scaling_factor", AutoEncoderParams.scale_factor),
        shift_factor=config_number(source, "shift_factor", AutoEncoderParams.shift_factor),
    )


# ---------------------------------------------------------------------------------------------------------- loading

Device = torch.device | str
Merges = Mapping[str, Callable[[Tensor], Tensor]]  # a tensor's name -> what LoRAs make of it, float32 or wider
NOTHING: Merges = {}
OnHost = Callable[[str], bool]  # whether the tensor of this name stays in host memory
NEVER = re.compile(r"(?!)")
FP8_LAYERS = re.compile(r"blocks\.\d+\.(?!.*mod)")  # of Flux: all in its blocks but the modulation
LOADING_THREADS = 4


def nowhere(name: str) -> bool:
    return False


MODULES = {
    "flux": (Flux, flux_params),
    "t5": (T5Encoder, t5_params),
    "clip": (CLIPTextEncoder, clip_params),
    "ae": (AutoEncoder, ae_params),
    "controlnet": (ControlNet, controlnet_params),
}


def load_flux(
    source: Source,
    device: Device,
    dtype: torch.dtype,
    merges: Merges = NOTHING,
    on_host: OnHost = nowhere,
    fp8: bool = False,
) -> Flux:
    """With `fp8`, the matrices of the blocks become 8-bit; those stored so already keep their numbers."""
    return load(source, device, dtype, merges, on_host, FP8_LAYERS if fp8 else NEVER)


def load_t5(
    source: Source,
    device: Device,
    dtype: torch.dtype,
    merges: Merges = NOTHING,
    on_host: OnHost = nowhere,
) -> T5Encoder:
    return load(source, device, dtype, merges, on_host)


def load_clip(source: Source, device: Device, dtype: torch.dtype, merges: Merges = NOTHING) -> CLIPTextEncoder:
    return load(source, device, dtype, merges)


def load_autoencoder(source: Source, device: Device, dtype: torch.dtype) -> AutoEncoder:
    return load(source, device, dtype)


def load_controlnet(source: Source, device: Device, dtype: torch.dtype) -> ControlNet:
    return load(source, device, dtype)


def load(
    source: Source,
    device: Device,
    dtype: torch.dtype,
    merges: Merges = NOTHING,
    on_host: OnHost = nowhere,
    in_fp8: re.Pattern = NEVER,
) -> nn.Module:
    """The module of a source with its weights, frozen, in eval mode; `merges` change tensors before they are cast.

    It is made on the meta device, which holds no memory, and its tensors are assigned, not copied into it; on the CPU,
    a tensor that is stored just as the module wants it stays a view of the file. Tensors for whose
    names `on_host` is true stay in host memory; linear layers whose names `in_fp8` finds become
    Fp8Linear.
    """
    module = on_meta(source)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    recipe = check(shapes, source)
    precise = torch.promote_types(dtype, torch.float32)
    merging = threading.Lock()  # a merge takes several times its matrix
    layers = {name for name, part in module.named_modules() if isinstance(part, nn.Linear) and in_fp8.search(name)}

    def make(name: str) -> dict[str, Tensor]:
        """The tensor, or of a weight in fp8 its numbers and their scales."""
        layer, rows = name.removesuffix(".weight"), recipe[name]
        stays = on_host(name)
        place = "cpu" if stays and layer not in layers else device  # a GPU converts much faster
        numbers = stored_fp8(rows, source.tensors, place) if layer in layers and name not in merges else None
        if numbers is None:
            merge = merges.get(name)
            with merging if merge else nullcontext():
                tensor = assemble(rows, source.tensors, shapes[name], place, precise if merge else dtype)
                tensor = merge(tensor).to(dtype) if merge else tensor
            numbers = in_pieces(tensor) if layer in layers else [tensor]
        made = dict(zip((name, f"{layer}.scale"), numbers))
        return {key: tensor.cpu() for key, tensor in made.items()} if stays else made

    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        state = {key: tensor for made in pool.map(make, recipe) for key, tensor in made.items()}
    with torch.device("meta"):
        for layer in layers:
            linear = module.get_submodule(layer)
            multiplies = can_multiply(torch.device(device))
            module.set_submodule(layer, Fp8Linear(linear.in_features, linear.out_features, multiplies))
        if "img_in.weight" in merges:  # a control LoRA gives it more columns
            module.img_in = nn.Linear(*reversed(state["img_in.weight"].shape))
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def in_pieces(weight: Tensor) -> list[Tensor]:
    """`to_fp8`, which for a large matrix at once would take several times its memory."""
    return [torch.cat(pieces) for pieces in zip(*map(to_fp8, weight.split(1024)))]


def stored_fp8(rows: list[Rows], tensors: Tensors, device: Device) -> tuple[Tensor, Tensor] | None:
    """The numbers (out, in) and scales (out, 1) of a matrix that is stored in fp8 as Fp8Linear has it, else None."""
    if any(DTYPES.get(tensors[row.key].dtype) != torch.float8_e4m3fn for row in rows):
        return None
    numbers, scales = [], []
    for row in rows:
        tensor = tensors[row.key]
        scale = torch.ones(()) if tensor.scale is None else read(tensor.scale).float()
        numbers.append(read(tensor)[row.start : row.stop].to(device))
        scales.append(scale.reshape(-1, 1).expand(tensor.shape[0], 1)[row.start : row.stop].to(device))
    return torch.cat(numbers), torch.cat(scales)


def on_meta(source: Source) -> nn.Module:
    kind, params = MODULES[source.part]
    with torch.device("meta"):
        return kind(params(source))


def check(shapes: dict[str, torch.Size], source: Source) -> dict[str, list[Rows]]:
    """The rows that make each of a module's tensors. InputError for a key that is missing, misshapen or too many."""
    recipe = {name: source.naming.rows(name, source.tensors) for name in shapes}
    for name, rows in recipe.items():
        for tensor in [present(source, row.key, f"shape {tuple(shapes[name])}") for row in rows]:
            if tensor.dtype not in FLOATS | FP8 and not tensor.dtype.startswith(QUANTISED):
                raise InputError(f"{tensor.file}: {tensor.key} is stored as {tensor.dtype}, which is not supported.")
        found = stacked_shape(rows, source.tensors)
        if found + (1,) * (len(shapes[name]) - len(found)) != shapes[name]:  # 1 x 1 convolutions also come as matrices
            raise misshapen(source, rows[-1].key, f"{tuple(shapes[name])} for {name}")
    used = {row.key for rows in recipe.values() for row in rows}
    for key, tensor in source.tensors.items():
        if key not in used and not re.match(IGNORED[source.part], key):
            what = "a scale of an unknown kind" if "scale" in leaf(key) else "a key that does not belong"
            raise InputError(f"{tensor.file}: {tensor.key}, of shape {tensor.shape}, is {what}; {rest(source)}.")
    return recipe


def assemble(rows: list[Rows], tensors: Tensors, shape: torch.Size, device: Device, dtype: torch.dtype) -> Tensor:
    """A module's tensor: its rows stacked, on `device`, in `dtype`."""
    if len(rows) == 1 and rows[0].stop is None:
        tensor = tensors[rows[0].key]
        stays = DTYPES.get(tensor.dtype) == dtype and tensor.scale is None and torch.device(device).type == "cpu"
        return (view(tensor) if stays else values(tensor, device, dtype)).reshape(shape)
    out, at = torch.empty(shape, device=device, dtype=dtype), 0
    for row in rows:
        piece = values(tensors[row.key], device, dtype)[row.start : row.stop]
        out[at : at + len(piece)] = piece
        at += len(piece)
    return out


def values(tensor: Stored, device: Device, dtype: torch.dtype) -> Tensor:
    """The numbers that a stored tensor stands for."""
    if tensor.dtype.startswith(QUANTISED):
        return dequantized(read_bytes(tensor), tensor.dtype, tensor.shape, dtype).to(device)
    place = "cpu" if torch.device(device).type == "mps" else device  # which knows neither fp8 nor float64
    numbers = read(tensor).to(place)
    if tensor.scale is not None:
        scale = read(tensor.scale).to(place).float()
        numbers = numbers.float() * scale.reshape(-1, *[1] * (numbers.ndim - 1))
    return numbers.to(dtype).to(device)


def read_ahead(source: Source) -> None:
    """Have a part's files read, in the background, into the host's memory for files, if they fit: loading it, soon,
    will not have to wait for the disk."""
    files = {tensor.file for tensor in source.tensors.values()}
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not on Linux
        return
    if available and sum(file.stat().st_size for file in files) < 1024 * int(available[1]):
        threading.Thread(target=read_files, args=(files,), daemon=True).start()


def read_files(files: set[Path]) -> None:
    chunk = bytearray(1 << 24)
    for path in files:
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # loading will tell what is wrong
            while file.readinto(chunk):
                pass


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


Name = str | Path | None


def find(model: Name = None, flux: Name = None, t5: Name = None, clip: Name = None, ae: Name = None) -> Checkpoint:
    """The parts of a model, from headers alone: no weight is read. InputError if one of them is not to be found.

    `model` is a repository id, a folder in either layout, an all-in-one file, or "pocket" (the default), the built-in
    model. The others name single parts, by a file or a folder, and come before it.
    """
    given = {"flux": flux, "t5": t5, "clip": clip, "ae": ae}
    missing = [part for part in given if not given[part]]
    place = model_place(str(model or "pocket"), missing) if model or missing else None
    sources = {
        part: pick(part, f"--{part}", existing(f"--{part}", path)) if path else pick(part, "--model", place)
        for part, path in given.items()
    }
    check_widths(**sources)
    for source in sources.values():  # now, and not when the part is loaded: T5 may take minutes before the next is
        check_loads(source)
    return Checkpoint(
        name=str(flux or model or "pocket"),
        **sources,
        # the default model's tokenizers are for its own encoders alone
        clip_tokenizer=clip_tokenizer(sources["clip"], place if model or not clip else None),
        t5_tokenizer=t5_tokenizer(sources["t5"], place if model or not t5 else None),
    )


def check_loads(source: Source) -> None:
    """InputError unless every tensor is there, in its shape, and no other."""
    check({name: tensor.shape for name, tensor in on_meta(source).state_dict().items()}, source)


def find_controlnet(name: str, flag: str = "--controlnet") -> Source:
    """A ControlNet, from its header alone: `name` is a file, a folder, or a repository, org/name or org/name:file."""
    repository, _, file = name.partition(":")
    if is_repository(repository):
        weight = [file or "*.safetensors"]
        instead = "download it elsewhere and name its folder"
        place = fetch(repository, [[*weight, "config.json"], weight], f"{flag} {name}", instead)
        place = place / file if file else place
    else:
        place = existing(flag, name)
    source = pick("controlnet", flag, place)
    check_loads(source)
    return source


def check_base(controlnet: Source, flux: Source) -> None:
    """InputError when a ControlNet was made for a transformer of other widths."""
    own, base = controlnet_params(controlnet), flux_params(flux)
    for key in ("hidden_size", "in_channels", "context_in_dim", "vec_in_dim"):
        found, expected = getattr(own, key), getattr(base, key)
        if found != expected:
            sizes = f"its {key} is {found}, that of {flux.path} is {expected}"
            raise InputError(f"{controlnet.path}: this ControlNet is of the wrong base size: {sizes}.")


def existing(flag: str, path: str | Path) -> Path:
    place = Path(path).expanduser()
    if not place.is_file() and not place.is_dir():
        others = (
            "a model's folder, a repository (org/name) or pocket"
            if flag == "--model"
            else "a safetensors or GGUF file, or its folder"
        )
        raise InputError(f"{flag} {path}: there is no such file or folder; expected {others}.")
    return place


def lora_file(name: str, where: str) -> Path:
    """The file of a LoRA: a path, or org/name of a repository with one safetensors file, or org/name:file.

    `where` is what an InputError begins with.
    """
    path = Path(name).expanduser()
    repo, _, file = name.partition(":")
    if path.is_file():
        return path
    if path.is_dir():
        folder = path
    elif is_repository(repo):
        folder = fetch(repo, [[file or "*.safetensors"]], where, "download it elsewhere and give its path")
    else:
        raise InputError(
            f"{where}: there is no such file; expected a safetensors file or a repository (org/name:file)."
        )
    files = sorted(folder.glob(file or "*.safetensors"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise InputError(f"{where}: expected one safetensors file there, found {names}; name one of them.")
    return files[0]


def model_place(model: str, parts: list[str]) -> Path:
    """The folder (or all-in-one file) that --model names; of a repository, `parts` are downloaded unless cached."""
    if model == "pocket":
        if not POCKET.is_dir():
            raise InputError(f"--model pocket: the built-in model is not in {POCKET}; name another with --model.")
        return POCKET
    if is_repository(model):
        instead = "download it elsewhere and use --model /path"
        layouts = (SINGLE_FILES, DIFFUSERS_FOLDERS)
        choices = [[pattern for part in parts for pattern in files[part]] + TOKENIZERS for files in layouts]
        return fetch(model, choices, f"--model {model}", instead)
    return existing("--model", model)


def is_repository(model: Name) -> bool:
    """Does --model name a repository of the Hugging Face hub, org/name, and no folder that is there?"""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model))) and not Path(model).exists()


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
        seen += [f"{pile.path.name} is {describe(pile, part)}" for pile in piles]
    others = sorted(place.iterdir()) if place.is_dir() else []
    seen += [f"{path.name} is not safetensors" for path in others if path.suffix in PICKLES]
    found = "; ".join(seen) or "no safetensors or GGUF file"
    raise InputError(f"{flag} {place}: no {WHAT[part]} in it: {found}; name one with --{part}.")


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

    base = source.path.parent
    nearby = [base / name, base, base.parent / name] + ([place / name] if place else [])
    folder = next(filter(complete, nearby), None)
    if folder is None:
        purpose = f"{source.path}: no {name}/ with {' and '.join(choices[0])} is near, and {TOKENIZER_REPOSITORY}"
        folder = fetch(TOKENIZER_REPOSITORY, [TOKENIZERS], purpose, f"copy {name}/ of any FLUX.1 into {base}") / name
    return folder
