"""GGUF files: what one stores, from its header alone, and the numbers that its quantized tensors stand for.

Types, block sizes and dequantization are the `gguf` package's, which is imported when the first such
file is met. The header is parsed here and not by the package's reader, because that one trusts every
count and takes seconds for a vocabulary. What is wrong is a ValueError without the file's name.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = b"GGUF"
QUANTIZED = "GGUF "  # begins the dtype of what has to be dequantized: "GGUF Q4_K"
ALIGNMENT = 32  # of the data, unless the metadata specifies another
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format, too
MAX_DIMS = 4  # ggml's limit
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING = 8
ARRAY = 9
U32 = "<I"
U64 = "<Q"
CHUNK = 1 << 16  # numbers dequantized at once; NumPy's intermediate results stay in the cache
Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, and bytes [start, stop) of the file


def read_gguf(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file, all within it, and its metadata but for arrays. Both formats name float dtypes alike."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = Header(data)
        version = header.number(U32)
        if version not in (2, 3):  # they differ in big-endian files alone
            raise ValueError(f"GGUF of version {version}, expected 2 or 3, little-endian")
        tensors = header.number(U64)
        pairs = header.number(U64)
        metadata = header.table(pairs, header.value)
        if metadata.get("split.count") not in (None, 0, 1):
            raise ValueError("one of several parts of a GGUF file; join them by `llama-gguf-split --merge`")
        infos = header.table(tensors, header.tensor)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise damaged(f"general.alignment = {alignment!r}, expected a count of bytes")
        begin = math.ceil(header.at / alignment) * alignment
        entries = {key: entry(key, *info, begin, len(data)) for key, info in infos.items()}
    return entries, {key: str(value) for key, value in metadata.items() if value is not None}


def damaged(problem: str) -> ValueError:
    return ValueError(f"{problem}; download it again")


class Header:
    """A position in a file's header, which advances by what is read, never past the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = len(MAGIC)

    def require(self, count: int) -> None:
        if self.at + count > min(len(self.data), MAX_HEADER):
            raise damaged(f"cut off or damaged, its {len(self.data):,} bytes end inside the header")

    def skip(self, count: int) -> int:
        """Advance by so many bytes; returns the position before."""
        self.require(count)
        self.at += count
        return self.at - count

    def number(self, form: str) -> int | float:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.data[self.skip(self.number(U64)) : self.at].decode(errors="replace")

    def table(self, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        """`count` keys, each with what `read(key)` finds behind it."""
        found = {}
        for _ in range(count):
            key = self.text()
            if key in found:
                raise damaged(f"{key!r} is twice in the header")
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
        raise damaged(f"{key} is of the type {kind}, which GGUF does not know")

    def skip_array(self, key: str, kind: int, count: int) -> None:
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            self.require(count * struct.calcsize(U64))
            for _ in range(count):
                self.skip(self.number(U64))
        else:
            raise damaged(f"{key} is an array of the type {kind}, which is not read")

    def tensor(self, key: str) -> tuple[tuple[int, ...], int, int]:
        """A tensor's shape, type, and where it begins, counted from the first one's data."""
        dims = self.number(U32)
        if dims > MAX_DIMS:
            raise damaged(f"{key} has {dims} dimensions, expected at most {MAX_DIMS}")
        shape = tuple(self.number(U64) for _ in range(dims))[::-1]  # GGUF lists the innermost first
        return shape, self.number(U32), self.number(U64)


def entry(key: str, shape: tuple[int, ...], kind: int, offset: int, begin: int, size: int) -> Entry:
    """A tensor whose data is `offset` bytes behind byte `begin` of a file of `size` bytes."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise ValueError(f"{key} is of GGUF's type {kind}, which is not supported") from error
    numbers, block = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or math.prod(shape[-1:]) % numbers:
        raise damaged(f"{key} has shape {shape}, expected rows of a multiple of {numbers} in {kind.name}")
    start = begin + offset
    stop = start + math.prod(shape) // numbers * block
    if stop > size:
        raise damaged(f"cut off, {key} ends at byte {stop:,} of {size:,}")
    # the package can dequantize what is a class of its `quants`; BF16 is one too, but torch has it itself
    is_quantized = hasattr(gguf.quants, kind.name) and kind.name != "BF16"
    return QUANTIZED * is_quantized + kind.name, shape, start, stop


def dequantized(stored: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the dtype `name` from its bytes, in `dtype`; only CHUNK numbers are float32 at a time."""
    import gguf

    kind = gguf.GGMLQuantizationType[name.removeprefix(QUANTIZED)]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    out = torch.empty(shape, dtype=dtype)
    blocks = CHUNK // numbers
    for chunk, raw in zip(out.view(-1).split(blocks * numbers), stored.split(blocks * size)):
        chunk.copy_(torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)))
    return out
