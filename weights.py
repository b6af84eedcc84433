"""Which file feeds which module: components are recognized by file headers and loaded strictly.

A header describes what a file stores (formats/safetensors.py), key names which of its rows make up
each tensor of a module (formats/key_names.py). Below, in this order: sizes of the networks from the
shapes of a recognized component (`Source`); `load`, which fills a network; `find`, which collects
the components and tokenizers of a model (`Checkpoint`). File names never decide what a file is.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import MISSING, InputError
from formats.gguf import QUANTIZED
from formats.hub import Name, locate
from formats.key_names import IGNORED, Rows, count
from formats.recognize import SUBFOLDER, WHAT, Source, describe, leaf, recognize, stacked_shape
from formats.safetensors import FLOATS, FP8, PICKLES, Stored, Tensors, checkpoint_files, read, values, whole
from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.fp8 import Fp8Linear, can_multiply, to_fp8
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams

POCKET = Path(__file__).parent / "pocket" / "checkpoint"
TOKENIZERS = ["tokenizer/*", "tokenizer_2/*"]
DIFFUSERS_FOLDERS = {part: [f"{name}/*.safetensors", f"{name}/*.json"] for part, name in SUBFOLDER.items()}
SINGLE_FILES = DIFFUSERS_FOLDERS | {"flux": ["flux1-*.safetensors"], "ae": ["ae.safetensors"]}
TOKENIZER_REPOSITORY = "black-forest-labs/FLUX.1-schnell"  # Apache-2.0; all FLUX.1 models share the tokenizers


def flux_params(source: Source) -> FluxParams:
    """Sizes of the transformer from the header's shapes, and RoPE's theta from its metadata if that has it."""
    return FluxParams(**stream_sizes(source), out_channels=source.shape("final_layer.linear.weight")[0])


def stream_sizes(source: Source) -> dict[str, Any]:
    """The sizes that the transformer and its ControlNets share."""
    hidden, in_channels = source.shape("img_in.weight")
    (head_dim,) = source.shape("double_blocks.0.img_attn.norm.query_norm.scale", dims=1)
    if head_dim == 0 or hidden % head_dim:
        key = source.key_names.rows("img_in.weight", source.tensors)[0].key
        raise source.misshapen(key, f"a multiple of {head_dim} rows, the size of a head")
    return dict(
        in_channels=in_channels,
        vec_in_dim=source.shape("vector_in.in_layer.weight")[1],
        context_in_dim=source.shape("txt_in.weight")[1],
        hidden_size=hidden,
        mlp_hidden=source.shape("double_blocks.0.img_mlp.0.weight")[0],
        num_heads=hidden // head_dim,
        depth=count(source.tensors, r"(?:double|transformer)_blocks\.(\d+)\."),
        depth_single_blocks=count(source.tensors, r"single_(?:transformer_)?blocks\.(\d+)\."),
        theta=source.metadata_number("theta", FluxParams.theta),
        guidance_embed=any(re.match(r"guidance_in\.|time_text_embed\.guidance", key) for key in source.tensors),
    )


def model_defaults(source: Source) -> dict[str, int]:
    """What a layout leaves to the model: steps, prompt tokens, size in pixels; and its block counts."""
    sizes = flux_params(source)
    is_dev = sizes.guidance_embed  # schnell has none
    return dict(
        steps=24 if is_dev else 4,
        max_sequence_length=int(source.metadata_number("max_sequence_length", 512 if is_dev else 256)),
        size=int(source.metadata_number("sample_size", 1024)),
        depth=sizes.depth,
        depth_single_blocks=sizes.depth_single_blocks,
    )


def t5_params(source: Source) -> T5Params:
    """Sizes of the T5 encoder, from the header's shapes."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab_size, d_model = source.shape("shared.weight")
    num_buckets, num_heads = source.shape(f"{attention}.relative_attention_bias.weight")
    return T5Params(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=source.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        d_kv=source.shape(f"{attention}.q.weight")[0] // max(num_heads, 1),
        num_heads=num_heads,
        num_layers=count(source.tensors, r"enc(?:oder\.block|\.blk)\.(\d+)\."),
        num_buckets=num_buckets,
    )


