"""What checkpoint files store, by their headers: safetensors, single or in shards, and GGUF.

Headers are parsed here, not by safetensors' `safe_open`, so that all tensors share one mapping of
their file and a problem is reported in one sentence. Pickles are never read.
"""

import json
import math
import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from errors import MISSING, InputError
from formats.gguf import MAGIC, MAX_HEADER, QUANTIZED, dequantized, read_gguf

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = FLOATS | FP8 | {"U8": torch.uint8}
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # torch.save's zip file, and its older stream


class Stored(NamedTuple):
    """One tensor as its file's header describes it: bytes [start, stop) of the file, and the scale of an fp8 weight."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    scale: "Stored | None" = None


Tensors = dict[str, Stored]


class CheckpointFile(NamedTuple):
    """What is loaded together: one file, or all the shards of one index (then `path` is the index)."""

    path: Path
    tensors: Tensors
    metadata: dict[str, str]

    @property
    def config(self) -> dict:
        """The config.json beside the weights; {} if there is none."""
        path = self.path.parent / "config.json"
        return parse(path, path.read_bytes()) if path.is_file() else {}


def parse(path: Path, text: bytes) -> dict:
    """The JSON object that `path` holds in `text`."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise InputError(path, MISSING, f"damaged, expected a JSON object ({error}); download it again") from error


def read_header(path: Path) -> CheckpointFile:
    """What a file in either format stores. InputError if it is damaged, cut off or of another format."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start.startswith(MAGIC):
                entries, metadata = read_gguf(path)
                tensors = {key: Stored(path, key, *entry) for key, entry in entries.items()}
                return CheckpointFile(path, tensors, metadata)
            length = int.from_bytes(start, "little")
            text = file.read(min(length, MAX_HEADER))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(path, MISSING, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # of a GGUF file
        raise InputError(path, MISSING, f"{error}") from error
    refuse_other_formats(path, start + text[:64])
    if len(text) < length:
        raise InputError(path, MISSING, f"cut off inside the header, after {size:,} bytes; download it again")
    header = parse(path, text)
    metadata = header.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    try:
        tensors = {key: stored(path, key, entry, 8 + length) for key, entry in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(path, MISSING, "the safetensors header is damaged; download the file again") from error
    end = max((tensor.stop for tensor in tensors.values()), default=0)
    if size < end:
        raise InputError(path, MISSING, f"cut off, only {size:,} of {end:,} bytes are there; download it again")
    return CheckpointFile(path, tensors, metadata)


def refuse_other_formats(path: Path, start: bytes) -> None:
    """InputError unless a file begins like safetensors: a possible length, and a brace."""
    if start.startswith(b"version https://git-lfs"):
        raise InputError(path, MISSING, "a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    if start.startswith(PICKLE_STARTS) or path.suffix in PICKLES:
        raise InputError(path, MISSING, "pickled checkpoints can run code and are never read; use a safetensors file")
    if len(start) < 8 or int.from_bytes(start[:8], "little") > MAX_HEADER or start[8:9] not in (b"{", b""):
        raise InputError(path, MISSING, f"not a safetensors file, nor GGUF; it begins with {start[:16]!r}")


def stored(path: Path, key: str, entry: dict, data: int) -> Stored:
    """A header's entry, whose offsets count from byte `data`. ValueError if they contradict its shape."""
    begin, end = entry["data_offsets"]
    tensor = Stored(path, key, str(entry["dtype"]), tuple(entry["shape"]), data + begin, data + end)
    itemsize = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else None
    is_foreign = tensor.dtype.startswith(QUANTIZED)  # nobody has checked its size
    if begin < 0 or is_foreign or (itemsize and math.prod(tensor.shape) * itemsize != end - begin):
        raise ValueError(key)
    return tensor


def shards_of(index: Path) -> list[Path]:
    names = parse(index, index.read_bytes()).get("weight_map", {}).values()
    return [index.parent / name for name in sorted(set(names))]


def read_shards(index: Path) -> CheckpointFile:
    """All the shards that a `*.safetensors.index.json` names, as one file."""
    joined = CheckpointFile(index, {}, {})
    for shard in shards_of(index):
        if not shard.is_file():
            raise InputError(index, MISSING, f"the shard {shard.name} is missing beside it; download the folder again")
        file = read_header(shard)
        joined.tensors.update(file.tensors)
        joined.metadata.update(file.metadata)
    return joined


def checkpoint_files(place: Path) -> list[CheckpointFile]:
    """A file, or those at a folder's top level; an index with its shards counts as one."""
    if place.is_file():
        is_index = place.name.endswith(".safetensors.index.json")
        return [read_shards(place) if is_index else read_header(place)]
    indexes = sorted(place.glob("*.safetensors.index.json"))
    files = {*place.glob("*.safetensors"), *place.glob("*.sft")}
    files -= {shard for index in indexes for shard in shards_of(index)}
    for file in sorted(files):
        if re.search(r"-\d{5}-of-\d{5}\.", file.name):
            raise InputError(file, MISSING, "a shard without its *.safetensors.index.json; download the folder again")
    files |= {*place.glob("*.gguf")}
    return [read_shards(index) for index in indexes] + [read_header(file) for file in sorted(files)]


MAPPED: WeakValueDictionary[tuple, mmap.mmap] = WeakValueDictionary()  # by file and its state


def view(tensor: Stored) -> Tensor:
    """The tensor as it is stored, a copy-on-write view of its file, which all views have mapped together."""
    with open(tensor.file, "rb") as file:
        state = os.fstat(file.fileno())
        key = tensor.file, state.st_ino, state.st_mtime_ns, state.st_size
        whole = MAPPED.get(key) or MAPPED.setdefault(key, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    count = math.prod(tensor.shape)
    return torch.frombuffer(whole, dtype=DTYPES[tensor.dtype], offset=tensor.start, count=count).reshape(tensor.shape)


def read(tensor: Stored) -> Tensor:
    """The tensor as it is stored, to be converted or moved: only its own pages are mapped, and they
    are unmapped with it, so that it is never held in memory twice."""
    page = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with open(tensor.file, "rb") as file:
        view = mmap.mmap(file.fileno(), tensor.stop - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(view, dtype=DTYPES[tensor.dtype], offset=tensor.start - page).reshape(tensor.shape)


def read_bytes(tensor: Stored) -> Tensor:
    return read(tensor._replace(dtype="U8", shape=(-1,)))


def values(tensor: Stored, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The numbers that a stored tensor stands for."""
    if tensor.dtype.startswith(QUANTIZED):
        return dequantized(read_bytes(tensor), tensor.dtype, tensor.shape, dtype).to(device)
    # Apple's GPUs know neither FP8 nor float64
    place = "cpu" if torch.device(device).type == "mps" else device
    numbers = read(tensor).to(place)
    if tensor.scale is not None:
        scale = read(tensor.scale).to(place).float()
        numbers = numbers.float() * scale.reshape(-1, *[1] * (numbers.ndim - 1))
    return numbers.to(dtype).to(device)


def whole(tensor: Stored, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """All of a stored tensor; a view of its file where nothing has to be converted or moved."""
    is_ready = DTYPES.get(tensor.dtype) == dtype and tensor.scale is None
    if is_ready and torch.device(device).type == "cpu":
        return view(tensor)
    return values(tensor, device, dtype)
