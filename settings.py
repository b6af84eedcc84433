"""How a run works, whatever the layout; flags, checks and metadata come from here."""

import re
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from errors import InputError, flag

MODEL_KEYS = ("model", "flux", "t5", "clip", "ae")  # where a model's files are
Name = str | None
Device = Annotated[str, Meta(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")]
Parallel = Literal["ulysses", None]
Dtype = Literal["auto", "float32", "bfloat16"]  # in float16 FLUX.1 overflows
Attention = Literal["auto", "kernel", "portable", "dense"]
Quantize = Literal["auto", "none", "fp8"]
Offload = Literal["auto", "none", "blocks"]


class Settings(Struct, frozen=True, kw_only=True):
    """What a run depends on besides layout, seed and output."""

    model: Annotated[Name, "a folder, a repository, or pocket (default)"] = None
    flux: Annotated[Name, "load the transformer from this file or folder"] = None
    t5: Annotated[Name, "load the T5 text encoder from this file or folder"] = None
    clip: Annotated[Name, "load the CLIP text encoder from this file or folder"] = None
    ae: Annotated[Name, "load the VAE from this file or folder"] = None
    redux: Annotated[Name, "FLUX.1 Redux, for image prompts"] = None
    device: Annotated[Device, "auto, cuda, cuda:N, cpu or mps"] = "auto"
    dtype: Annotated[Dtype, "auto: float32 on a CPU, else bfloat16"] = "auto"
    attention: Annotated[Attention, "auto: the kernel on CUDA, else portable"] = "auto"
    quantize: Annotated[Quantize, "FP8 weights; auto: if the file has them"] = "auto"
    offload: Annotated[Offload, "blocks from host memory; auto: if needed"] = "auto"
    compile: Annotated[bool, "torch.compile: a slower start, faster steps"] = False
    parallel: Annotated[Parallel, "one image on all GPUs, under torchrun"] = None
    prompt_cache: Annotated[Name, "keep prompt embeddings in this folder"] = None
    verbose: Annotated[bool, "print which attention functions are used"] = False


def invalid(values: dict[str, Any], error: msgspec.ValidationError) -> InputError:
    """What msgspec found wrong with the fields of Settings, by the flag."""
    key = re.search(r"`\$\.(\w+)", str(error))[1]
    kind = get_type_hints(Settings, include_extras=True)[key]
    expected = kind.__metadata__[-1]
    if get_origin(kind.__origin__) is Literal:
        expected = f"one of {', '.join(map(str, get_args(kind.__origin__)))}"
    return InputError(flag(key), values[key], f"expected {expected}")
