"""From the metadata of a file to settings and a layout, or to its image: where models and
pictures are now, whether they are to be trusted, and whether they are still the same."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from errors import MISSING, InputError, describe, shown
from formats.hub import is_cached, is_repository
from formats.safetensors import read, read_header
from regional.layout import SHAPES, Layout
from regional.reader import read_layout
from settings import MODEL_KEYS, Settings, invalid
from tools.compare import check_kept, is_whole, matches
from tools.flags import Output, naming
from tools.jobs import check_output, fill, templates
from tools.metadata import (
    FILE_KEYS,
    ROOT,
    Metadata,
    check_suffix,
    check_writable,
    checksum,
    names_in,
    read_metadata,
    run_metadata,
    save_image,
    with_names,
)

MOST = 1024  # rows and columns of latents: 8192 pixels


def replayed(
    output: Output, given: dict[str, Any], overrides: dict[str, Any], argv: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings, except those given, and the layout's keys that a file records. Of latents,
    which are drawn already, only the settings have to be there."""
    file = output.decode or output.config_from_metadata
    metadata = located(read_metadata(file), file.parent)
    settings = repeated(metadata, given, file)
    defaults = msgspec.to_builtins(Layout(prompt=""))  # of keys that earlier versions lacked
    keys = defaults | {key: metadata[key] for key in defaults if key in metadata}
    named = {key: settings[key] for key in FILE_KEYS if key in settings.keys() - given}
    if not output.decode:
        named |= {key: keys[key] for key in keys.keys() - overrides}
    if output.decode:
        named |= pasting(keys)
    if output.repaint:  # The image itself takes the place of the one that it started from.
        check_regions("--repaint", output.repaint, keys)
        named.pop("image", None)
    if not output.trust_metadata:
        check_trust(file, named, argv)
    check_inputs(file, metadata, named)
    return settings, with_prompts(keys, output.region_prompt)


def with_prompts(keys: dict[str, Any], given: tuple[str, ...]) -> dict[str, Any]:
    """The recorded layout with other prompts of regions, given as I TEXT, I TEXT ..."""
    if len(given) % 2:
        raise InputError("--region-prompt", given[-1], "expected a region's index and a prompt")
    for index, prompt in zip(given[::2], given[1::2]):
        check_regions("--region-prompt", [index], keys)
        keys["regions"][int(index)]["prompt"] = prompt
    return keys


def check_regions(flag: str, indices: Iterable[int | str], keys: dict[str, Any]) -> None:
    """InputError for an index that is none of a recorded layout's regions."""
    regions = keys.get("regions")
    count = len(regions) if isinstance(regions, list) else 0
    for index in indices:
        if not (str(index).isdecimal() and int(index) < count):
            raise InputError(flag, index, f"the image has {count} regions, counted from 0")


