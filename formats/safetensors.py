"""What checkpoint files store, by their headers: safetensors, single or in shards, and GGUF.

Headers are parsed here, not by safetensors' `safe_open`, so that all tensors share one mapping
of their file and problems are reported in one sentence. Pickles are never read.
"""

import math
import mmap
import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from errors import (
    CHECKPOINT,
    CONFIG,
    HEADER,
    MISSING,
    Count,
    InputError,
    converted,
    describe,
    mapped,
    opened,
    parse_json,
    parsed,
    read_bytes,
)
from formats.gguf import MAGIC, QUANTIZED, dequantized, read_gguf

FLOATS = {"F64": torch.double, "F32": torch.float, "F16": torch.half, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = FLOATS | FP8 | {"U8": torch.uint8}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # torch.save's zip file, its older stream
AGAIN = "download it again"
DAMAGED = f"the safetensors header is damaged; {AGAIN}"


class Stored(NamedTuple):
    """A tensor as a header describes it: bytes [start, stop) of the file, and its FP8 scale."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    scale: "Stored | None" = None

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS | FP8 or self.dtype.startswith(QUANTIZED)


Tensors = dict[str, Stored]


class CheckpointFile(NamedTuple):
    """What is loaded together: a file, or all shards of an index (then `path` is the index)."""

    path: Path
    tensors: Tensors
    metadata: dict[str, str]

    @property
    def config(self) -> dict:
        """The config.json next to the weights; {} if there is none."""
        path = self.path.parent / "config.json"
        return parse_json(read_bytes(path, CONFIG), dict, path) if path.exists() else {}


def wrong(path: Path, problem: str) -> InputError:
    return InputError(path, MISSING, problem)


class Entry(msgspec.Struct):
    """A tensor in a safetensors header; offsets count from the header's end."""

    dtype: str
    shape: Annotated[list[Count], msgspec.Meta(max_length=8)]
    data_offsets: tuple[Count, Count]


class Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_header(path: Path) -> CheckpointFile:
    """What a file in either format stores. InputError if it is damaged or of another format."""
    with opened(path, CHECKPOINT) as file:
        start = file.read(8)
        if start.startswith(MAGIC):
            with mapped(file) as data:
                what = "not a GGUF file that can be read"
                entries, metadata = parsed(read_gguf, data, path, what)
            tensors = {key: Stored(path, key, *entry) for key, entry in entries.items()}
            return CheckpointFile(path, tensors, metadata)
        length = int.from_bytes(start, "little")
        text = file.read(min(length, HEADER))
        size = os.fstat(file.fileno()).st_size
    refuse_other_formats(path, start + text[:64])
    if len(text) < length:
        raise wrong(path, f"cut off inside the header, after {size:,} bytes; {AGAIN}")
    header = parse_json(text, dict[str, Any], path)
    metadata = converted(header.pop("__metadata__", {}), dict[str, str], path, DAMAGED)
    entries = converted(header, dict[str, Entry], path, DAMAGED)
    tensors = {key: stored(path, key, entry, 8 + length) for key, entry in entries.items()}
    end = max((tensor.stop for tensor in tensors.values()), default=0)
    if size < end:
        raise wrong(path, f"cut off, only {size:,} of {end:,} bytes are there; {AGAIN}")
    return CheckpointFile(path, tensors, metadata)


def refuse_other_formats(path: Path, start: bytes) -> None:
    """InputError unless a file begins like safetensors: a possible length, and a brace."""
    if start.startswith(b"version https://git-lfs"):
        raise wrong(path, "a git-lfs pointer, not the file itself; run `git lfs pull`")
    if start.startswith(PICKLE_STARTS):
        raise wrong(path, "pickled checkpoints can run code and are never read")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > HEADER or start[8:9] not in (b"{", b""):
        raise wrong(path, f"not a safetensors file, nor GGUF; it begins with {start[:16]!r}")


def stored(path: Path, key: str, entry: Entry, data: int) -> Stored:
    """A header's entry; offsets count from byte `data`. InputError if they contradict its shape."""
    begin, end = entry.data_offsets
    dtype = DTYPES.get(entry.dtype)
    is_foreign = entry.dtype.startswith(QUANTIZED)  # Nobody has checked its size.
    count = math.prod(entry.shape)
    fits = count * dtype.itemsize == end - begin if dtype else count <= 8 * (end - begin)
    if is_foreign or count == 0 or not fits:
        problem = f"the safetensors header is damaged, {key} is not of its shape's size"
        raise wrong(path, f"{problem}; {AGAIN}")
    return Stored(path, key, entry.dtype, tuple(entry.shape), data + begin, data + end)


def shards_of(index: Path) -> list[Path]:
    names = parse_json(read_bytes(index, CONFIG), Index, index).weight_map.values()
    for name in set(names):
        if not re.fullmatch(r"[\w.-]{1,200}", name):
            raise wrong(index, f"{describe(name)} is not the name of a file next to it")
    return [index.parent / name for name in sorted(set(names))]


def read_shards(index: Path) -> CheckpointFile:
    """All the shards that a `*.safetensors.index.json` names, as one file."""
    joined = CheckpointFile(index, {}, {})
    for shard in shards_of(index):
        if not shard.is_file():
            raise wrong(index, f"the shard {shard.name} is missing next to it; {AGAIN}")
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
            raise wrong(file, f"a shard without its *.safetensors.index.json; {AGAIN}")
    files |= {*place.glob("*.gguf")}
    return [*map(read_shards, indexes), *map(read_header, sorted(files))]


MAPPED: WeakValueDictionary[tuple, mmap.mmap] = WeakValueDictionary()  # by file and its state


def view(tensor: Stored) -> Tensor:
    """The tensor as stored, a copy-on-write view of its file, mapped once for all views."""
    with opened(tensor.file, CHECKPOINT) as file:
        state = os.fstat(file.fileno())
        key = (tensor.file, state.st_ino, state.st_mtime_ns, state.st_size)
        data = MAPPED.get(key) or mapped(file)
        data = MAPPED.setdefault(key, data)
    where = dict(offset=tensor.start, count=math.prod(tensor.shape))
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype], **where).reshape(tensor.shape)


