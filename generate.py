"""One layout in, one picture out.

    python generate.py --layout layout.yaml

reads the layout, encodes its prompts, denoises (the first steps regionally, the rest plainly), decodes and writes the
picture. What is not needed any more is dropped before the next part of the model is loaded.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import weights
from model.autoencoder import to_uint8
from model.errors import InputError
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux
from regional.attention import MaskedAttention, RegionalAttention, dense_attention, portable_attention
from regional.layout import Layout, read_layout
from regional.mask import RegionTokens, region_tokens
from sampler.flow import denoise, image_ids, noise, pack, text_ids, unpack
from sampler.schedule import sigmas

MASKED_ATTENTION = {"portable": portable_attention, "dense": dense_attention}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EXIF_DESCRIPTION, EXIF_SOFTWARE = 0x010E, 0x0131


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layout", type=Path, metavar="FILE", help="the layout, a YAML file; the flags below win over what it says")
    add("--output", type=Path, metavar="FILE", help=".png, .jpg or .webp; default: the layout's name, .png")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--save-latents", type=Path, metavar="FILE", help="also write the latents before decoding (.safetensors)")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", default="pocket", help="a folder, a Hugging Face repository, or the built-in pocket model (default)")
    for part in ("flux", "t5", "clip", "ae"):
        add(f"--{part}", metavar="PATH", help=f"take the {part} part from this file or folder")
    add("--device", default="auto", choices=["auto", "cuda", "cpu", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 on a CPU, else bfloat16")
    add("--attention", default="portable", choices=list(MASKED_ATTENTION), help="how masked attention is computed")

    layout = parser.add_argument_group("in place of the layout's keys", argument_default=argparse.SUPPRESS)
    add = layout.add_argument
    add("--prompt", help="the base prompt; enough for a picture without a layout")
    add("--background-prompt", metavar="PROMPT")
    add("--seed", type=int, nargs="+", metavar="N", help="several seeds make several pictures, named _SEED")
    for key in ("width", "height", "steps", "double-inject-interval", "single-inject-interval", "max-sequence-length"):
        add(f"--{key}", type=int, metavar="N")
    for key in ("guidance", "base-ratio"):
        add(f"--{key}", type=float, metavar="X")
    add("--mask-inject-steps", type=count_or_share, metavar="N", help="a count, or a share such as 40%%")
    add("--overlap", choices=["share", "last"])
    args = parser.parse_args(argv)
    if not args.layout and "prompt" not in args:
        parser.error("give a --layout, or at least a --prompt")
    return args


def count_or_share(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


class Conditioning(NamedTuple):
    """The encoded prompts: txt (1, L_txt, context), regions (R, L_txt, context) or None, y (1, vec)."""

    txt: Tensor
    regions: Tensor | None
    y: Tensor


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except InputError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("generate.py: interrupted", file=sys.stderr)
        return 130
    return 0


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    read(args, 1024)  # complain about the layout before anything is downloaded
    device = choose_device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.float32 if device.type == "cpu" else torch.bfloat16
    checkpoint = weights.find(args.model, args.flux, args.t5, args.clip, args.ae)
    layout = read(args, int(weights.metadata_number(checkpoint.flux, "sample_size", 1024)))
    layout = with_model_defaults(layout, checkpoint.flux)
    pictures = plan_outputs(args, layout)
    if checkpoint.name == "pocket":
        say("the built-in pocket model draws; for FLUX.1-dev add --model black-forest-labs/FLUX.1-dev, or its folder")

    regional = layout.regions and layout.regional_steps(layout.steps) and layout.base_ratio < 1
    tokens = region_tokens(layout) if regional else None
    for warning in tokens.warnings if tokens else ():
        say(f"warning: {warning}")
    conditioning = encode(checkpoint, layout, tokens, device, dtype)
    flux = weights.load_flux(checkpoint.flux, device, dtype)
    masked_attention = MASKED_ATTENTION[args.attention]
    latents = [sample(flux, layout, tokens, conditioning, picture.seed, masked_attention) for picture in pictures]
    del flux
    autoencoder = weights.load_autoencoder(checkpoint.ae, device, dtype)
    for picture, z in zip(pictures, latents):
        if picture.latents:
            write(picture.latents, partial(save_file, {"latents": z.cpu().contiguous()}))
        image = Image.fromarray(to_uint8(autoencoder.decode(z.to(dtype)))[0].cpu().numpy())
        write(picture.output, partial(save_image, image, layout, picture.seed, checkpoint.name))
        print(picture.output)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def choose_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name}: this machine, or this build of torch, has no such device.")
    return torch.device(name)


# ------------------------------------------------------------------------------------------------ settings and files


def read(args: argparse.Namespace, size: int) -> Layout:
    """The layout with the command line's flags in it; `size` is the model's default width and height."""
    overrides = {key: value for key, value in vars(args).items() if key in Layout.__struct_fields__ and key != "seed"}
    return read_layout(args.layout, overrides, size)


def with_model_defaults(layout: Layout, flux: weights.Source) -> Layout:
    """Fill in what the layout leaves to the model: dev takes 24 steps and 512 text tokens, schnell 4 and 256."""
    steps, length = (24, 512) if weights.flux_params(flux).guidance_embed else (4, 256)
    length = int(weights.metadata_number(flux, "max_sequence_length", length))
    return msgspec.structs.replace(
        layout, steps=layout.steps or steps, max_sequence_length=layout.max_sequence_length or length
    )


class Picture(NamedTuple):
    seed: int
    output: Path
    latents: Path | None


def plan_outputs(args: argparse.Namespace, layout: Layout) -> list[Picture]:
    """Which files this run writes. Refuses, before any work, what it could not write in the end."""
    seeds = list(dict.fromkeys(getattr(args, "seed", None) or [layout.seed]))
    if seeds == [None]:
        seeds = [random.randrange(2**32)]
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise InputError(f"the command line: --seed {seed}: expected a number from 0 to 2^63 - 1.")
    say(f"seed {', '.join(map(str, seeds))}")
    output = args.output or free_name(Path(args.layout.stem if args.layout else "picture").with_suffix(".png"), seeds)
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"--output {output}: the suffix must be one of {', '.join(SUFFIXES)}.")
    pictures = [
        Picture(seed, numbered(output, seed, seeds), args.save_latents and numbered(args.save_latents, seed, seeds))
        for seed in seeds
    ]
    for path in (path for picture in pictures for path in picture[1:] if path):
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent} to write it to.")
        if path.exists() and not args.overwrite:
            raise InputError(f"{path}: exists already; choose another --output, or add --overwrite.")
    return pictures


def numbered(path: Path, seed: int, seeds: list[int]) -> Path:
    return path.with_stem(f"{path.stem}_{seed}") if len(seeds) > 1 else path


def free_name(path: Path, seeds: list[int]) -> Path:
    """The path itself, or the first of path_1, path_2 ... where nothing is in the way."""
    candidates = [path] + [path.with_stem(f"{path.stem}_{i}") for i in range(1, 10000)]
    return next(p for p in candidates if not any(numbered(p, seed, seeds).exists() for seed in seeds))


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, then rename: a file of the right name is always whole."""
    unfinished = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_image(image: Image.Image, layout: Layout, seed: int, model: str, file: Path) -> None:
    """Write PNG, JPEG or WebP, carrying what made it: a line for people's tools and the whole layout as JSON."""
    made_by = {**msgspec.to_builtins(layout), "seed": seed, "model": model, "torch": torch.__version__}
    settings = (
        f"Steps: {layout.steps}, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: {layout.guidance}, Seed: {seed}, "
        f"Size: {layout.width}x{layout.height}, Model: {model}, Base ratio: {layout.base_ratio}, "
        f"Mask inject steps: {layout.mask_inject_steps}"
    )
    if file.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", f"{layout.prompt}\n{settings}")
        info.add_text("layout", json.dumps(made_by, ensure_ascii=False))
        image.save(file, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = json.dumps(made_by)
        exif[EXIF_SOFTWARE] = f"{settings}"
        image.save(file, exif=exif, quality=95)


# ------------------------------------------------------------------------------------------------ the picture


def encode(
    checkpoint: weights.Checkpoint,
    layout: Layout,
    tokens: RegionTokens | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Conditioning:
    """Encode the prompts; both encoders are gone when this returns."""
    prompts = [layout.prompt] + (tokens.prompts if tokens else [])
    ids, cut = T5Tokenizer(checkpoint.t5_tokenizer)(prompts, layout.max_sequence_length)
    for prompt, rest in zip(prompts, cut):
        if rest:
            say(f"warning: {layout.max_sequence_length} text tokens do not hold {prompt[:40]!r}...; cut off: {rest!r}")
    clip_ids, cut = CLIPTokenizer(checkpoint.clip_tokenizer)([layout.prompt])
    if cut[0]:
        say(f"warning: CLIP reads 77 tokens of the base prompt; it does not see: {cut[0]!r}")
    # T5's activations overflow in float16
    t5 = weights.load_t5(checkpoint.t5, device, torch.bfloat16 if dtype == torch.float16 else dtype)
    txt = torch.cat([t5(part.to(device)) for part in ids.split(8)]).to(dtype)
    del t5
    clip = weights.load_clip(checkpoint.clip, device, dtype)
    return Conditioning(txt[:1], txt[1:] if tokens else None, clip(clip_ids.to(device)))


def sample(
    flux: Flux,
    layout: Layout,
    tokens: RegionTokens | None,
    conditioning: Conditioning,
    seed: int,
    masked_attention: Callable[[Tensor], MaskedAttention],
) -> Tensor:
    """Noise to latents (1, 16, height / 8, width / 8), float32: the first steps regional, the others plain FLUX."""
    device, dtype = conditioning.txt.device, conditioning.txt.dtype
    img = pack(noise(layout.width, layout.height, seed)).to(device, dtype).float()
    img_ids = image_ids(layout.width, layout.height).to(device)
    guidance = torch.tensor([layout.guidance], dtype=torch.float32, device=device)

    def velocity(txt: Tensor, **hooks: Any) -> Callable[[Tensor, Tensor], Tensor]:
        ids = text_ids(txt.shape[1]).to(device)
        return lambda img, t: flux(img.to(dtype), img_ids, txt, ids, t, conditioning.y, guidance, **hooks)

    levels = sigmas(layout.steps, img.shape[1], shift=flux.params.guidance_embed)
    regional_steps = 0
    with tqdm(total=layout.steps, desc=f"seed {seed}", disable=None) as bar:
        if tokens:
            regional_steps = layout.regional_steps(layout.steps)
            text_length = conditioning.txt.shape[1]
            attention = RegionalAttention(
                masked_attention(tokens.bits(text_length).to(device)), text_length, img.shape[1],
                layout.base_ratio, layout.double_inject_interval, layout.single_inject_interval,
            )  # fmt: skip
            txt = conditioning.regions.flatten(0, 1)[None]
            if layout.base_ratio > 0:
                txt = torch.cat([conditioning.txt, txt], dim=1)
            regional = velocity(txt, attention=attention, join=attention.join)
            img = denoise(regional, img, levels[: regional_steps + 1], lambda img: bar.update())
        img = denoise(velocity(conditioning.txt), img, levels[regional_steps:], lambda img: bar.update())
    return unpack(img, layout.width, layout.height)


if __name__ == "__main__":
    sys.exit(main())