def clip_params(source: Source) -> CLIPParams:
    """Sizes of the text encoder. Shapes do not tell the heads: config.json does, or else they have CLIP-L's 64."""
    vocab_size, hidden = source.shape("text_model.embeddings.token_embedding.weight")
    heads = int(source.config_number("num_attention_heads", max(hidden // 64, 1)))
    if heads == 0 or hidden % heads:
        raise InputError(source.path, MISSING, f"config.json's {heads} heads do not divide the hidden size {hidden}")
    return CLIPParams(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=source.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=heads,
        num_layers=count(source.tensors, r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\."),
        max_positions=source.shape("text_model.embeddings.position_embedding.weight")[0],
    )


def ae_params(source: Source) -> AutoEncoderParams:
    """Sizes of the autoencoder. What shapes do not tell is in config.json, or else as in FLUX.1."""
    levels = count(source.tensors, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    channels = [source.shape(f"encoder.down.{i}.block.0.conv1.weight", dims=4)[0] for i in range(levels)]
    ch = source.shape("encoder.conv_in.weight", dims=4)[0]
    groups = int(source.config_number("norm_num_groups", AutoEncoderParams.norm_groups))
    if not levels or groups == 0 or any(c == 0 or c % ch or c % groups for c in (ch, *channels)):
        raise InputError(
            source.path, MISSING, f"channels {ch}, {channels} do not fit {groups} norm groups; {source.rest()}"
        )
    return AutoEncoderParams(
        ch=ch,
        ch_mult=tuple(c // ch for c in channels),
        num_res_blocks=count(source.tensors, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\."),
        z_channels=source.shape("decoder.conv_in.weight", dims=4)[1],
        norm_groups=groups,
        scale_factor=source.config_number("scaling_factor", AutoEncoderParams.scale_factor),
        shift_factor=source.config_number("shift_factor", AutoEncoderParams.shift_factor),
    )


# ---------------------------------------------------------------------------------------------------------- loading

Device = torch.device | str
Merges = Mapping[str, Callable[[Tensor], Tensor]]  # a tensor's name -> the tensor with its LoRAs, float32 or wider
NOTHING: Merges = {}
FP8_LAYERS = re.compile(r"blocks\.\d+\.(?!.*mod)")  # all of Flux's block layers but the modulation
LOADING_THREADS = 4
MERGING = threading.Lock()  # one merge at a time, because it takes several times its matrix


def nothing(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Placement:
    """Which weights stay in host memory, by tensor name, and which linear layers become Fp8Linear, by layer name."""

    on_host: Callable[[str], Any] = nothing
    in_fp8: Callable[[str], Any] = nothing


ON_DEVICE = Placement()


class Kind(NamedTuple):
    """A network and the function that reads its sizes from a header."""

    module: type[nn.Module]
    params: Callable[[Source], Any]


KINDS = {
    "flux": Kind(Flux, flux_params),
    "t5": Kind(T5Encoder, t5_params),
    "clip": Kind(CLIPTextEncoder, clip_params),
    "ae": Kind(AutoEncoder, ae_params),
}


def load(
    source: Source,
    device: Device,
    dtype: torch.dtype,
    merges: Merges = NOTHING,
    placement: Placement = ON_DEVICE,
    kind: Kind | None = None,
) -> nn.Module:
    """The network of a source with its weights, frozen, in eval mode.

    It is made on the meta device, which holds no memory, and its tensors are assigned, not copied.
    On the CPU, a tensor stored in the wanted dtype stays a view of its file. `merges` change
    tensors before they are cast. kind: the network, if it is none of a model's four components.
    """
    module = on_meta(source, kind)
    recipe = check(module, source)
    loader = Loader(source.tensors, recipe, shapes_of(module), device, dtype, merges)
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    fp8 = set(filter(placement.in_fp8, linear))

    def load_one(name: str) -> dict[str, Tensor]:
        """The tensor of this name, and its scales where it is a weight in FP8."""
        stays = placement.on_host(name)
        layer = name.removesuffix(".weight")
        if layer in fp8:
            loaded = loader.fp8(name)  # on the device even if it stays: a GPU converts much faster
        else:
            loaded = [loader.tensor(name, "cpu" if stays else device)]
        named = dict(zip((name, f"{layer}.scale"), loaded))
        return {key: tensor.cpu() for key, tensor in named.items()} if stays else named

    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        loaded = pool.map(load_one, recipe)
        state = {key: tensor for named in loaded for key, tensor in named.items()}
    fit_layers(module, fp8, state, torch.device(device))
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


class Loader(NamedTuple):
    """Makes a module's tensors from the rows of a file's that `recipe` lists by name."""

    tensors: Tensors
    recipe: dict[str, list[Rows]]
    shapes: dict[str, torch.Size]
    device: Device
    dtype: torch.dtype
    merges: Merges

    def tensor(self, name: str, device: Device) -> Tensor:
        merge = self.merges.get(name)
        if merge is None:
            return self.stacked(name, device, self.dtype)
        with MERGING:
            precise = self.stacked(name, device, torch.promote_types(self.dtype, torch.float32))
            return merge(precise).to(self.dtype)

    def fp8(self, name: str) -> tuple[Tensor, ...]:
        """A weight (out, in) in FP8 and its scales (out, 1); numbers stored so are kept."""
        rows = self.recipe[name]
        is_stored = all(self.tensors[row.key].dtype == "F8_E4M3" for row in rows)
        if is_stored and name not in self.merges:
            pieces = [stored_fp8(self.tensors[row.key], row, self.device) for row in rows]
        else:  # in pieces, because a large matrix would take several times its memory at once
            pieces = map(to_fp8, self.tensor(name, self.device).split(1024))
        return tuple(torch.cat(parts) for parts in zip(*pieces))

    def stacked(self, name: str, device: Device, dtype: torch.dtype) -> Tensor:
        """The rows of a tensor, one piece below the other, on `device`, in `dtype`."""
        rows = self.recipe[name]
        shape = self.shapes[name]
        if len(rows) == 1 and rows[0].stop is None:
            return whole(self.tensors[rows[0].key], device, dtype).reshape(shape)
        out = torch.empty(shape, device=device, dtype=dtype)
        start = 0
        for row in rows:
            piece = values(self.tensors[row.key], device, dtype)[row.start : row.stop]
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out


def stored_fp8(tensor: Stored, rows: Rows, device: Device) -> tuple[Tensor, Tensor]:
    """Rows of a matrix stored in FP8, and a scale for each, (rows, 1)."""
    scale = torch.ones(()) if tensor.scale is None else read(tensor.scale).float()
    scales = scale.reshape(-1, 1).expand(tensor.shape[0], 1)
    return tuple(x[rows.start : rows.stop].to(device) for x in (read(tensor), scales))


def fit_layers(module: nn.Module, fp8: set[str], state: dict[str, Tensor], device: torch.device) -> None:
    """Replace the layers that become FP8, and the img_in that a control LoRA gave more columns."""
    with torch.device("meta"):
        for name in fp8:
            layer = module.get_submodule(name)
            layer = Fp8Linear(layer.in_features, layer.out_features, can_multiply(device))
            module.set_submodule(name, layer)
        weight = state.get("img_in.weight")
        if weight is not None and weight.shape != module.img_in.weight.shape:
            module.img_in = nn.Linear(*reversed(weight.shape))


def on_meta(source: Source, kind: Kind | None = None) -> nn.Module:
    kind = kind or KINDS[source.part]
    with torch.device("meta"):
        return kind.module(kind.params(source))


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def check(module: nn.Module, source: Source) -> dict[str, list[Rows]]:
    """The rows that make up each tensor of a module. InputError for a missing, misshapen or surplus key."""
    shapes = shapes_of(module)
    recipe = {name: source.key_names.rows(name, source.tensors) for name in shapes}
    for name, rows in recipe.items():
        for row in rows:
            check_dtype(source.present(row.key, f"shape {tuple(shapes[name])}"))
        found = stacked_shape(rows, source.tensors)
        ones = (1,) * (len(shapes[name]) - len(found))  # 1 x 1 convolutions also come as matrices
        if found + ones != shapes[name]:
            raise source.misshapen(rows[-1].key, f"{tuple(shapes[name])} for {name}")
    used = {row.key for rows in recipe.values() for row in rows}
    for key, tensor in source.tensors.items():
        if key not in used and not re.match(IGNORED.get(source.part, r"(?!)"), key):
            what = "a scale of an unknown kind" if "scale" in leaf(key) else "a key that does not belong"
            raise InputError(tensor.file, MISSING, f"{tensor.key}, of shape {tensor.shape}, is {what}; {source.rest()}")
    return recipe


def check_dtype(tensor: Stored) -> None:
    if tensor.dtype not in FLOATS | FP8 and not tensor.dtype.startswith(QUANTIZED):
        raise InputError(tensor.file, MISSING, f"{tensor.key} is stored as {tensor.dtype}, which is not supported")


# ----------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Checkpoint:
    """Where the components of a model are."""

    name: str  # what the user called it
    flux: Source
    t5: Source
    clip: Source
    ae: Source
    clip_tokenizer: Path  # a folder with vocab.json and merges.txt
    t5_tokenizer: Path  # a tokenizer.json or else a spiece.model


def find(model: Name = None, flux: Name = None, t5: Name = None, clip: Name = None, ae: Name = None) -> Checkpoint:
    """The components of a model, from headers alone: no weight is read. InputError if one is missing.

    `model` is a repository, a folder in either format, an all-in-one file, or "pocket" (the
    default), the built-in model. The others override single components by a file or a folder.
    """
    given = {"flux": flux, "t5": t5, "clip": clip, "ae": ae}
    missing = [part for part in given if not given[part]]
    place = locate_model(str(model or "pocket"), missing) if model or missing else None
    sources = {}
    for part, path in given.items():
        own = locate(path, [], f"--{part} {path}") if path else place
        sources[part] = pick(part, f"--{part}" if path else "--model", own)
    check_widths(**sources)
    for source in sources.values():  # now, because T5 may take minutes before the next one is loaded
        check_loads(source)
    # the default model's tokenizers are for its own encoders alone
    near_clip = place if model or not clip else None
    near_t5 = place if model or not t5 else None
    clip_folder = tokenizer_folder("tokenizer", [["vocab.json", "merges.txt"]], sources["clip"], near_clip)
    files = ["tokenizer.json"], ["spiece.model"]
    t5_folder = tokenizer_folder("tokenizer_2", files, sources["t5"], near_t5)
    t5_file = next(t5_folder / file for (file,) in files if (t5_folder / file).is_file())
    return Checkpoint(str(flux or model or "pocket"), *sources.values(), clip_folder, t5_file)


def check_loads(source: Source, kind: Kind | None = None) -> None:
    """InputError unless every tensor is there, in its shape, and no other."""
    check(on_meta(source, kind), source)


def locate_model(model: str, parts: list[str]) -> Path:
    """The folder or all-in-one file that --model names; of a repository, `parts` are downloaded."""
    if model == "pocket":
        if not POCKET.is_dir():
            raise InputError("--model", "pocket", f"the built-in model is not in {POCKET}; name another with --model")
        return POCKET
    formats = (SINGLE_FILES, DIFFUSERS_FOLDERS)
    choices = [sum((files[part] for part in parts), []) + TOKENIZERS for files in formats]
    return locate(model, choices, f"--model {model}", "download it elsewhere and use --model /path")


def pick(part: str, flag: str, place: Path) -> Source:
    """The one `part` in a file, or in a folder: at its top, else in diffusers' subfolder for it."""
    seen = []
    for spot in [place] if place.is_file() else [place, place / SUBFOLDER[part]]:
        files = checkpoint_files(spot)
        found = [source for file in files if (source := recognize(file, part))]
        if len(found) > 1:
            both = f"{found[0].path.name} and {found[1].path.name}"
            raise InputError(flag, place, f"{both} could each be the {WHAT[part]}; choose one with --{part}")
        if found:
            return found[0]
        seen += [f"{file.path.name} is {describe(file, part)}" for file in files]
    others = [path.name for path in sorted(place.glob("*")) if path.suffix in PICKLES]
    seen += [f"{name} is not safetensors" for name in others]
    found = "; ".join(seen) or "no safetensors or GGUF file"
    raise InputError(flag, place, f"no {WHAT[part]} in it: {found}; name one with --{part}")


def check_widths(flux: Source, t5: Source, clip: Source, ae: Source) -> None:
    """InputError when the text encoders are of another width than the transformer was trained with."""
    sizes = flux_params(flux)
    ae_params(ae)
    for source, width, expected in (
        (t5, t5_params(t5).d_model, sizes.context_in_dim),
        (clip, clip_params(clip).hidden_size, sizes.vec_in_dim),
    ):
        if width != expected:
            problem = f"this {WHAT[source.part]} is {width} wide, but {flux.path} expects {expected}"
            raise InputError(source.path, MISSING, f"{problem}; name one that fits with --{source.part}")


def tokenizer_folder(name: str, choices: Sequence[list[str]], source: Source, place: Path | None) -> Path:
    """The folder with all files of one choice: near the encoder, in the model's folder, or from the hub."""
    base = source.path.parent
    for folder in [base / name, base, base.parent / name] + ([place / name] if place else []):
        if any(all((folder / file).is_file() for file in files) for files in choices):
            return folder
    purpose = f"{source.path}: no {name}/ with {' and '.join(choices[0])} is near, and {TOKENIZER_REPOSITORY}"
    return locate(TOKENIZER_REPOSITORY, [TOKENIZERS], purpose, f"copy {name}/ of any FLUX.1 into {base}") / name