def read(tensor: Stored) -> Tensor:
    """The tensor as stored, to be converted or moved: only its own pages are mapped, and
    unmapped with it, so that it is never held in memory twice."""
    page = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with opened(tensor.file, CHECKPOINT) as file:
        data = mapped(file, tensor.stop - page, offset=page)
    flat = torch.frombuffer(data, dtype=DTYPES[tensor.dtype], offset=tensor.start - page)
    return flat.reshape(tensor.shape)


def read_raw(tensor: Stored) -> Tensor:
    return read(tensor._replace(dtype="U8", shape=(-1,)))


def values(tensor: Stored, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The numbers that a stored tensor stands for."""
    if tensor.dtype.startswith(QUANTIZED):
        raw = read_raw(tensor)
        return dequantized(raw, tensor.dtype, tensor.shape, dtype).to(device)
    # Apple's GPUs know neither FP8 nor float64.
    place = "cpu" if torch.device(device).type == "mps" else device
    numbers = read(tensor).to(place)
    if tensor.scale is not None:
        scale = read(tensor.scale).to(place).float()
        numbers = numbers.float() * scale.reshape(-1, *[1] * (numbers.ndim - 1))
    return numbers.to(dtype).to(device)


def whole(tensor: Stored, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """All of a stored tensor; a view of its file if nothing has to be converted or moved."""
    is_ready = DTYPES.get(tensor.dtype) == dtype and tensor.scale is None
    if is_ready and torch.device(device).type == "cpu":
        return view(tensor)
    return values(tensor, device, dtype)


def stored_fp8(tensor: Stored, rows: slice, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows of a matrix stored in FP8, and a scale for each, (rows, 1)."""
    scale = torch.ones(()) if tensor.scale is None else read(tensor.scale).float()
    scale = scale.reshape(-1, 1).expand(tensor.shape[0], 1)
    return read(tensor)[rows].to(device), scale[rows].to(device)
