"""What a run writes: images with their metadata, and every file whole or not at all.

Metadata name models and pictures by paths from the folder of the file that holds them. In
memory, paths are from the working directory: `portable` and `tools.replay` convert them.
"""

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
from functools import cache, partial
from pathlib import Path
from typing import Any

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
from formats.hub import redux_place
from formats.safetensors import read_header
from regional.layout import Layout, Seed
from settings import MODEL_KEYS, Settings

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # several may write to one folder
DAY = 86400  # seconds
EXIF_DESCRIPTION = 0x010E
EXIF_SOFTWARE = 0x0131
MAX_JPEG_EXIF = 65_000  # bytes: the segments of a JPEG file have 16-bit lengths
SHEET = "contact sheet"
SAMPLERS = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}  # in other programs
CHECKSUM = "sha256"  # of a tensor, among the metadata of its file
ANY_SIZE = 10**9  # pixels
PICTURES = ("map", "mask", "image", "control_image")  # keys of layouts
FILE_KEYS = (*MODEL_KEYS, "redux")
NAMES = (*FILE_KEYS, *PICTURES, "file")  # keys of models and files in layouts and settings
PARTS = ("given", "regions", "loras", "controlnets")  # the keys below which there are such
PARTS = (*PARTS, "image", "repaint", "image_prompts", "references")
PICTURE = rf"({'|'.join(PICTURES)}|image\.file|image_prompts\[\d+\]\.file|references\[\d+\])$"
WHOLE = 2**26  # bytes; of a larger model's file samples are read
SAMPLES = 64  # of 4 kB
FOLDERS = ("model", "sampler", "regional", "formats", "extensions", "runtime")
SOURCE = ("pipeline.py", "weights.py", *(f"{folder}/*.py" for folder in FOLDERS))
ROOT = Path(__file__).resolve().parents[1]

Metadata = dict[str, Any]


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Save under a temporary name, then rename: a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """InputError if the file can't be written, or exists and is not to be overwritten. Folders
    that are not there are made later."""
    folder = path.absolute().parent
    while not os.path.exists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(path, MISSING, f"{folder} is no folder to write it to")
    name = os.fsencode(path.name)
    is_other = os.path.exists(path) and not os.path.isfile(path)
    if len(name) > 200 or is_other or not os.access(folder, os.W_OK):
        raise InputError(path, MISSING, "no file of this name can be written there")
    if path.exists() and not overwrite:
        raise InputError(path, MISSING, "exists already; --overwrite replaces it")


