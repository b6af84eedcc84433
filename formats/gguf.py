"""GGUF files: what one stores, from its header alone, and the values of its quantized tensors.

Types, block sizes and dequantization are the `gguf` package's, imported with the first such file.
The header is parsed here: the package's reader trusts every count and takes seconds for a
vocabulary. Errors are ValueErrors without the file's name.
"""

import math
import mmap
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAGIC = b"GGUF"
QUANTIZED = "GGUF "  # begins the dtype of what must be dequantized: "GGUF Q4_K"
ALIGNMENT = 32  # of the data, unless the metadata specifies another
HEADER = 100_000_000  # bytes; the limit of the safetensors format, too
MAX_ENTRIES = 50_000  # of a table; FLUX.1 has 780 tensors
MAX_STRINGS = 500_000  # in all arrays, which are vocabularies
MAX_DIMS = 4  # ggml's limit
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
STRING = 8
ARRAY = 9
CHUNK = 1 << 16  # numbers dequantized at once; NumPy's intermediates stay in the cache
Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, and bytes [start, stop) of the file


def read_gguf(data: mmap.mmap) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file, all within it, and its metadata without arrays. Float dtypes have
    safetensors' names."""
    header = Header(data)
    version = header.number("I")
    if version not in (2, 3):  # They differ in big-endian files alone.
        raise ValueError(f"GGUF of version {version}, expected 2 or 3, little-endian")
    tensors = header.number("Q")
    pairs = header.number("Q")
    metadata = header.table(pairs, header.value)
    if metadata.get("split.count") not in (None, 0, 1):
        join = "join them by `llama-gguf-split --merge`"
        raise ValueError(f"one of several parts of a GGUF file; {join}")
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
    """A position in a header, advanced by reading, never past the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = len(MAGIC)
        self.strings = 0

    def require(self, count: int) -> None:
        size = len(self.data)
        if self.at + count > min(size, HEADER):
            raise damaged(f"cut off or damaged, its {size:,} bytes end inside the header")

    def skip(self, count: int) -> int:
        """Advance by so many bytes; returns the position before."""
        self.require(count)
        self.at += count
        return self.at - count

    def number(self, form: str) -> int | float:
        start = self.skip(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, start)[0]

    def text(self) -> str:
        start = self.skip(self.number("Q"))
        return self.data[start : self.at].decode(errors="replace")

    def table(self, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        """`count` keys, each with what `read(key)` finds behind it."""
        if count > MAX_ENTRIES:
            raise damaged(f"its {count:,} entries are more than {MAX_ENTRIES:,}")
        found = {}
        for _ in range(count):
            key = self.text()
            if key in found:
                raise damaged(f"{key!r} is twice in the header")
            found[key] = read(key)
        return found

    def value(self, key: str) -> int | float | str | None:
        """A value of the metadata; None for arrays, which are vocabularies."""
        kind = self.number("I")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.skip_array(key, self.number("I"), self.number("Q"))
        raise damaged(f"{key} is of the type {kind}, which GGUF does not know")

    def skip_array(self, key: str, kind: int, count: int) -> None:
        if kind in SCALARS:
            self.skip(count * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            self.require(count * struct.calcsize("<Q"))
            self.strings += count
            if self.strings > MAX_STRINGS:
                raise damaged(f"more than {MAX_STRINGS:,} strings")
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise damaged(f"{key} is an array of the type {kind}, which is not read")

    def tensor(self, key: str) -> tuple[tuple[int, ...], int, int]:
        """A tensor's shape, type, and where it begins, counted from the first one's data."""
        dims = self.number("I")
        if dims > MAX_DIMS:
            raise damaged(f"{key} has {dims} dimensions, expected at most {MAX_DIMS}")
        innermost_first = [self.number("Q") for _ in range(dims)]
        return tuple(innermost_first[::-1]), self.number("I"), self.number("Q")


def entry(key: str, shape: tuple[int, ...], kind: int, offset: int, begin: int, size: int) -> Entry:
    """A tensor whose data is `offset` bytes behind byte `begin` of a file of `size` bytes."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise ValueError(f"{key} is of GGUF's type {kind}, which is not supported") from error
    numbers, block = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or math.prod(shape[-1:]) % numbers:
        expected = f"rows of a multiple of {numbers} in {kind.name}"
        raise damaged(f"{key} has shape {shape}, expected {expected}")
    start = begin + offset
    stop = start + math.prod(shape) // numbers * block
    if stop > size:
        raise damaged(f"cut off, {key} ends at byte {stop:,} of {size:,}")
    # The package has a class for each type it dequantizes, and for BF16, which torch has.
    is_quantized = hasattr(gguf.quants, kind.name) and kind.name != "BF16"
    return QUANTIZED * is_quantized + kind.name, shape, start, stop


def dequantized(stored: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the dtype `name` from its bytes; only CHUNK numbers are float32 at a time."""
    import gguf

    kind = gguf.GGMLQuantizationType[name.removeprefix(QUANTIZED)]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    out = torch.empty(shape, dtype=dtype)
    blocks = CHUNK // numbers
    chunks = out.view(-1).split(blocks * numbers)
    for chunk, raw in zip(chunks, stored.split(blocks * size)):
        chunk.copy_(torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)))
    return out