def pasting(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recorded layout that say what it repaints of which image; none without."""
    image = keys.get("image")
    area = image.get("repaint") if isinstance(image, dict) else None
    if not area:
        return {}
    needed = ["prompt", "width", "height", "image"]
    found = {key: keys[key] for key in needed if key in keys}
    if isinstance(area, dict) and area.get("regions"):
        found["map"] = keys.get("map")
        shape = ("prompt", *SHAPES)
        found["regions"] = [
            {key: region[key] for key in shape if key in region} for region in keys.get("regions") or ()
        ]
    return found


def located(metadata: Metadata, folder: Path) -> Metadata:
    """Metadata of a file in this folder with paths from the working directory. Earlier versions
    recorded those, but the pictures may have moved together with the image."""
    is_portable = "inputs" in metadata

    def change(key: str, name: str) -> str:
        place = folder / name
        is_path = name.startswith(".") if is_portable else os.path.exists(place)
        if name == "pocket" or not is_path:
            return name
        is_plain = place.is_absolute() or str(place).startswith(".")
        return str(place) if is_plain else f"./{place}"  # never taken for a repository

    return with_names(metadata, change)


def repeated(metadata: Metadata, given: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings that an image records, except those given; the reverse of `run_metadata`."""
    files = metadata.get("given")
    files = files if isinstance(files, dict) else {"model": metadata["model"]}
    dtype = str(metadata.get("dtype", "auto"))
    settings = {
        **{key: str(value) for key, value in files.items() if key in FILE_KEYS},
        "dtype": dtype.removeprefix("torch."),
        "attention": metadata.get("attention", "auto"),
        "quantize": "fp8" if metadata.get("fp8") is True else "none",
        "compile": metadata.get("compile") is True,
    }
    try:
        msgspec.convert(settings, Settings)
    except msgspec.ValidationError as error:
        problem = f"in its metadata, {invalid(settings, error)}"
        raise InputError(file, MISSING, problem) from None
    for key in MODEL_KEYS if given.keys() & set(MODEL_KEYS) else ():
        settings.pop(key, None)  # Files of one model are not mixed with another's.
    return settings | given


def check_trust(file: Path, named: dict[str, Any], argv: list[str]) -> None:
    """InputError if an image's metadata, which may be a stranger's, name what is not here yet or
    lies elsewhere than the image, the working directory and the program."""
    folders = [file.resolve().parent, Path.cwd().resolve(), ROOT]
    for key, name in names_in(named):
        repository = name.partition(":")[0]
        if is_repository(repository):
            if is_cached(repository):
                continue
            danger = "would be downloaded"
        else:
            place = Path(os.path.realpath(name.partition("\0")[0]))  # No file has a name with NUL.
            if name == "pocket" or any(place.is_relative_to(folder) for folder in folders):
                continue
            danger = "is in none of the image's folder, the current one and the program's"
        command = shlex.join([*argv, "--trust-metadata"])
        problem = f"its metadata name {key} = {describe(name)}, which {danger}"
        raise InputError(file, MISSING, f"{problem}; to allow that: python generate.py {command}")


def check_inputs(file: Path, metadata: Metadata, named: dict[str, Any]) -> None:
    """InputError for a picture or a model that is gone or changed since the image was made."""
    sums = metadata.get("inputs", metadata.get("pictures"))
    sums = sums if isinstance(sums, dict) else {}
    for key, name in names_in(named):
        problem = ""
        if not os.path.exists(name):
            if name in sums or name.startswith(".") or os.path.isabs(name):
                problem = "is not there any more"
        elif name in sums and checksum(key, name)[:16] != str(sums[name])[:16]:
            problem = "has changed since the image was made"
        if problem:
            problem = f"it was made with {key} = {shown(name)}, which {problem}"
            raise InputError(file, MISSING, problem)


def decode(pipeline: Any, output: Output) -> None:
    """Write the image of --decode, with the metadata of its latents and this run's VAE."""
    file = output.decode
    latents = read_latents(file)
    layout = None
    defaults = msgspec.to_builtins(Layout(prompt=""))
    metadata = defaults | located(read_metadata(file), file.parent)
    if keys := pasting(metadata):
        with naming(file, {}):
            layout = read_layout(None, keys)
    run = run_metadata(pipeline)
    for key in {"files", "inputs", "given"} & metadata.keys():
        if "ae" in run[key] and isinstance(metadata[key], dict):
            metadata[key] |= {"ae": run[key]["ae"]}
    is_fixed = output.output or output.overwrite or output.update
    names = [output.output or "{name}.png"] if is_fixed else templates()
    paths = (fill(file.stem, (), metadata["seed"], name, has_seeds=False) for name in names)
    path = next(x for x in paths if is_fixed or not x.exists() or matches(x, metadata))
    check_suffix("--output", path)
    check_output("--output", path, {os.path.realpath(file): "latents"})
    check_writable(path, overwrite=True)
    is_new = output.overwrite or not path.exists()
    if is_new or not check_kept(path, metadata, output):
        save_image(pipeline.decode(latents, layout), None if output.no_metadata else metadata, path)
    print(shown(path))


def read_latents(file: Path) -> Tensor:
    check_suffix("--decode", file, (".safetensors",))
    found = read_header(file).tensors.get("latents")
    is_good = found and found.dtype == "F32" and len(found.shape) == 4
    if not is_good or found.shape[:2] != (1, 16) or max(found.shape) > MOST:
        raise InputError(file, MISSING, "holds no latents such as --save-latents writes")
    if not is_whole(file):
        raise InputError(file, MISSING, "its latents are damaged, as their checksum says")
    return read(found)
