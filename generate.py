"""One layout in, one picture out.

    python generate.py --layout layout.yaml

reads the layout, encodes its prompts, denoises (the first steps regionally, the rest plainly), decodes and writes the
picture. What is not needed any more is dropped before the next part of the model is loaded.
"""

import argparse
import glob
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import weights
from model.attention import Block, fastest_backends
from model.autoencoder import to_uint8
from model.errors import InputError
from model.lora import Addition, Lora, added, hooks_for, merge, read_lora
from model.t5 import T5Encoder
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux
from regional.attention import MaskedAttention, RegionalAttention, Tokens, dense_attention, portable_attention
from regional.compose import Velocity, composed_velocity
from regional.control import ActiveControl, control_hook, control_picture, image_share
from regional.layout import CONTROL_FLAGS, MODES, Control, Layout, read_layout
from regional.lora import additions, can_be_regional, plain_step, regional_step
from regional.maps import AttentionMaps
from regional.mask import RegionTokens, region_tokens
from regional.sheets import contact_sheet
from sampler.flow import denoise, image_ids, noise, pack, text_ids, unpack
from sampler.schedule import sigmas

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # in float16 FLUX.1 overflows
SWEPT = (
    "base_ratio", "mask_inject_steps", "double_inject_interval", "single_inject_interval", "guidance", "steps",
    "method", "preset", "region_max_sequence_length",
)  # fmt: skip
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EXIF_DESCRIPTION, EXIF_SOFTWARE = 0x010E, 0x0131
MAX_JPEG_EXIF = 65_000  # bytes; a JPEG's segments have 16-bit lengths


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layout", type=Path, metavar="FILE", help="the layout, a YAML file; the flags below win over what it says")
    add("--output", type=Path, metavar="FILE", help=".png, .jpg or .webp; default: the layout's name, .png")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--save-latents", type=Path, metavar="FILE", help="also write the latents before decoding (.safetensors)")
    add("--sweep", action="append", default=[], metavar="KEY=A,B", help="draw once for each value of this key, and a "
        "sheet of all; two sweeps draw all their combinations")  # fmt: skip
    add("--attention-maps", type=Path, metavar="DIR", help="also draw where each region's text is looked at")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", help="a folder, a Hugging Face repository, or pocket, the built-in model (default)")
    for part in ("flux", "t5", "clip", "ae"):
        add(f"--{part}", metavar="PATH", help=f"take the {part} part from this file or folder")
    add("--device", default="auto", choices=["auto", "cuda", "cpu", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 on a CPU, else bfloat16")
    add("--attention", default="auto", choices=["auto", "kernel", "portable", "dense"],
        help="how masked attention is computed; auto: the kernel on CUDA, else portable")  # fmt: skip
    add("--verbose", action="store_true", help="say which attention functions are used")

    add("--lora", dest="loras", action="append", nargs="+", metavar=("FILE", "SCALE"), default=argparse.SUPPRESS,
        help="a LoRA for the whole picture: a file, or a repository, org/name or org/name:file, and its scale; "
        "repeatable; in place of the layout's loras")  # fmt: skip

    control = parser.add_argument_group("one ControlNet, in place of the layout's", argument_default=argparse.SUPPRESS)
    add = control.add_argument
    add("--controlnet", metavar="MODEL", help="a file or folder, or a repository, org/name or org/name:file")
    add("--control-image", metavar="FILE", help="the picture that it follows")
    add("--control-mode", type=count_or_share, metavar="M", help=f"for union models: a number, or {', '.join(MODES)}")
    for key, meaning in ("scale", "default 0.7"), ("start", "share of the steps, from 0"), ("end", "and to 1"):
        add(f"--control-{key}", type=float, metavar="X", help=meaning)
    add("--preprocess", choices=["canny"], help="follow the edges in the picture (pip install opencv-python-headless)")

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
    add("--region-max-sequence-length", type=count_or_share, metavar="N", help="a count, or a share such as 25%%")
    add("--preset", choices=["published", "control"], help="control: settings that hold many regions better")
    add("--overlap", choices=["share", "last"])
    add("--method", choices=["regional", "rpg", "plain"], help="rpg: compose whole pictures, as the paper's rival does")
    args = parser.parse_args(argv)
    if "loras" in args:
        args.loras = [lora_flag(parser, values) for values in args.loras]
    if control := {key: vars(args)[flag] for key, flag in CONTROL_FLAGS.items() if flag in args}:
        if not {"model", "image"} <= control.keys():
            parser.error("a ControlNet needs both --controlnet and --control-image")
        args.controlnets = [control]
    if not args.layout and "prompt" not in args:
        parser.error("give a --layout, or at least a --prompt")
    return args


def count_or_share(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def lora_flag(parser: argparse.ArgumentParser, values: list[str]) -> dict[str, Any]:
    file, *scale = values
    try:
        return {"file": file, "scale": float(*scale)} if scale else {"file": file}
    except (TypeError, ValueError):
        parser.error(f"argument --lora: expected a file and perhaps its scale, a number, not {' '.join(values)}")


class ControlPlan(NamedTuple):
    """A ControlNet before it is loaded; its picture is (1, 3, height, width), or its packed latents (1, L_img, 64)."""

    source: weights.Source
    setting: Control
    picture: Tensor


class Picture(NamedTuple):
    """One picture of a run; `swept` is what tells its layout from the others: base_ratio=0.1, say."""

    layout: Layout
    swept: tuple[str, ...]
    seed: int
    output: Path
    latents: Path | None


Loras = Mapping[str, Lora]  # by their names in the layout
NO_LORAS: Loras = {}


class Conditioning(NamedTuple):
    """The encoded prompts: txt (1, L_txt, context), regions (R, L_region, context) or None, and CLIP's vectors, of the
    base prompt alone, y (1, vec), or by the method rpg of the regions' too, (1 + R, vec). control: a control LoRA's
    picture, its packed latents (1, L_img, 64)."""

    txt: Tensor
    regions: Tensor | None
    y: Tensor
    control: Tensor | None = None


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 for bad input, 1 for what the machine refuses, 130 for Ctrl-C."""
    args = parse_args(argv)
    try:
        run(args)
    except InputError as error:
        say(f"generate.py: {error}")
        return 2
    except OSError as error:
        say(f"generate.py: {error}")
        return 1
    except KeyboardInterrupt:
        say("generate.py: interrupted")
        return 130
    return 0


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.float32 if device.type == "cpu" else torch.bfloat16
    if weights.is_repository(args.model):  # complain before tens of gigabytes are downloaded
        plan_outputs(args, read(args, 1024))
    checkpoint = weights.find(args.model, args.flux, args.t5, args.clip, args.ae)
    layouts = read(args, int(weights.metadata_number(checkpoint.flux, "sample_size", 1024)))
    layouts = {swept: with_model_defaults(layout, checkpoint.flux) for swept, layout in layouts.items()}
    pictures, sheet = plan_outputs(args, layouts)
    say(f"seed {', '.join(str(seed) for seed in dict.fromkeys(picture.seed for picture in pictures))}")
    if checkpoint.name == "pocket":
        say("the built-in pocket model draws; for FLUX.1-dev add --model black-forest-labs/FLUX.1-dev, or its folder")

    controls = plan_controls(args, pictures[0].layout, checkpoint.flux)
    regional = [layout for layout in layouts.values() if layout.regional_steps(layout.steps)]
    loras = read_loras(pictures[0].layout, checkpoint)  # a sweep changes neither these, nor prompts, nor shapes
    lora_picture = control_of(pictures[0].layout)
    in_plain_steps = any(lora.plain_steps for region in pictures[0].layout.regions for lora in region.loras)
    tokens = region_tokens(pictures[0].layout) if regional or in_plain_steps else None
    for warning in tokens.warnings if tokens else ():
        say(f"warning: {warning}")
    methods, masked_attention = {layout.method for layout in regional}, portable_attention
    if "regional" in methods:
        masked_attention = choose_attention(args.attention, device, dtype, args.verbose)
    conditioning = encode(checkpoint, pictures[0].layout, tokens, "rpg" in methods, device, dtype, loras)
    controls = encode_controls(controls, checkpoint.ae, device, dtype)
    if lora_picture is not None:
        autoencoder = weights.load_autoencoder(checkpoint.ae, device, dtype)
        conditioning = conditioning._replace(control=pack(autoencoder.encode(lora_picture.to(device, dtype))))
        del autoencoder
    watch = args.attention_maps is not None
    drawn, stop = sample_all(
        checkpoint, loras, controls, tokens, conditioning, pictures, masked_attention, watch, args.verbose
    )
    autoencoder = weights.load_autoencoder(checkpoint.ae, device, dtype)
    images = []
    for picture, (z, maps) in zip(pictures, drawn):
        image = Image.fromarray(to_uint8(autoencoder.decode(z.to(dtype)))[0].cpu().numpy())
        made = made_by(picture.layout, picture.seed, checkpoint, dtype)
        write(picture.output, partial(save_image, image, picture.layout, made))
        print(picture.output)
        images.append(image)
        if maps and maps.steps:
            save_maps(maps, args.attention_maps / picture.output.stem, image, tokens.prompts)
        elif maps:
            say(f"{picture.output}: no step of it is regional, so it has no attention maps")
    if stop:
        raise stop
    if sheet:
        write(sheet, sweep_sheet(pictures, images).save)
        print(sheet)


def sample_all(
    checkpoint: weights.Checkpoint,
    loras: Loras,
    plans: list[ControlPlan],
    tokens: RegionTokens | None,
    conditioning: Conditioning,
    pictures: list[Picture],
    masked_attention: Callable[[Tokens], MaskedAttention],
    watch: bool,
    verbose: bool,
) -> tuple[list[tuple[Tensor, AttentionMaps | None]], KeyboardInterrupt | None]:
    """Each picture's latents and, if asked for, maps. Ctrl-C ends the list early, so that the rest can be decoded."""
    merges = merges_of(pictures[0].layout, loras, "flux")
    flux = weights.load_flux(checkpoint.flux, conditioning.txt.device, conditioning.txt.dtype, merges)
    controls = load_controls(plans, pictures[0].layout, conditioning.txt.device, conditioning.txt.dtype)
    drawn = []
    try:
        with library_attention(flux, pictures[0].layout, conditioning.txt, verbose):
            for picture in pictures:
                maps = AttentionMaps(flux.params.depth, flux.params.depth_single_blocks) if watch else None
                z = sample(
                    flux, picture.layout, tokens, conditioning, picture.seed, masked_attention, maps,
                    loras=loras, controls=controls,
                )  # fmt: skip
                if picture.latents:
                    write(picture.latents, partial(save_file, {"latents": z.cpu().contiguous()}))
                drawn.append((z, maps))
    except KeyboardInterrupt as stop:
        return drawn, stop
    return drawn, None


def say(text: str) -> None:
    print(text, file=sys.stderr)


def choose_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name}: this machine, or this build of torch, has no such device.")
    return torch.device(name)


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, verbose: bool
) -> Callable[[Tokens], MaskedAttention]:
    """What makes the masked attention of the regional steps. What was asked for and can't be had is an error."""
    if name == "kernel" or name == "auto" and device.type == "cuda":
        try:
            from regional import kernel
        except ImportError as error:
            problem = f"Triton is missing here ({error}); try --attention portable."
            raise InputError(f"--attention {name}: {problem}") from error
    if name == "auto":
        name = "kernel" if device.type == "cuda" and kernel.runs_on(device) else "portable"
    if verbose:
        say(f"masked attention: {name}")
    if name != "kernel":
        return {"portable": portable_attention, "dense": dense_attention}[name]
    if not kernel.runs_on(device) and not (kernel.INTERPRETED and device.type == "cpu" and dtype == torch.float32):
        raise InputError(
            "--attention kernel: the kernel needs an NVIDIA GPU from Ampere on; try --attention portable. (In Triton's "
            "interpreter, TRITON_INTERPRET=1, it runs on the CPU in float32, slowly.)"
        )
    return partial(kernel.kernel_attention, dtype=dtype, device=device)


def library_attention(flux: Flux, layout: Layout, txt: Tensor, verbose: bool) -> AbstractContextManager:
    """Makes torch prefer, on a GPU, that of its unmasked attentions which is fastest there for this picture."""
    backends = []
    if txt.device.type == "cuda":
        heads, length = flux.params.num_heads, txt.shape[1] + layout.width * layout.height // 256
        backends = fastest_backends(txt.new_empty(1, heads, length, flux.params.hidden_size // heads).normal_())
    if verbose:
        say(f"unmasked attention: {', then '.join(backend.name for backend in backends) or 'as torch chooses'}")
    return sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True) if backends else nullcontext()


# ------------------------------------------------------------------------------------------------ settings and files


def read(args: argparse.Namespace, size: int) -> dict[tuple[str, ...], Layout]:
    """The layout with the command line's flags in it, once for each combination of the swept values, by these. `size`
    is the model's default width and height."""
    flags = {key: value for key, value in vars(args).items() if key in Layout.__struct_fields__ and key != "seed"}
    sweeps = [parse_sweep(text) for text in args.sweep]
    if len(dict(sweeps)) < len(sweeps):
        raise InputError(f"the command line: --sweep {', '.join(args.sweep)}: a key is swept twice.")
    layouts = {}
    for values in itertools.product(*(values for _, values in sweeps)):
        swept = {key: value for (key, _), value in zip(sweeps, values)}
        layouts[tuple(f"{key}={value}" for key, value in swept.items())] = read_layout(args.layout, flags | swept, size)
    return layouts


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    key, _, values = text.partition("=")
    key = key.strip().replace("-", "_")
    if key not in SWEPT or not values:
        raise InputError(f"the command line: --sweep {text}: expected one of {', '.join(SWEPT)}, then = and values.")
    try:
        return key, [yaml.safe_load(value) for value in values.split(",")]
    except yaml.YAMLError as error:
        raise InputError(f"the command line: --sweep {text}: its values can't be read.") from error


def with_model_defaults(layout: Layout, flux: weights.Source) -> Layout:
    """Fill in what the layout leaves to the model: dev takes 24 steps and 512 text tokens, schnell 4 and 256."""
    steps, length = (24, 512) if weights.flux_params(flux).guidance_embed else (4, 256)
    length = int(weights.metadata_number(flux, "max_sequence_length", length))
    length = layout.max_sequence_length or length
    return msgspec.structs.replace(
        layout,
        steps=layout.steps or steps,
        max_sequence_length=length,
        region_max_sequence_length=layout.region_length(length),
    )


def plan_outputs(args: argparse.Namespace, layouts: dict[tuple[str, ...], Layout]) -> tuple[list[Picture], Path | None]:
    """Which files this run writes, and the sheet of a sweep. Refuses, before any work, what it could not write."""
    seeds = list(dict.fromkeys(getattr(args, "seed", None) or [next(iter(layouts.values())).seed]))
    if seeds == [None]:
        seeds = [random.randrange(2**32)]
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise InputError(f"the command line: --seed {seed}: expected a number from 0 to 2^63 - 1.")
    runs = [(*each, seed) for each in layouts.items() for seed in seeds]
    marks = [[*swept, *([str(seed)] if len(seeds) > 1 else [])] for swept, _, seed in runs]
    names = marks + ([["sheet"]] if args.sweep else [])
    output = args.output or free_name(Path(f"{args.layout.stem if args.layout else 'picture'}.png"), names)
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"--output {output}: the suffix must be one of {', '.join(SUFFIXES)}.")
    if args.save_latents and args.save_latents.suffix != ".safetensors":
        raise InputError(f"--save-latents {args.save_latents}: the suffix must be .safetensors.")
    pictures = [
        Picture(layout, swept, seed, marked(output, mark), args.save_latents and marked(args.save_latents, mark))
        for (swept, layout, seed), mark in zip(runs, marks)
    ]
    files = [path for picture in pictures for path in (picture.output, picture.latents) if path]
    sheet = marked(output, ["sheet"]) if args.sweep else None
    files += [sheet] if sheet else []
    if args.attention_maps:
        if not args.attention_maps.exists():
            args.attention_maps.mkdir(parents=True)
        for picture in pictures:
            files.append(args.attention_maps / f"{picture.output.stem}.safetensors")
            files += args.attention_maps.glob(f"{glob.escape(picture.output.stem)}_step*.png")
    for path in files:
        check_writable(path, args.overwrite)
    return pictures, sheet


def check_writable(path: Path, overwrite: bool) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent} to write it to.")
    if len(os.fsencode(path.name)) > 200 or path.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: no file of this name can be written there.")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; choose another --output, or add --overwrite.")


