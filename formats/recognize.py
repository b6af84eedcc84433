"""What a checkpoint file is, by its tensors' names and shapes, never by its own name.

And where a model's components are: in a file, folder or repository.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from errors import InputError, parse_json
from formats.hub import Choices, locate
from formats.key_names import KEY_NAMES, KeyNames, Rows
from formats.safetensors import (
    FLOATS,
    FP8,
    CheckpointFile,
    Stored,
    Tensors,
    checkpoint_files,
    read_raw,
    wrong,
)

COMPONENTS = {  # what each is, and its subfolder in diffusers' format
    "flux": ("FLUX.1 transformer", "transformer"),
    "t5": ("T5 encoder", "text_encoder_2"),
    "clip": ("CLIP text encoder", "text_encoder"),
    "ae": ("FLUX.1 autoencoder", "vae"),
    "controlnet": ("FLUX.1 ControlNet", "controlnet"),
    "siglip": ("SigLIP vision encoder", "image_encoder"),
    "redux": ("FLUX.1 Redux projector", "image_embedder"),
}
WHAT = {part: what for part, (what, _) in COMPONENTS.items()}
CONTROLNET_FILES = [["*.safetensors", "config.json"]]  # of a repository
SUBFOLDER = {part: folder for part, (_, folder) in COMPONENTS.items()}
POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
TOKENIZERS = ["tokenizer/*", "tokenizer_2/*"]
FOLDERS = {part: [f"{name}/*.safetensors", f"{name}/*.json"] for part, name in SUBFOLDER.items()}
SINGLE_FILES = FOLDERS | {"flux": ["flux1-*.safetensors"], "ae": ["ae.safetensors"]}
SCHNELL = "black-forest-labs/FLUX.1-schnell"  # Apache-2.0, with all models' tokenizers


@dataclass(frozen=True)
class Source:
    """Where a component's tensors are, a file or an index, and how its keys are named.

    tensors: the header, keys without `prefix`. config: the config.json next to the weights,
    {} if there is none.
    """

    part: str
    path: Path
    prefix: str
    key_names: KeyNames
    tensors: Tensors = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    config: dict = field(repr=False)

    def shape(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """The stored shape of a module's tensor, which must have `dims` dimensions."""
        rows = self.key_names.rows(name, self.tensors)
        expected = f"{dims} dimensions"
        for row in rows:
            if len(self.present(row.key, expected).shape) != dims:
                raise self.misshapen(row.key, expected)
        return stacked_shape(rows, self.tensors)

    def present(self, key: str, expected: str) -> Stored:
        if key in self.tensors:
            return self.tensors[key]
        problem = f"{self.prefix}{key} is missing, expected with {expected}; {self.rest}"
        raise wrong(self.path, problem)

    def misshapen(self, key: str, expected: str) -> InputError:
        tensor = self.tensors[key]
        found = f"{tensor.key} has shape {tensor.shape}"
        return wrong(tensor.file, f"{found}, expected {expected}; {self.rest}")

    @property
    def rest(self) -> str:
        return f"the rest looks like a {WHAT[self.part]} in {self.key_names.name} names"

    def number(self, where: str, key: str, default: float) -> float:
        """A number in `where`, config.json or "the metadata", else the default."""
        values = self.config if where == "config.json" else self.metadata
        value = default if values.get(key) is None else values[key]
        with suppress(TypeError, ValueError):
            low = -1e9 if key == "shift_factor" else 0
            if low <= float(value) < 1e9:
                return float(value)
        problem = f"{where} says {key} = {value!r}, which can't be; download it again"
        raise wrong(self.path, problem)


def stacked_shape(rows: list[Rows], tensors: Tensors) -> tuple[int, ...]:
    """The shape of these rows, stacked."""
    shapes = [tensors[row.key].shape or (0,) for row in rows]
    lengths = [len(range(n)[row.start : row.stop]) for row, (n, *_) in zip(rows, shapes)]
    return (sum(lengths), *shapes[0][1:])


LORA = "a LoRA; those belong to --lora"
CONTROLNET = "a ControlNet; those belong to --controlnet"
REDUX = "FLUX.1 Redux, which belongs to --redux"
# Other formats by an identifying key, in this order: LoRAs and ControlNets can also have a
# transformer's keys.
FOREIGN = {
    r"lora_(down|up|A|B|linear_layer)\b|_lora\d?\.(down|up)\.|\.lora\.|lokr_|hada_": LORA,
    r"ip_adapter": "an XLabs IP-Adapter",
    r"controlnet_blocks\.\d+\.linear\.": "a Mistoline ControlNet",
    r"controlnet_(blocks|x_embedder)|input_hint_block": CONTROLNET,
    r"(double|single)_stream_modulation": "FLUX.2",
    r"distilled_guidance_layer\.": "Chroma",
    r"redux_(up|down)\.": REDUX,
    r"^blk\.\d+\.": "a language model in llama.cpp's names",
    r"\.quant_state\.bitsandbytes|\.absmax$|\.quant_map$": "quantized by bitsandbytes",
    r"\.qweight$|\.wscales$|\.smooth_factor$": "quantized by nunchaku",
}


