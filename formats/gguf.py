"""GGUF files: what one stores, from its header alone, and the numbers that its quantised tensors stand for.

Types, sizes of blocks and dequantising are the `gguf` package's, which is imported when the first such file is met. The
header is walked here and not by the package's reader: that one trusts every count, and takes seconds for a vocabulary.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import MISSING, InputError

MAGIC = b"GGUF"


QUANTISED = "GGUF "  # begins the dtype of what has to be dequantised: "GGUF Q4_K"


VERSIONS = (2, 3)  # they differ in big-endian files alone


ALIGNMENT = 32  # of the data, unless the metadata says otherwise


MAX_HEADER = 100_000_000  # bytes; of safetensors too


MAX_DIMS = 4  # ggml's


SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


STRING, ARRAY = 8, 9


U32, U64 = "<I", "<Q"


CHUNK = 1 << 16  # numbers dequantised at once: what NumPy makes of so few stays in the cache


Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, and bytes [start, stop) of the file


def read_gguf(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file, all within it, and its metadata but for arrays. Both formats name float dtypes alike."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = Header(path, data)
        version, tensors, pairs = (header.number(form) for form in (U32, U64, U64))
        if version not in VERSIONS:
            raise InputError(path, MISSING, f"GGUF of version {version}, expected 2 or 3, little-endian")
        metadata = header.table(pairs, header.value)
        if metadata.get("split.count") not in (None, 0, 1):
            raise InputError(path, MISSING, "one of several parts of a GGUF; join them by `llama-gguf-split --merge`")
        infos = header.table(tensors, header.tensor)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise header.damaged(f"general.alignment = {alignment!r}, expected a count of bytes")
        begin = math.ceil(header.at / alignment) * alignment
        entries = {key: entry(header, begin, key, *info) for key, info in infos.items()}
    return entries, {key: str(value) for key, value in metadata.items() if value is not None}


class Header:
    """A place in a file's header, which moves on by what is read; never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, len(MAGIC)

    def damaged(self, what: str) -> InputError:
        return InputError(self.path, MISSING, f"{what}; download it again")

    def require(self, count: int) -> None:
        if self.at + count > min(len(self.data), MAX_HEADER):
            raise self.damaged(f"cut off or damaged, its {len(self.data):,} bytes end inside the header")

    def skip(self, count: int) -> int:
        """Move on; where that began."""
        self.require(count)
        self.at += count
        return self.at - count

    def number(self, form: str) -> int | float:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.data[self.skip(self.number(U64)) : self.at].decode(errors="replace")

    def table(self, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        """So many keys, each with what `read(key)` finds behind it."""
        found = {}
        for _ in range(count):
            key = self.text()
            if key in found:
                raise self.damaged(f"{key!r} is twice in the header")
            found[key] = read(key)
        return found

    def value(self, key: str) -> int | float | str | None:
        """A value of the metadata; None for arrays, which are vocabularies."""
        kind = self.number(U32)
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.skip_array(key, self.number(U32), self.number(U64))
        raise self.damaged(f"{key} is of the type {kind}, which GGUF does not know")

    def skip_array(self, key: str, kind: int, count: int) -> None:
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            self.require(count * struct.calcsize(U64))
            for _ in range(count):
                self.skip(self.number(U64))
        else:
            raise self.damaged(f"{key} is an array of the type {kind}, which is not read")

    def tensor(self, key: str) -> tuple[tuple[int, ...], int, int]:
        """A tensor's shape, type, and where it begins, counted from the first one's data."""
        dims = self.number(U32)
        if dims > MAX_DIMS:
            raise self.damaged(f"{key} has {dims} dimensions, expected at most {MAX_DIMS}")
        shape = tuple(self.number(U64) for _ in range(dims))[::-1]  # GGUF begins with the innermost
        return shape, self.number(U32), self.number(U64)


def entry(header: Header, begin: int, key: str, shape: tuple[int, ...], kind: int, offset: int) -> Entry:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise InputError(header.path, MISSING, f"{key} is of GGUF's type {kind}, which is not supported") from error
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or math.prod(shape[-1:]) % numbers:
        raise header.damaged(f"{key} has shape {shape}, expected rows of a multiple of {numbers} in {kind.name}")
    start = begin + offset
    stop = start + math.prod(shape) // numbers * size
    if stop > len(header.data):
        raise header.damaged(f"cut off, {key} ends at byte {stop:,} of {len(header.data):,}")
    # what the package can dequantise is a class of its `quants`; BF16 too, but torch has that itself
    quantised = hasattr(gguf.quants, kind.name) and kind.name != "BF16"
    return QUANTISED * quantised + kind.name, shape, start, stop


def dequantized(stored: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor of the dtype `name`, from its bytes, in `dtype`; few of them are in float32 at a time."""
    import gguf

    kind = gguf.GGMLQuantizationType[name.removeprefix(QUANTISED)]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    out = torch.empty(shape, dtype=dtype)
    blocks = CHUNK // numbers
    for chunk, raw in zip(out.view(-1).split(blocks * numbers), stored.split(blocks * size)):
        chunk.copy_(torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)))
    return out
