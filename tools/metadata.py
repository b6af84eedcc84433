"""What a run writes: pictures that carry what made them, each file under a temporary name until it is whole."""

import glob
import hashlib
import json
import os
from collections.abc import Callable
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


EXIF_DESCRIPTION, EXIF_SOFTWARE = 0x010E, 0x0131


MAX_JPEG_EXIF = 65_000  # bytes; a JPEG's segments have 16-bit lengths


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, then rename: a file of the right name is always whole."""
    unfinished = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """What killed runs left of this file."""
    for file in path.parent.glob(f".{glob.escape(path.stem)}.*{path.suffix}"):
        if file.stem.removeprefix(f".{path.stem}.").isdecimal():  # and not .x.1.77.png for x.png
            file.unlink(missing_ok=True)


def check_writable(path: Path, overwrite: bool) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(path, MISSING, f"there is no folder {path.parent} to write it to")
    if len(os.fsencode(path.name)) > 200 or path.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(path, MISSING, "no file of this name can be written there")
    if path.exists() and not overwrite:
        raise InputError(path, MISSING, "exists already; choose another --output, or add --overwrite")


def settings(layout: Layout, seed: int, run: dict[str, Any]) -> dict[str, Any]:
    """All that made a picture, as JSON: the layout with every default filled in, hashes of the pictures it names, the
    seed, and of the run the model, its files and how they were given, dtype and torch."""
    files = [layout.map, *(r.mask for r in layout.regions), *(x.image for x in (*layout.loras, *layout.controlnets))]
    hashes = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files if file}
    return json.loads(json.dumps({**msgspec.to_builtins(layout), "seed": seed, **run, "pictures": hashes}))


def save_picture(image: Image.Image, made_by: dict[str, Any] | None, file: Path) -> None:
    """Write PNG, JPEG or WebP, with what made it: a line for people's tools (A1111's), and everything as JSON."""
    if made_by is None:
        image.save(file, quality=95)
        return
    line = (
        f"Steps: {made_by['steps']}, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: {made_by['guidance']}, "
        f"Seed: {made_by['seed']}, Size: {made_by['width']}x{made_by['height']}, Model: {made_by['model']}, "
        f"Base ratio: {made_by['base_ratio']}, Mask inject steps: {made_by['mask_inject_steps']}"
    )
    if file.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", f"{made_by['prompt']}\n{line}")
        info.add_text("layout", json.dumps(made_by, ensure_ascii=False))
        image.save(file, pnginfo=info)
        return
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(made_by)
    exif[EXIF_SOFTWARE] = line
    if file.suffix.lower() != ".webp" and len(exif.tobytes()) > MAX_JPEG_EXIF:
        warn(f"the layout's {len(exif.tobytes()):,} bytes don't fit into a JPEG; this one does not carry it")
        del exif[EXIF_DESCRIPTION]
    image.save(file, exif=exif, quality=95)


def save_json(made_by: dict[str, Any], path: Path) -> None:
    text = json.dumps(made_by, ensure_ascii=False, indent=1) + "\n"
    write(path, partial(Path.write_text, data=text, encoding="utf-8"))


def save_tensor(name: str, tensor: Tensor, made_by: dict[str, Any], path: Path) -> None:
    data = save({name: tensor.cpu().contiguous()}, {"layout": json.dumps(made_by)})
    write(path, partial(Path.write_bytes, data=data))  # save_file would write to a temporary name of its own choice


def made_of(path: Path) -> dict[str, Any]:
    """What a picture carries of how it was made, or what its side-car .json says. InputError where there is nothing."""
    try:
        if path.suffix.lower() == ".json":
            text = path.read_text(encoding="utf-8")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("layout")
        else:
            with Image.open(path) as image:
                text = image.info.get("layout") or image.getexif().get(EXIF_DESCRIPTION)
            side_car = path.with_suffix(".json")
            text = text or (side_car.read_text(encoding="utf-8") if side_car.exists() else None)
        made_by = json.loads(text or "null")
    except FileNotFoundError:
        raise InputError(path, MISSING, "there is no such file") from None
    except (OSError, ValueError, SyntaxError, SafetensorError, Image.DecompressionBombError) as error:
        raise InputError(path, MISSING, f"not a picture of this program that can be read ({error})") from None
    if not isinstance(made_by, dict) or not {"prompt", "seed", "model"} <= made_by.keys():
        raise InputError(path, MISSING, "carries nothing of how it was made; its settings are not known")
    return made_by


def carried_by(path: Path) -> dict[str, Any] | None:
    """The same, or None where there is nothing."""
    try:
        return made_of(path)
    except InputError:
        return None


def is_made_by(path: Path, made_by: dict[str, Any]) -> bool:
    """Is this a picture that is there, and made with these settings (by whatever version of torch, and however the
    model's files were given)?"""
    found, apart = carried_by(path) if path.exists() else None, {"torch": None, "given": None}
    return found is not None and {**found, **apart} == {**made_by, **apart}
