"""Prompt embeddings that a folder keeps for other runs."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError
from formats.safetensors import read, read_header


def cached(
    folder: Path, name: str, depends_on: list, device: torch.device, encode: Callable[[], Tensor]
) -> Tensor:  # fmt: skip
    """What `encode` gives, from a file named by a hash of all it depends on."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    depends_on = [*depends_on, where, torch.__version__, torch.get_num_threads()]
    text = json.dumps(depends_on, default=state_of).encode()
    file = folder / f"{name}-{hashlib.sha256(text).hexdigest()}.safetensors"
    if file.exists():
        with suppress(InputError, KeyError):  # A broken file is written again.
            return read(read_header(file).tensors["states"])
    states = encode()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_stem(f".{file.stem}.{os.getpid()}")
    save_file({"states": states.contiguous()}, unfinished)
    unfinished.replace(file)
    return states


def state_of(files: Path | set[Path]) -> list[Any]:
    """What tells whether a file, or one of several, changed."""
    if isinstance(files, set):
        return sorted(state_of(file) for file in files)
    about = files.stat()
    return [str(files.resolve()), about.st_size, about.st_mtime_ns]
