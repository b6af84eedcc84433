"""Latents that --save-latents wrote, drawn."""

import os
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from errors import MISSING, InputError, shown
from formats.safetensors import read, read_header
from regional.layout import Layout
from tools.compare import is_whole, matches
from tools.flags import Output
from tools.jobs import Job, check_output, fill, is_finished, templates
from tools.metadata import Metadata, check_suffix, read_metadata, save_image
from tools.replay import located

MOST = 1024  # rows and columns of latents: 8192 pixels


def decode(pipeline: Any, output: Output, run: Metadata) -> None:
    """Write the image of --decode with the metadata of its latents. run: `run_metadata`."""
    file = output.decode
    latents = read_latents(file)
    metadata = metadata_of(file, run)
    is_fixed = output.output or output.overwrite or output.update
    names = [output.output or "{name}.png"] if is_fixed else templates()
    paths = (fill(file.stem, (), metadata["seed"], name, has_seeds=False) for name in names)
    path = next(x for x in paths if is_fixed or not x.exists() or matches(x, metadata))
    check_suffix("--output", path)
    check_output("--output", path, {os.path.realpath(file): "latents"})
    job = Job(file, None, metadata["seed"], (), {"image": path}, None)
    if not is_finished(job, output, metadata):
        save_image(pipeline.decode(latents), None if output.no_metadata else metadata, path)
    print(shown(path))


def metadata_of(file: Path, run: Metadata) -> Metadata:
    """What the latents record, with the VAE of this run."""
    defaults = msgspec.to_builtins(Layout(prompt=""))
    metadata = defaults | located(read_metadata(file), file.parent)
    for key in "files", "inputs", "given":
        if "ae" in run[key]:
            found = metadata.get(key)
            metadata[key] = {**(found if isinstance(found, dict) else {}), "ae": run[key]["ae"]}
    return metadata


def read_latents(file: Path) -> Tensor:
    check_suffix("--decode", file, (".safetensors",))
    found = read_header(file).tensors.get("latents")
    is_good = found and found.dtype == "F32" and len(found.shape) == 4
    if not is_good or found.shape[:2] != (1, 16) or max(found.shape) > MOST:
        raise InputError(file, MISSING, "holds no latents such as --save-latents writes")
    if not is_whole(file):
        raise InputError(file, MISSING, "its latents are damaged, as their checksum says")
    return read(found)
