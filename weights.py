"""Which file feeds which module: parts are recognised from files' headers, and loaded strictly onto meta modules.

A header says what a file stores (formats/safetensors.py), a naming which rows of it make each tensor of a module
(formats/key_names.py). Here, top to bottom: a recognised part is a `Source`, and its shapes give the module's sizes;
`load_flux` and its sisters fill the modules; `find` collects the parts and tokenizers of a model (`Checkpoint`), from
the hub if need be. File names never decide what a file is.
"""

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import InputError
from extensions.controlnet import ControlNet, ControlNetParams
from formats.gguf import QUANTISED, dequantized
from formats.hub import Name, existing, fetch, is_repository
from formats.key_names import IGNORED, Rows, count
from formats.recognize import SUBFOLDER, WHAT, Source, describe, leaf, recognise
from formats.safetensors import DTYPES, FLOATS, FP8, PICKLES, Stored, Tensors, piles_in, read, read_bytes, view
from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.fp8 import Fp8Linear, can_multiply, to_fp8
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams
from regional.layout import Defaults

POCKET = Path(__file__).parent / "pocket" / "checkpoint"


TOKENIZERS = ["tokenizer/*", "tokenizer_2/*"]


DIFFUSERS_FOLDERS = {part: [f"{folder}/*.safetensors", f"{folder}/*.json"] for part, folder in SUBFOLDER.items()}


SINGLE_FILES = DIFFUSERS_FOLDERS | {"flux": ["flux1-*.safetensors"], "ae": ["ae.safetensors"]}


TOKENIZER_REPOSITORY = "black-forest-labs/FLUX.1-schnell"  # Apache-2.0; every FLUX.1 has the same tokenizers


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


def defaults(flux: Source) -> Defaults:
    """What the transformer decides: 24 steps and 512 text tokens for dev, 4 and 256 for schnell."""
    params = flux_params(flux)
    steps, length = (24, 512) if params.guidance_embed else (4, 256)
    length = int(metadata_number(flux, "max_sequence_length", length))
    size = int(metadata_number(flux, "sample_size", 1024))
    return Defaults(steps, length, size, params.depth, params.depth_single_blocks)


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


NEVER = re.compile(r"(?!)")


FP8_LAYERS = re.compile(r"blocks\.\d+\.(?!.*mod)")  # of Flux: all in its blocks but the modulation


LOADING_THREADS = 4


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
    on_host: re.Pattern = NEVER,
    fp8: bool = False,
) -> Flux:
    """With `fp8`, the matrices of the blocks become 8-bit; those stored so already keep their numbers."""
    return load(source, device, dtype, merges, on_host, FP8_LAYERS if fp8 else NEVER)


def load_t5(
    source: Source, device: Device, dtype: torch.dtype, merges: Merges = NOTHING, on_host: re.Pattern = NEVER
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
    on_host: re.Pattern = NEVER,
    in_fp8: re.Pattern = NEVER,
) -> nn.Module:
    """The module of a source with its weights, frozen, in eval mode; `merges` change tensors before they are cast.

    It is made on the meta device, which holds no memory, and its tensors are assigned, not copied into it; on the CPU,
    a tensor that is stored just as the module wants it stays a view of the file. Tensors whose names `on_host` finds
    stay in host memory; linear layers whose names `in_fp8` finds become Fp8Linear.
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
        place = "cpu" if on_host.search(name) and layer not in layers else device  # a GPU converts much faster
        numbers = stored_fp8(rows, source.tensors, place) if layer in layers and name not in merges else None
        if numbers is None:
            merge = merges.get(name)
            with merging if merge else nullcontext():
                tensor = assemble(rows, source.tensors, shapes[name], place, precise if merge else dtype)
                tensor = merge(tensor).to(dtype) if merge else tensor
            numbers = in_pieces(tensor) if layer in layers else [tensor]
        made = dict(zip((name, f"{layer}.scale"), numbers))
        return {key: tensor.cpu() for key, tensor in made.items()} if on_host.search(name) else made

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