def marked(path: Path, mark: list[str]) -> Path:
    return path.with_stem("_".join([path.stem, *mark]))


def free_name(path: Path, marks: list[list[str]]) -> Path:
    """The path itself, or the first of path_1, path_2 ... where nothing is in the way."""
    candidates = [path] + [path.with_stem(f"{path.stem}_{i}") for i in range(1, 10000)]
    return next(p for p in candidates if not any(marked(p, mark).exists() for mark in marks))


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, then rename: a file of the right name is always whole."""
    unfinished = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def made_by(layout: Layout, seed: int, checkpoint: weights.Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """All that made a picture: the layout with every default filled in, seed, model, its files, dtype and torch."""
    files = {part: str(getattr(checkpoint, part).path) for part in ("flux", "t5", "clip", "ae")}
    run = {"model": checkpoint.name, "files": files, "dtype": str(dtype), "torch": torch.__version__}
    return {**msgspec.to_builtins(layout), "seed": seed, **run}


def save_image(image: Image.Image, layout: Layout, made_by: dict[str, Any], file: Path) -> None:
    """Write PNG, JPEG or WebP, carrying what made it: a line for people's tools and the whole layout as JSON."""
    settings = (
        f"Steps: {layout.steps}, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: {layout.guidance}, "
        f"Seed: {made_by['seed']}, Size: {layout.width}x{layout.height}, Model: {made_by['model']}, "
        f"Base ratio: {layout.base_ratio}, Mask inject steps: {layout.mask_inject_steps}"
    )
    if file.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", f"{layout.prompt}\n{settings}")
        info.add_text("layout", json.dumps(made_by, ensure_ascii=False))
        image.save(file, pnginfo=info)
        return
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(made_by)
    exif[EXIF_SOFTWARE] = settings
    if file.suffix.lower() != ".webp" and len(exif.tobytes()) > MAX_JPEG_EXIF:
        say(f"warning: the layout's {len(exif.tobytes()):,} bytes don't fit into a JPEG; this one does not carry it")
        del exif[EXIF_DESCRIPTION]
    image.save(file, exif=exif, quality=95)


