"""What a checkpoint file is, by the names and shapes of its tensors; file names never decide it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from errors import MISSING, InputError
from formats.key_names import NAMINGS, Naming
from formats.safetensors import FLOATS, FP8, Pile, Stored, Tensors, parse, read_bytes

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
            raise InputError(path, MISSING, f"{key} says the format {kind}; only float8 is supported")
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
    raise InputError(scale.file, MISSING, f"{found}, expected one float, or one for each row of {weight.shape}")