def foreign_format(file: CheckpointFile, part: str) -> str | None:
    """What a file is, to follow "is", if it can't be this component."""
    for pattern, name in FOREIGN.items():
        is_own = {"controlnet": CONTROLNET, "redux": REDUX}.get(part) == name
        if not is_own and any(re.search(pattern, key) for key in file.tensors):
            return name
    for key, tensor in file.tensors.items():
        width = tensor.shape[1] if len(tensor.shape) > 1 else 0
        if re.search(r"(^|\.)decoder\.conv_in\.weight$", key) and width != 16:
            return f"an autoencoder of {width} latent channels; FLUX.1's has 16"
    if method := file.config.get("quantization_config"):
        kind = method.get("quant_method") if isinstance(method, dict) else method
        return f"quantized by diffusers ({kind})"
    return None


def prefix_of(file: CheckpointFile, names: KeyNames) -> str | None:
    """What precedes these names in the keys, such as `model.diffusion_model.`, or None."""
    others = "" if names.part == "siglip" else r"(?!.*(?:vision_model|visual)\.)"
    pattern = re.compile(rf"{others}((?:.*\.)?){names.pattern}")
    return next((found[1] for key in file.tensors if (found := pattern.match(key))), None)


def describe(file: CheckpointFile, part: str) -> str:
    found = [names for names in KEY_NAMES if prefix_of(file, names) is not None]
    known = " and ".join(f"a {WHAT[names.part]} in {names.name} names" for names in found)
    unknown = f"unknown (one of its keys is {next(iter(file.tensors), None)})"
    return foreign_format(file, part) or known or unknown


def recognize(file: CheckpointFile, part: str) -> Source | None:
    """This component in a file; None if it is not there."""
    for names in KEY_NAMES:
        prefix = prefix_of(file, names) if names.part == part else None
        if prefix is not None and not foreign_format(file, part):
            own = [key for key in file.tensors if key.startswith(prefix)]
            tensors = {key.removeprefix(prefix): file.tensors[key] for key in own}
            tensors = attach_scales(file.path, tensors, file.metadata)
            return Source(part, file.path, prefix, names, tensors, file.metadata, file.config)
    return None


class QuantizationMetadata(msgspec.Struct):
    layers: dict[str, Any] = {}


def attach_scales(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Tensors:
    """Give each FP8 weight its scale, `X.scale_weight` or `X.weight_scale`; drop descriptions.

    Input scales are for FP8 products and do not change weights. Any other scale stays among
    the tensors, where the strict check reports it.
    """
    text = metadata.get("_quantization_metadata", "{}")
    formats = dict(parse_json(text, QuantizationMetadata, path).layers)
    for key, tensor in tensors.items():
        if leaf(key) == "comfy_quant":
            formats[key] = parse_json(bytes(read_raw(tensor)), dict, path)
    for key, form in formats.items():
        kind = form.get("format") if isinstance(form, dict) else form
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise wrong(path, f"{key} says the format {kind}; only float8 is supported")
    notes = ("comfy_quant", "scaled_fp8", "scale_input", "input_scale")
    kept = {key: tensor for key, tensor in tensors.items() if leaf(key) not in notes}
    for key in [key for key in kept if leaf(key) in ("scale_weight", "weight_scale")]:
        name = f"{key.rpartition('.')[0]}.weight"
        weight = kept.get(name)
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
    expected = f"one float, or one for each row of {weight.shape}"
    raise wrong(scale.file, f"{found}, expected {expected}")


# ------------------------------------------------------------------------ finding


def find_model(model: str, parts: list[str]) -> Path:
    """The folder or file that --model names; of a repository, `parts` are downloaded."""
    if model == "pocket":
        return POCKET
    choices = []
    for files in (SINGLE_FILES, FOLDERS):
        own = sum((files[part] for part in parts), [])
        choices.append([*own, *TOKENIZERS, "model_index.json"])
    return locate(model, choices, f"--model {model}")


def pick(part: str, flag: str, place: Path) -> Source:
    """The one `part` in a file, or in a folder: at its top or in diffusers' subfolder."""
    what = WHAT[part]
    option = "--redux" if part == "siglip" else f"--{part}"
    seen = []
    for spot in [place] if place.is_file() else [place, place / SUBFOLDER[part]]:
        files = checkpoint_files(spot)
        found = [source for file in files if (source := recognize(file, part))]
        if len(found) > 1:
            both = f"{found[0].path.name} and {found[1].path.name}"
            problem = f"{both} could each be the {what}; choose one with {option}"
            raise InputError(flag, place, problem)
        if found:
            return found[0]
        seen += [f"{file.path.name} is {describe(file, part)}" for file in files]
    found = "; ".join(seen) or "no safetensors or GGUF file"
    problem = f"no {what} in it: {found}; name one with {option}"
    raise InputError(flag, place, problem)


def tokenizer_folder(name: str, choices: Choices, source: Source, place: Path | None) -> Path:
    """A folder with all files of one choice: near the encoder, the model's or the hub's."""
    base = source.path.parent
    folders = [base / name, base, base.parent / name]
    if place:
        folders.append(place / name)
    for folder in folders:
        for files in choices:
            if all((folder / file).is_file() for file in files):
                return folder
    files = " and ".join(choices[0])
    advice = f"copy {name}/ of any FLUX.1 into {base}"
    purpose = f"{source.path}: no {name}/ with {files} is near ({advice}), and {SCHNELL}"
    return locate(SCHNELL, [TOKENIZERS], purpose) / name