def sweep_sheet(pictures: list[Picture], images: list[Image.Image]) -> Image.Image:
    """All pictures of a sweep: a column for each value of the last key, a row for each of everything else."""
    rows, several = {}, len({picture.seed for picture in pictures}) > 1
    for picture, image in zip(pictures, images):
        *others, column = picture.swept
        row = ", ".join([*others, *([f"seed {picture.seed}"] if several else [])])
        rows.setdefault(row, {})[column] = image
    return contact_sheet({row: list(images.values()) for row, images in rows.items()}, list(next(iter(rows.values()))))


def save_maps(maps: AttentionMaps, path: Path, image: Image.Image, prompts: list[str]) -> None:
    """A sheet for each regional step, path_step1.png and so on, and the numbers behind them, path.safetensors."""
    for i, sheet in enumerate(maps.sheets(image, prompts)):
        write(path.with_name(f"{path.name}_step{i + 1}.png"), sheet.save)
    write(path.with_name(f"{path.name}.safetensors"), partial(save_file, {"maps": maps.maps}))


# ------------------------------------------------------------------------------------------------ LoRAs


def read_loras(layout: Layout, checkpoint: weights.Checkpoint) -> Loras:
    """All LoRAs that a layout names, by the names they have there. Says what in them is left out."""
    named = {f"loras[{i}].file": lora for i, lora in enumerate(layout.loras)}
    for i, region in enumerate(layout.regions):
        named |= {f"regions[{i}].loras[{j}].file": lora for j, lora in enumerate(region.loras)}
    if not named:
        return {}
    modules, loras = {part: weights.on_meta(getattr(checkpoint, part)) for part in ("flux", "t5", "clip")}, {}
    for key, entry in named.items():
        lora = loras.get(entry.file) or read_lora(weights.lora_file(entry.file, f"{key} = {entry.file}"), modules)
        if lora.unknown and entry.file not in loras:
            count, first = len(lora.unknown), lora.unknown[0]
            say(f"warning: {lora.path}: {count} of its keys mean nothing for this model and are left out, as {first}")
        loras[entry.file] = lora
        left = {c.name for c in lora.changes["flux"] if not can_be_regional(c)} | {c.name for c in lora.changes["clip"]}
        if lora.is_control != bool(getattr(entry, "image", None)):
            needs = (
                "is a control LoRA, for the whole picture, and needs an image" if lora.is_control else "takes no image"
            )
            raise InputError(f"{key} = {entry.file}: this LoRA {needs}.")
        if left and key.startswith("regions"):
            say(f"warning: {key} = {entry.file}: what changes the whole picture is left out: {', '.join(sorted(left))}")
    return loras


