"""What files of tensors store, by their headers: safetensors, single or in shards, and GGUF. Pickles are never read."""

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
from formats.gguf import MAGIC, QUANTISED, read_gguf

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


DTYPES = FLOATS | FP8 | {"U8": torch.uint8}


MAX_HEADER = 100_000_000  # bytes; the format's own limit


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


class Pile(NamedTuple):
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


def read_header(path: Path) -> Pile:
    """What a file stores, GGUF or safetensors: the header's length in 8 bytes, the header in JSON, then the data."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if start.startswith(MAGIC):
                tensors, metadata = read_gguf(path)
                return Pile(path, {key: Stored(path, key, *entry) for key, entry in tensors.items()}, metadata)
            length = int.from_bytes(start, "little")
            text = file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise InputError(path, MISSING, f"cannot be read ({error.strerror})") from error
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
    return Pile(path, tensors, metadata)


def refuse_other_formats(path: Path, start: bytes) -> None:
    """InputError unless a file begins like safetensors: a length that is possible, and a brace."""
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
    foreign = tensor.dtype.startswith(QUANTISED)  # whose size nobody has checked
    if begin < 0 or foreign or (itemsize and math.prod(tensor.shape) * itemsize != end - begin):
        raise ValueError(key)
    return tensor


def shards_of(index: Path) -> list[Path]:
    names = parse(index, index.read_bytes()).get("weight_map", {}).values()
    return [index.parent / name for name in sorted(set(names))]


def read_shards(index: Path) -> Pile:
    """All the shards that a `*.safetensors.index.json` names, as one pile."""
    pile = Pile(index, {}, {})
    for shard in shards_of(index):
        if not shard.is_file():
            raise InputError(index, MISSING, f"the shard {shard.name} is missing beside it; download the folder again")
        part = read_header(shard)
        pile.tensors.update(part.tensors)
        pile.metadata.update(part.metadata)
    return pile


def piles_in(place: Path) -> list[Pile]:
    """A file's pile, or those at a folder's top: an index with its shards is one, any other file with tensors too."""
    if place.is_file():
        return [read_shards(place) if place.name.endswith(".safetensors.index.json") else read_header(place)]
    indexes = sorted(place.glob("*.safetensors.index.json"))
    files = {*place.glob("*.safetensors"), *place.glob("*.sft")}
    files -= {shard for index in indexes for shard in shards_of(index)}
    for file in sorted(files):
        if re.search(r"-\d{5}-of-\d{5}\.", file.name):
            raise InputError(file, MISSING, "a shard without its *.safetensors.index.json; download the folder again")
    files |= {*place.glob("*.gguf")}
    return [read_shards(index) for index in indexes] + [read_header(file) for file in sorted(files)]


MAPPED: WeakValueDictionary[tuple, mmap.mmap] = WeakValueDictionary()  # files that there are views of, in which state


def view(tensor: Stored) -> Tensor:
    """The tensor as it is stored, a copy-on-write view of its file, which all views have mapped together."""
    with open(tensor.file, "rb") as file:
        state = os.fstat(file.fileno())
        key = tensor.file, state.st_ino, state.st_mtime_ns, state.st_size
        whole = MAPPED.get(key) or MAPPED.setdefault(key, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    count = math.prod(tensor.shape)
    return torch.frombuffer(whole, dtype=DTYPES[tensor.dtype], offset=tensor.start, count=count).reshape(tensor.shape)


def read(tensor: Stored) -> Tensor:
    """The tensor as it is stored, to be converted or moved: only its own pages are mapped, and they are unmapped with
    it, so that it is never held in memory twice."""
    page = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with open(tensor.file, "rb") as file:
        view = mmap.mmap(file.fileno(), tensor.stop - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(view, dtype=DTYPES[tensor.dtype], offset=tensor.start - page).reshape(tensor.shape)


def read_bytes(tensor: Stored) -> Tensor:
    return read(tensor._replace(dtype="U8", shape=(-1,)))