@cache
def source_hash() -> str:
    """Of the program's files that an image depends on."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCE for file in ROOT.glob(pattern)):
        digest.update(file.relative_to(ROOT).as_posix().encode() + read_bytes(file, CONFIG))
    return digest.hexdigest()[:16]


@cache
def fingerprint(*files: Path) -> str:
    """Of a model's files: a checksum of their sizes and contents, of large ones in samples."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with opened(file, CHECKPOINT) as data:
            size = os.fstat(data.fileno()).st_size
            digest.update(f"{size} ".encode())
            for i in range(SAMPLES):
                data.seek(size * i // SAMPLES)
                digest.update(data.read(4096 if size > WHOLE else size // SAMPLES + 1))
    return digest.hexdigest()[:16]


def checksum(key: str, name: str) -> str:
    """Of what a layout names by this key: a picture's sha256, a model's fingerprint."""
    if is_picture(key):
        return hashlib.sha256(read_bytes(name, IMAGE)).hexdigest()
    path = Path(name)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    return fingerprint(*(file for file in files if file.is_file()))


def is_picture(key: str) -> bool:
    return re.search(rf"(^|\.){PICTURE}", key) is not None


def run_metadata(pipeline: Any) -> Metadata:
    """What images record of how a pipeline makes them; tools.replay has the reverse."""
    settings = pipeline.settings
    checkpoint = pipeline.checkpoint
    sources = {part: getattr(checkpoint, part) for part in MODEL_KEYS[1:]}
    given = {key: getattr(settings, key) for key in FILE_KEYS}
    attention = pipeline.attention or settings.attention.replace("auto", "")
    found = {
        "model": checkpoint.name,
        "files": {part: source.path.name for part, source in sources.items()},
        "dtype": str(pipeline.dtype),
        "torch": torch.__version__,
        "fp8": pipeline.fp8,
        "compile": settings.compile,
        "processes": pipeline.parallel and pipeline.parallel.size,
        "attention": getattr(attention, "__qualname__", str(attention)),
        "source": source_hash(),
    }
    inputs = {}
    for part, source in sources.items():
        inputs[part] = fingerprint(*{tensor.file for tensor in source.tensors.values()})
    given = {key: value for key, value in given.items() if value}
    found = {key: value for key, value in found.items() if value}
    return found | {"given": given, "inputs": inputs}


def image_metadata(layout: Layout, seed: int, pipeline: Any, file: str | None) -> Metadata:
    """All that determines an image, as JSON. file: the layout's name. inputs: checksums of what
    it names."""
    keys = msgspec.to_builtins(layout.filled(pipeline.defaults))
    run = run_metadata(pipeline)
    inputs = dict(run["inputs"])
    if any(part.image_prompts for part in (layout, *layout.regions)):
        place = redux_place(pipeline.checkpoint.name, pipeline.settings.redux)
        run["files"] |= {"redux": place.name}
        inputs["redux"] = fingerprint(*(place.rglob("*.safetensors") if place.is_dir() else [place]))
    for key, name in names_in(keys):
        if is_picture(key) or os.path.exists(name):
            inputs[name] = checksum(key, name)
    found = {**keys, "seed": seed, **run, "layout_file": file, "inputs": inputs}
    return json.loads(json.dumps(found))


def with_names(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A layout, settings or metadata with each name of a model or a file changed."""
    if isinstance(value, list | tuple):
        return [with_names(part, change, f"{key}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, str) and key.endswith("]") and is_picture(key):
        return change(key, value)
    if not isinstance(value, dict) or len(key) > 100:  # or nested without end
        return value
    found = {}
    for name, part in value.items():
        place = f"{key}.{name}".lstrip(".")
        if name in NAMES and isinstance(part, str):
            part = change(place, part)
        found[name] = with_names(part, change, place) if name in PARTS else part
    for sums in {"inputs", "pictures"} & found.keys():
        if isinstance(found[sums], dict):
            found[sums] = {change(name, name): value for name, value in found[sums].items()}
    return found


def names_in(value: Any) -> list[tuple[str, str]]:
    """The models and files that a layout or settings name, by their keys."""
    found = []
    with_names(value, lambda *entry: found.append(entry))
    return found


def portable(metadata: Metadata, folder: Path) -> Metadata:
    """Metadata for a file in this folder: paths start there, with a dot; what does not is a
    repository of the hub, or pocket."""

    def relative(key: str, name: str) -> str:
        is_path = name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)
        is_part = key == name and name in FILE_KEYS  # whose checksum it is
        if name == "pocket" or is_part or not is_path:
            return name
        path = Path(name).expanduser()
        real = os.path.realpath(path)
        with suppress(ValueError):  # Windows: on another drive
            found = os.path.relpath(path, folder)
            if os.path.realpath(folder / found) != real:  # .. leads elsewhere from a link
                found = os.path.relpath(real, os.path.realpath(folder))
            found = Path(found).as_posix()
            return found if found.startswith("..") else f"./{found}"
        return real

    return with_names(metadata, relative)


def save_image(image: Image.Image, metadata: Metadata | None, path: Path) -> None:
    """Write PNG, JPEG or WebP with metadata: a line that other tools read, and all as JSON."""
    how = {}
    if metadata is not None:
        how = embedded(portable(metadata, path.parent), path.suffix.lower())
    write(path, partial(image.save, quality=95, **how))


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """A contact sheet, which says what it is: it may be made again."""
    exif = Image.Exif()
    exif[EXIF_SOFTWARE] = SHEET
    write(path, partial(sheet.save, exif=exif))


def is_sheet(path: Path) -> bool:
    with suppress(InputError), opened_image(path, ANY_SIZE) as image:
        is_old = SHEET in image.info  # as earlier versions wrote PNG
        return is_old or image.getexif().get(EXIF_SOFTWARE) == SHEET
    return False


def embedded(metadata: Metadata, suffix: str) -> dict[str, Any]:
    """Pillow's arguments."""
    sampler = metadata.get("sampler", "euler")
    line = (
        "Steps: {steps}, Sampler: {name}, CFG scale: 1, Distilled CFG Scale: {guidance}, "
        "Seed: {seed}, Size: {width}x{height}, Model: {model}, Base ratio: {base_ratio}, "
        "Mask inject steps: {mask_inject_steps}"
    ).format_map(metadata | {"name": SAMPLERS.get(sampler, sampler)})
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
    metadata = portable(metadata, path.parent)
    text = json.dumps(metadata, ensure_ascii=False, indent=1) + "\n"
    write(path, partial(Path.write_text, data=text, encoding="utf-8"))


def save_tensor(name: str, tensor: Tensor, metadata: Metadata, path: Path) -> None:
    """A safetensors file with the metadata and a checksum of the numbers."""
    tensor = tensor.cpu().contiguous()
    checksum = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    metadata = portable(metadata, path.parent) | {CHECKSUM: checksum}
    data = save({name: tensor}, {"layout": json.dumps(metadata)})
    write(path, partial(Path.write_bytes, data=data))


class Recorded(msgspec.Struct):
    """What metadata have at least."""

    prompt: str
    seed: Seed
    model: str


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
        return read_header(path).metadata.get("layout")
    with opened_image(path, ANY_SIZE) as image:
        text = image.info.get("layout") or image.getexif().get(EXIF_DESCRIPTION)
    side_car = path.with_suffix(".json")
    if text is None and side_car.exists():
        return read_text(side_car, CONFIG)
    return text if isinstance(text, str) else None


def metadata_in(path: Path) -> Metadata | None:
    with suppress(InputError):
        return read_metadata(path)


class Timing(msgspec.Struct):
    """How long an image's steps took, without the first. memory: the GPU's, at most in use."""

    layout: Layout
    seconds: float
    memory: int


def keep_timing(settings: Settings, layout: Layout, seconds: float) -> None:
    """For --check, without prompts. seconds: of the steps after the first. The image is written,
    so no failure here ends a run."""
    parts = (layout, *layout.regions)
    more = [part.image_prompts or part.references for part in parts]
    more += [layout.controlnets, *(region.loras for region in layout.regions)]
    if layout.run_steps() < 2 or any(more):
        return  # The cost of these isn't known.
    with suppress(Exception):
        no_words = {"prompt": "x", "negative_prompt": ""}
        regions = tuple(replace(region, **no_words) for region in layout.regions)
        layout = replace(layout, **no_words, background_prompt="", loras=(), regions=regions)
        key = f"{conditions(settings)} {layout.width} x {layout.height}"
        found = read_timings()
        found.pop(key, None)  # The latest is the last.
        found[key] = Timing(layout, seconds, torch.cuda.max_memory_allocated())
        data = msgspec.json.encode(dict([*found.items()][-50:]))
        timings_file().parent.mkdir(parents=True, exist_ok=True)
        write(timings_file(), partial(Path.write_bytes, data=data))


def conditions(settings: Settings) -> str:
    """What a step's time depends on besides the layout."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    model = settings.model or "pocket"
    settings = replace(settings, model=model, prompt_cache=None, verbose=False)
    return f"{HOST} {gpu} {torch.get_num_threads()} {settings}"


def timings_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "regional_flux", "timings.json")


def read_timings() -> dict[str, Timing]:
    """By their conditions and sizes."""
    with suppress(InputError, RuntimeError):  # RuntimeError: the user has no home
        file = timings_file()
        return parse_json(read_bytes(file, CONFIG), dict[str, Timing], file)
    return {}
