"""What a run writes: images with their metadata, and every file whole or not at all."""

import glob
import hashlib
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from msgspec.structs import replace
from PIL import Image, PngImagePlugin
from safetensors.torch import save
from torch import Tensor

from errors import (
    CHECKPOINT,
    CONFIG,
    IMAGE,
    MISSING,
    InputError,
    converted,
    opened,
    opened_image,
    parse_json,
    read_bytes,
    read_text,
    warn,
)
from regional.layout import Layout, Seed
from settings import MODEL_KEYS, Settings

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # several may write to one folder
DAY = 86400  # seconds
EXIF_DESCRIPTION = 0x010E
EXIF_SOFTWARE = 0x0131
MAX_JPEG_EXIF = 65_000  # bytes: the segments of a JPEG file have 16-bit lengths
SHEET = "contact sheet"
CHECKSUM = "sha256"  # of a tensor, among the metadata of its file
ANY_SIZE = 10**9  # pixels

Metadata = dict[str, Any]


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Save under a temporary name, then rename: a file is whole or not there."""
    remove_unfinished(path)
    unfinished = path.with_stem(f".{path.stem}.{HOST}-{os.getpid()}")
    try:
        save(unfinished)
        with open(unfinished, "rb+") as file:  # or a power cut could leave an empty file
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what this machine's dead processes left of this file, and what is a day old."""
    for file in path.parent.glob(f".{glob.escape(path.stem)}.*{path.suffix}"):
        name = re.fullmatch(r"([0-9a-f]{8})-(\d+)", file.stem.removeprefix(f".{path.stem}."))
        if name is None:  # .x.1.77.png is not x.png's
            continue
        with suppress(FileNotFoundError):  # Another process has removed or renamed it.
            is_old = time.time() - file.stat().st_mtime > DAY
            if is_old or (name[1] == HOST and not is_alive(int(name[2]))):
                file.unlink()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def check_suffix(flag: str, name: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    if Path(name).suffix.lower() not in suffixes:
        raise InputError(flag, name, f"the suffix must be {' or '.join(suffixes)}")


def check_writable(path: Path, overwrite: bool) -> None:
    """InputError if the file can't be written, or exists and is not to be overwritten."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(path, MISSING, f"there is no folder {path.parent} to write it to")
    name = os.fsencode(path.name)
    if len(name) > 200 or path.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(path, MISSING, "no file of this name can be written there")
    if path.exists() and not overwrite:
        raise InputError(path, MISSING, "exists already; --overwrite replaces it")


def run_metadata(pipeline: Any) -> Metadata:
    """What images record of how a pipeline makes them; `recorded` is the reverse."""
    settings = pipeline.settings
    checkpoint = pipeline.checkpoint
    given = {key: getattr(settings, key) for key in MODEL_KEYS}
    found = {
        "model": checkpoint.name,
        "files": {part: str(getattr(checkpoint, part).path) for part in MODEL_KEYS[1:]},
        "dtype": str(pipeline.dtype),
        "torch": torch.__version__,
        "fp8": pipeline.fp8,
        "compile": settings.compile,
        "processes": pipeline.parallel and pipeline.parallel.size,
        "attention": settings.attention.replace("auto", ""),
    }
    found = {key: value for key, value in found.items() if value}
    return found | {"given": {key: value for key, value in given.items() if value}}


def recorded(metadata: dict[str, Any]) -> dict[str, Any]:
    """The settings in an image's metadata, unchecked; the reverse of `run_metadata`."""
    given = metadata.get("given")
    files = given if isinstance(given, dict) else {"model": metadata["model"]}
    dtype = str(metadata.get("dtype", "auto"))
    return {
        **{key: str(value) for key, value in files.items() if key in MODEL_KEYS},
        "dtype": dtype.removeprefix("torch."),
        "attention": metadata.get("attention", "auto"),
        "quantize": "fp8" if metadata.get("fp8") is True else "none",
        "compile": metadata.get("compile") is True,
    }


def image_metadata(layout: Layout, seed: int, run: Metadata) -> Metadata:
    """All that determines an image, as JSON; layout: filled in; run: `run_metadata`."""
    files = [layout.map, *(region.mask for region in layout.regions)]
    files += [entry.image for entry in (*layout.loras, *layout.controlnets)]
    hashes = {}
    for file in filter(None, files):
        hashes[file] = hashlib.sha256(read_bytes(file, IMAGE)).hexdigest()[:16]
    keys = msgspec.to_builtins(layout)
    return json.loads(json.dumps({**keys, "seed": seed, **run, "pictures": hashes}))


def save_image(image: Image.Image, metadata: Metadata | None, path: Path) -> None:
    """Write PNG, JPEG or WebP with metadata: a line that other tools read, and all as JSON."""
    how = {} if metadata is None else embedded(metadata, path.suffix.lower())
    write(path, partial(image.save, quality=95, **how))


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """A contact sheet, which says what it is: it may be made again."""
    how = {}
    if path.suffix.lower() == ".png":
        how["pnginfo"] = PngImagePlugin.PngInfo()
        how["pnginfo"].add_text(SHEET, "of a sweep")
    else:
        how["exif"] = Image.Exif()
        how["exif"][EXIF_SOFTWARE] = SHEET
    write(path, partial(sheet.save, **how))


def is_sheet(path: Path) -> bool:
    with suppress(InputError), opened_image(path, ANY_SIZE) as image:
        return SHEET in image.info or image.getexif().get(EXIF_SOFTWARE) == SHEET
    return False


def embedded(metadata: Metadata, suffix: str) -> dict[str, Any]:
    """Pillow's arguments."""
    line = (
        "Steps: {steps}, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: {guidance}, "
        "Seed: {seed}, Size: {width}x{height}, Model: {model}, Base ratio: {base_ratio}, "
        "Mask inject steps: {mask_inject_steps}"
    ).format_map(metadata)
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", f"{metadata['prompt']}\n{line}")
        info.add_text("layout", json.dumps(metadata, ensure_ascii=False))
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(metadata)
    exif[EXIF_SOFTWARE] = line
    size = len(exif.tobytes())
    if suffix != ".webp" and size > MAX_JPEG_EXIF:
        warn(f"the {size:,} bytes of metadata do not fit into a JPEG; it has none")
        del exif[EXIF_DESCRIPTION]
    return {"exif": exif}


def save_json(metadata: Metadata, path: Path) -> None:
    text = json.dumps(metadata, ensure_ascii=False, indent=1) + "\n"
    write(path, partial(Path.write_text, data=text, encoding="utf-8"))


def save_tensor(name: str, tensor: Tensor, metadata: Metadata, path: Path) -> None:
    """A safetensors file with the metadata and a checksum of the numbers."""
    tensor = tensor.cpu().contiguous()
    checksum = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    data = save({name: tensor}, {"layout": json.dumps({**metadata, CHECKSUM: checksum})})
    write(path, partial(Path.write_bytes, data=data))


class Recorded(msgspec.Struct):
    """What metadata have at least."""

    prompt: str
    seed: Seed
    model: str


class Header(msgspec.Struct):
    """What is read of a safetensors header."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def read_metadata(path: Path) -> Metadata:
    """The metadata of an image, of latents, or of a .json. InputError if there are none."""
    text = metadata_text(path)
    if text is None:
        raise InputError(path, MISSING, "contains no generation metadata")
    metadata = parse_json(text, dict[str, Any], path)
    metadata.pop(CHECKSUM, None)
    converted(metadata, Recorded, path, "contains no generation metadata")
    return metadata


def metadata_text(path: Path) -> str | None:
    if path.suffix.lower() == ".json":
        return read_text(path, CONFIG)
    if path.suffix.lower() == ".safetensors":
        with opened(path, CHECKPOINT) as file:
            return header_of(path, file).metadata.get("layout")
    with opened_image(path, ANY_SIZE) as image:
        text = image.info.get("layout") or image.getexif().get(EXIF_DESCRIPTION)
    side_car = path.with_suffix(".json")
    if text is None and side_car.exists():
        return read_text(side_car, CONFIG)
    return text if isinstance(text, str) else None


def header_of(path: Path, file: BinaryIO) -> Header:
    length = int.from_bytes(file.read(8), "little")
    return parse_json(file.read(min(length, CONFIG)), Header, path)


def metadata_in(path: Path) -> Metadata | None:
    with suppress(InputError):
        return read_metadata(path)


def matches(path: Path, metadata: Metadata) -> bool:
    """Was this file made with these settings, by any version of torch, and is it whole?"""
    found = metadata_in(path)
    ignored = {"torch": None, "given": None}
    return found is not None and {**found, **ignored} == {**metadata, **ignored} and is_whole(path)


def is_whole(path: Path) -> bool:
    """Can the image be decoded, or have the latents their checksum?"""
    if path.suffix.lower() == ".safetensors":
        with opened(path, CHECKPOINT) as file:
            text = header_of(path, file).metadata["layout"]
            expected = parse_json(text, dict[str, Any], path).get(CHECKSUM)
            return expected in (None, hashlib.file_digest(file, "sha256").hexdigest())
    with suppress(InputError):
        if path.suffix.lower() in SUFFIXES:
            with opened_image(path, ANY_SIZE) as image:
                image.load()
        return True
    return False


class Timing(msgspec.Struct):
    """How long an image's steps took, without the first. memory: the GPU's, at most in use."""

    layout: Layout
    seconds: float
    memory: int


def keep_timing(settings: Settings, layout: Layout, ends: list[float]) -> None:
    """For --check, without prompts. ends: of steps, this image's last. The image is written, so
    no failure here ends a run."""
    ends = ends[-layout.steps :]
    if len(ends) < 2 or layout.controlnets or any(region.loras for region in layout.regions):
        return  # The cost of these isn't known.
    with suppress(Exception):
        regions = tuple(replace(region, prompt="x") for region in layout.regions)
        layout = replace(layout, prompt="", background_prompt="", loras=(), regions=regions)
        key = f"{conditions(settings)} {layout.width} x {layout.height}"
        found = {name: timing for name, timing in read_timings().items() if name != key}
        found[key] = Timing(layout, ends[-1] - ends[0], torch.cuda.max_memory_allocated())
        data = msgspec.json.encode(dict([*found.items()][-50:]))
        timings_file().parent.mkdir(parents=True, exist_ok=True)
        write(timings_file(), partial(Path.write_bytes, data=data))


def conditions(settings: Settings) -> str:
    """What a step's time depends on besides the layout."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    settings = replace(settings, model=settings.model or "pocket", prompt_cache=None, verbose=False)
    return f"{HOST} {gpu} {torch.get_num_threads()} {settings}"


def timings_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "regional_flux", "timings.json")


def read_timings() -> dict[str, Timing]:
    """By their conditions and sizes."""
    with suppress(InputError, RuntimeError):  # RuntimeError: the user has no home
        return parse_json(read_bytes(timings_file(), CONFIG), dict[str, Timing], timings_file())
    return {}