def control_of(layout: Layout) -> Tensor | None:
    """The control picture of the layout's control LoRA, (1, 3, height, width) in [-1, 1]."""
    images = [lora.image for lora in layout.loras if lora.image]
    if len(images) > 1:
        raise InputError(f"loras: {' and '.join(images)}: there can be only one control LoRA, with one image.")
    for image in images:
        picture, warnings = control_picture(image, None, layout.width, layout.height)
        for warning in warnings:
            say(f"warning: {warning}")
        return picture
    return None


def merges_of(layout: Layout, loras: Loras, part: str) -> weights.Merges:
    """What the layout's whole-picture LoRAs make of a part's weights."""
    changes = {}
    for entry in layout.loras:
        for change in loras[entry.file].changes[part]:
            changes.setdefault(change.name, []).append((change, entry.scale))
    return {name: partial(merge, changes=own) for name, own in changes.items()}


# ------------------------------------------------------------------------------------------------ the picture


def encode(
    checkpoint: weights.Checkpoint,
    layout: Layout,
    tokens: RegionTokens | None,
    vectors: bool,
    device: torch.device,
    dtype: torch.dtype,
    loras: Loras = NO_LORAS,
) -> Conditioning:
    """Encode the prompts, with CLIP the base prompt's alone or all `vectors`; both encoders are gone afterwards."""
    regions = tokens.prompts if tokens else []
    tokenizer = T5Tokenizer(checkpoint.t5_tokenizer)
    base_ids = tokenize(tokenizer, [layout.prompt], layout.max_sequence_length)
    region_ids = tokenize(tokenizer, regions, layout.region_max_sequence_length) if regions else None
    clip_ids, cut = CLIPTokenizer(checkpoint.clip_tokenizer)([layout.prompt] + regions * vectors)
    if cut[0]:
        say(f"warning: CLIP reads 77 tokens of the base prompt; it does not see: {cut[0]!r}")
    t5 = weights.load_t5(checkpoint.t5, device, dtype, merges_of(layout, loras, "t5"))
    highest = max(ids.max() for ids in (base_ids, region_ids) if ids is not None)
    check_vocabulary(highest, t5.params.vocab_size, checkpoint.t5_tokenizer, checkpoint.t5)
    txt = t5(base_ids.to(device)).to(dtype)
    region_txt = region_states(t5, region_ids.to(device), layout, loras).to(dtype) if regions else None
    del t5
    clip = weights.load_clip(checkpoint.clip, device, dtype, merges_of(layout, loras, "clip"))
    check_vocabulary(clip_ids.max(), clip.params.vocab_size, checkpoint.clip_tokenizer, checkpoint.clip)
    return Conditioning(txt, region_txt, clip(clip_ids.to(device)))


