"""The gate: every file and text that comes from outside is opened, limited and parsed here.

A file must be a regular one, so that reading it ends, and no larger than its kind can be. What
cannot be read or parsed is an InputError that names the file, whatever the library raised.
"""

import glob
import mmap
import os
import re
import socket
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import yaml
from PIL import Image

from errors import MISSING, InputError

# The most bytes of a file, by its kind
LAYOUT = 200_000
CONFIG = 10_000_000  # config.json, an index of shards, metadata beside an image
HEADER = 100_000_000  # of a checkpoint: the limit of the safetensors format
TOKENIZER = 50_000_000
SOURCE = 500_000_000  # what a layout is converted from: COCO's annotations
IMAGE = 200_000_000
CHECKPOINT = 2**50
MAX_PIXELS = 25_000_000  # of an image; reading so many takes up to 500 MB (WebP)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # for EPS, Pillow would run Ghostscript


@contextmanager
def opened(file: str | Path, most: int) -> Iterator[BinaryIO]:
    """The file, to be read; InputError also for what goes wrong with it inside the block."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        with open(file, "rb", opener=lambda name, how: os.open(name, how | NONBLOCK)) as found:
            about = os.fstat(found.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise OSError("not a regular file")
            if about.st_size > most:
                raise OSError(f"its {about.st_size:,} bytes are more than {most:,}")
            yield found
    except FileNotFoundError:
        raise InputError(Path(file), MISSING, "there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL or a surrogate
        reason = getattr(error, "strerror", None) or error
        raise InputError(Path(file), MISSING, f"cannot be read ({reason})") from None


def read_bytes(file: str | Path, most: int) -> bytes:
    with opened(file, most) as found:
        return found.read(most)


def read_text(file: str | Path, most: int) -> str:
    """The file as UTF-8, without a byte order mark."""
    with opened(file, most) as found:
        return found.read(most).decode("utf-8-sig")


def mapped(file: BinaryIO, size: int = 0, offset: int = 0) -> mmap.mmap:
    """`size` bytes of an opened file from `offset` on, all by default; changes are not written."""
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)


def parsed(parse: Callable[[Any], Any], data: Any, file: str | Path, what: str) -> Any:
    """`parse(data)`, or InputError for whatever it raises: libraries raise bare Exceptions, and
    RecursionError where lists are nested too deeply. what: damaged JSON, no layout."""
    try:
        return parse(data)
    except InputError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(". ")
        raise InputError(Path(file), MISSING, f"{what} ({reason})") from None


def parse_yaml(text: str, loader: type[yaml.SafeLoader], file: str | Path) -> Any:
    """YAML that came from this file; a mistake has its line and column."""

    def load(text: str) -> Any:
        try:
            return yaml.load(text, loader)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            if mark := getattr(error, "problem_mark", None):
                problem = f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
            raise InputError(Path(file), MISSING, problem) from None

    return parsed(load, text, file, "cannot be read as YAML")


def parse_json(data: bytes | str, kind: Any, file: str | Path) -> Any:
    """JSON of this type, checked by msgspec, that came from this file."""
    return parsed(lambda text: msgspec.json.decode(text, type=kind), data, file, "damaged JSON")


def converted(value: Any, kind: Any, file: str | Path) -> Any:
    """A value that was parsed, as this type."""
    return parsed(lambda value: msgspec.convert(value, kind), value, file, "damaged")


@contextmanager
def opened_image(file: str | Path, most: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image, not yet decoded, of `most` pixels; InputError also for what goes wrong with
    it inside the block."""
    with opened(file, IMAGE) as data, warnings.catch_warnings(action="ignore"):
        try:
            with Image.open(data, formats=FORMATS) as image:
                if image.width * image.height > most:
                    size = f"{image.width} x {image.height}"
                    raise ValueError(f"its {size} pixels are more than {most:,}")
                yield image
        except InputError:
            raise
        except Exception as error:  # Broken files make Pillow raise almost any.
            problem = f"not an image that can be read ({error})"
            raise InputError(Path(file), MISSING, problem) from None


# ------------------------------------------------------------------------ writing

HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # several may write to one folder
DAY = 86400  # seconds


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Save under a temporary name, then rename: a file is whole or not there."""
    unfinished = path.with_stem(f".{path.stem}.{HOST}-{os.getpid()}")
    try:
        save(unfinished)
        with open(unfinished, "rb+") as file:  # or a power cut could leave an empty file
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what dead processes left of this file: those of this machine, and what is a day old."""
    for file in path.parent.glob(f".{glob.escape(path.stem)}.*{path.suffix}"):
        name = re.fullmatch(r"([0-9a-f]{8})-(\d+)", file.stem.removeprefix(f".{path.stem}."))
        if name is None:  # .x.1.77.png is not x.png's
            continue
        with suppress(FileNotFoundError):  # Another process removes it, too, or has renamed it.
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
