"""What a run writes: images with their metadata, and every file whole or not at all."""

import glob
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from errors import MISSING, InputError, warn
from regional.layout import Layout

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EXIF_DESCRIPTION = 0x010E
EXIF_SOFTWARE = 0x0131
MAX_JPEG_EXIF = 65_000  # bytes: the segments of a JPEG file have 16-bit lengths
UNREADABLE = (OSError, ValueError, SyntaxError, SafetensorError, Image.DecompressionBombError)

Metadata = dict[str, Any]


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, then rename: a file is whole or not there."""
    unfinished = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove the temporary files that killed runs left of this file."""
    for file in path.parent.glob(f".{glob.escape(path.stem)}.*{path.suffix}"):
        number = file.stem.removeprefix(f".{path.stem}.")
        if number.isdecimal():  # and not .x.1.77.png for x.png
            file.unlink(missing_ok=True)


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


def image_metadata(layout: Layout, seed: int, run: Metadata) -> Metadata:
    """All that determines an image, as JSON; layout: filled in; run: Pipeline.metadata."""
    files = [layout.map, *(region.mask for region in layout.regions)]
    files += [entry.image for entry in (*layout.loras, *layout.controlnets)]
    hashes = {}
    for file in filter(None, files):
        hashes[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    keys = msgspec.to_builtins(layout)
    return json.loads(json.dumps({**keys, "seed": seed, **run, "pictures": hashes}))


def save_image(image: Image.Image, metadata: Metadata | None, path: Path) -> None:
    """Write PNG, JPEG or WebP with metadata: a line that other tools read, and all as JSON."""
    how = {} if metadata is None else embedded(metadata, path.suffix.lower())
    write(path, partial(image.save, quality=95, **how))


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
    data = save({name: tensor.cpu().contiguous()}, {"layout": json.dumps(metadata)})
    write(path, partial(Path.write_bytes, data=data))


def read_metadata(path: Path) -> Metadata:
    """The metadata of an image, of latents, or of a .json. InputError if there are none."""
    try:
        metadata = json.loads(metadata_text(path) or "null")
    except UNREADABLE as error:
        raise InputError(path, MISSING, f"its metadata can't be read ({error})") from None
    if not isinstance(metadata, dict) or not {"prompt", "seed", "model"} <= metadata.keys():
        raise InputError(path, MISSING, "contains no generation metadata")
    return metadata


def metadata_text(path: Path) -> str | None:
    if path.suffix.lower() == ".json":
        return path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("layout")
    with Image.open(path) as image:
        text = image.info.get("layout") or image.getexif().get(EXIF_DESCRIPTION)
    side_car = path.with_suffix(".json")
    return text or (side_car.read_text(encoding="utf-8") if side_car.exists() else None)


def metadata_in(path: Path) -> Metadata | None:
    with suppress(InputError):
        return read_metadata(path)


def matches(path: Path, metadata: Metadata) -> bool:
    """Was this file made with these settings, by any version of torch?"""
    found = metadata_in(path)
    ignored = {"torch": None, "given": None}
    return found is not None and {**found, **ignored} == {**metadata, **ignored}