def region_states(t5: T5Encoder, ids: Tensor, layout: Layout, loras: Loras) -> Tensor:
    """T5's states of the regions' prompts (R, L), each changed by the T5 part of its region's own LoRAs."""
    everywhere = torch.ones(ids.shape[1], dtype=torch.bool)
    changes = [
        [Addition(c, lora.scale, everywhere) for lora in region.loras for c in loras[lora.file].changes["t5"]]
        for region in layout.regions
    ]
    if not any(changes):
        return torch.cat([t5(part) for part in ids.split(8)])
    states = []
    for own, prompt in itertools.zip_longest(changes, ids.split(1), fillvalue=[]):  # the background has none
        with added(t5, hooks_for(t5, own)):
            states.append(t5(prompt))
    return torch.cat(states)


def tokenize(tokenizer: T5Tokenizer, prompts: list[str], length: int) -> Tensor:
    ids, cut = tokenizer(prompts, length)
    for prompt, rest in zip(prompts, cut):
        if rest:
            say(f"warning: {length} text tokens do not hold {prompt[:40]!r}...; cut off: {rest!r}")
    return ids


def check_vocabulary(highest: Tensor, size: int, tokenizer: Path, encoder: weights.Source) -> None:
    if highest >= size:
        raise InputError(
            f"{tokenizer}: its ids go beyond the {size} tokens that {encoder.path} knows; they don't match."
        )


def plan_controls(args: argparse.Namespace, layout: Layout, flux: weights.Source) -> list[ControlPlan]:
    """The layout's ControlNets, each checked against the transformer and its mode, and their pictures."""
    plans = []
    for i, control in enumerate(layout.controlnets):
        key = f"{args.layout}: controlnets[{i}]"
        model, mode = ("--controlnet", "--control-mode") if "controlnets" in args else (f"{key}.model =", f"{key}.mode")
        source = weights.find_controlnet(control.model, model)
        weights.check_base(source, flux)
        check_mode(control, weights.controlnet_params(source).modes, source, mode)
        picture, warnings = control_picture(control.image, control.preprocess, layout.width, layout.height)
        if not any(control.acts(step, layout.steps) for step in range(layout.steps)):
            warnings.append(f"{control.model}: no step of {layout.steps} lies within its start and end; it never acts")
        for warning in warnings:
            say(f"warning: {warning}")
        plans.append(ControlPlan(source, control, picture))
    return plans


def check_mode(control: Control, modes: int, source: weights.Source, where: str) -> None:
    if modes and control.mode is None:
        raise InputError(f"{where} is missing: {source.path} is a union of {modes} modes, and needs one of them.")
    if not modes and control.mode is not None:
        raise InputError(f"{where} = {control.mode}: {source.path} has no modes.")
    if modes and control.mode_index >= modes:
        raise InputError(f"{where} = {control.mode}: {source.path} has {modes} modes, counted from 0.")


def encode_controls(
    plans: list[ControlPlan], ae: weights.Source, device: torch.device, dtype: torch.dtype
) -> list[ControlPlan]:
    """The same with packed latents for pictures, but where a ControlNet reads the picture itself."""
    as_latents = [not weights.controlnet_params(plan.source).hint_width for plan in plans]
    autoencoder = weights.load_autoencoder(ae, device, dtype) if any(as_latents) else None
    return [
        plan._replace(picture=pack(autoencoder.encode(plan.picture.to(device, dtype)))) if encode else plan
        for plan, encode in zip(plans, as_latents)
    ]


def load_controls(
    plans: list[ControlPlan], layout: Layout, device: torch.device, dtype: torch.dtype
) -> list[ActiveControl]:
    """The ControlNets, each file loaded once, ready for this layout."""
    nets = {}
    for plan in plans:
        if plan.source.path not in nets:
            nets[plan.source.path] = weights.load_controlnet(plan.source, device, dtype)
    controls = []
    for source, setting, picture in plans:
        net, picture = nets[source.path], picture.to(device, dtype)
        tokens = net.read(picture) if net.params.hint_width else picture
        controls.append(ActiveControl(net, tokens, image_share(setting, layout).to(device, dtype), setting))
    return controls


def sample(
    flux: Flux,
    layout: Layout,
    tokens: RegionTokens | None,
    conditioning: Conditioning,
    seed: int,
    masked_attention: Callable[[Tokens], MaskedAttention],
    maps: AttentionMaps | None = None,
    is_masked: Callable[[Block], bool] | None = None,
    loras: Loras = NO_LORAS,
    controls: Sequence[ActiveControl] = (),
) -> Tensor:
    """Noise to latents (1, 16, height / 8, width / 8), float32: the first steps regional, the others plain FLUX.

    `is_masked` says in which blocks the regional branch is masked; without it the layout's intervals do.
    """
    device, dtype = conditioning.txt.device, conditioning.txt.dtype
    img = pack(noise(layout.width, layout.height, seed)).to(device, dtype).float()
    img_ids, beside = image_ids(layout.width, layout.height), conditioning.control
    guidance = torch.tensor([layout.guidance], dtype=torch.float32, device=device)
    stages = regional_stages(layout, tokens)
    if stages:  # tokens of the same regions side by side, for this run
        tokens, order = tokens.sorted()
        img, img_ids, beside = (x if x is None else x[:, order] for x in (img, img_ids, beside))
        controls = [control.sorted(order) for control in controls]
    length = conditioning.txt.shape[1]
    levels = sigmas(layout.steps, img.shape[1], shift=flux.params.guidance_embed)
    base = {"img_ids": img_ids, "txt": conditioning.txt, "txt_ids": text_ids(length), "y": conditioning.y[:1]}
    control = control_hook(controls, flux.params, levels, base | {"guidance": guidance})

    def velocity(txt: Tensor, y: Tensor, changes: list[Addition], streams: int = 1, **hooks: Any) -> Velocity:
        ids, lora_hooks = text_ids(txt.shape[1]), hooks_for(flux, changes)

        def flow(img: Tensor, t: Tensor) -> Tensor:
            img = img.to(dtype)
            residuals = {"after_block": control(img, t, streams)} if controls else {}
            x = img if beside is None else torch.cat([img, beside], dim=-1)
            with added(flux, lora_hooks):
                return flux(x, img_ids, txt, ids, t, y, guidance, **residuals, **hooks)

        return flow

    changes = additions(
        layout.regions, loras, lambda bit: plain_step(tokens.image_bits & bit != 0, length), in_plain_steps=True
    )
    plain = velocity(conditioning.txt, conditioning.y[:1], changes)

    def composed(base_ratio: Tensor) -> Velocity:
        everywhere = plain_step(torch.ones(img.shape[1], dtype=torch.bool), conditioning.regions.shape[1])
        own = [
            velocity(txt[None], y[None], additions(layout.regions[i : i + 1], loras, lambda bit: everywhere))
            for i, (txt, y) in enumerate(zip(conditioning.regions, conditioning.y[1:]))
        ]
        return composed_velocity(own, plain, tokens, base_ratio)

    def regional(base_ratio: Tensor) -> Velocity:
        bits = tokens.bits(conditioning.regions.shape[1]).to(device)
        attention = RegionalAttention(
            masked_attention, bits, length, img.shape[1], base_ratio,
            is_masked or (lambda block: layout.is_masked(block.kind, block.index)),
            tokens.log_weights(), shared=layout.base_stream == "shared",
        )  # fmt: skip
        streams, has_base = attention.streams, attention.has_base
        changes = additions(
            layout.regions, loras, lambda bit: regional_step(bits & bit != 0, length, img.shape[1], has_base, streams)
        )
        txt = [conditioning.regions.flatten(0, 1)[None]] + ([conditioning.txt] if has_base else [])
        watched = maps.watch(attention, bits, len(tokens.prompts), order) if maps else attention
        return velocity(
            torch.cat(txt, dim=1), conditioning.y[:1], changes, streams, attention=watched, join=attention.join
        )

    done = 0
    with tqdm(total=layout.steps, desc=f"seed {seed}", disable=None) as bar:
        for end, base_ratio in stages:
            first = (composed if layout.method == "rpg" else regional)(base_ratio)
            img = denoise(first, img, levels[done : end + 1], lambda img: bar.update())
            done = end
        img = denoise(plain, img, levels[done:], lambda img: bar.update())
    if stages:
        img = img[:, order.argsort()]
    return unpack(img, layout.width, layout.height)


def regional_stages(layout: Layout, tokens: RegionTokens | None) -> list[tuple[int, Tensor]]:
    """The regional steps in stages of equal settings: where each ends, and the base branch's share in each of the
    sorted image tokens, (L_img,) float64. A region whose own steps are over has all of it: it follows the base prompt.
    """
    if not layout.regional_steps(layout.steps):
        return []
    steps_and_ratios = layout.steps_and_ratios(layout.steps)[: len(tokens.prompts)]
    tokens, start, stages = tokens.sorted()[0], 0, []
    for end in sorted({count for count, _ in steps_and_ratios} - {0}):
        ratios = [ratio if start < count else 1.0 for count, ratio in steps_and_ratios]
        stages.append((end, tokens.mean(ratios)))
        start = end
    return stages


if __name__ == "__main__":
    sys.exit(main())
