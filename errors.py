"""Bad input: how it is worded, and the gate for every file and text from outside.

A file must be regular, so that reading it ends, and no larger than its kind can be. What
cannot be read or parsed is an InputError naming the file, whatever the library raised.
"""

import mmap
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import yaml
from PIL import Image
from tqdm import tqdm

# The most bytes of a file, by its kind
LAYOUT = 200_000
CONFIG = 10_000_000  # config.json, an index of shards, metadata beside an image
HEADER = 100_000_000  # of a checkpoint: the limit of the safetensors format
TOKENIZER = 50_000_000
SOURCE = 500_000_000  # converted to a layout: COCO's annotations
IMAGE = 200_000_000
CHECKPOINT = 2**50
MAX_PIXELS = 25_000_000  # of an image; reading them takes up to 500 MB (WebP)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
# of images; for EPS, Pillow would run Ghostscript
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MISSING: Any = object()  # the value of an InputError without one
MOST = 10  # mistakes reported at once


class InputError(Exception):
    """Bad input; generate.py prints it and exits with 2.

    key: regions[1].box, --flag or a Path. value: what was given; file names as Paths.
    problem: one clause. source: the key's file.
    """

    def __init__(self, key: str | Path, value: Any, problem: str, source: Any = None):
        self.key = key
        self.value = value
        self.problem = problem
        self.source = source

    def __str__(self) -> str:
        text = f"{shown(self.source)}: " if self.source else ""
        text += shown(self.key)
        if self.value is not MISSING:
            is_flag = str(self.key).startswith("--")  # shown as it was typed
            is_name = is_flag or isinstance(self.value, Path)
            text += " " if is_flag else " = "
            text += shown(self.value) if is_name else describe(self.value)
        return f"{text}: {shown(' '.join(self.problem.split()))}."

    def within(self, source: str | Path | None) -> "InputError":
        """With its source, unless it has one or its key is a file or flag."""
        if not (isinstance(self.key, Path) or self.key.startswith("--")):
            self.source = self.source or source
        return self


class InputErrors(InputError):
    """Several mistakes, a line for each."""

    def __init__(self, source: Path | None):
        super().__init__("", MISSING, "", source)
        self.errors: list[InputError] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Collects an InputError; the tenth raises them all."""
        try:
            yield
        except InputError as error:
            if error is self:
                raise
            self.errors.append(error.within(self.source))
            if len(self.errors) == MOST:
                raise self from None

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


def describe(value: Any, most: int = 80) -> str:
    """A value as Python writes it, tuples as lists, cut to `most` characters."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except (RecursionError, ValueError):  # nested deeply; an integer of 5000 digits
        return f"{type(value).__name__} of a size that can't be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(name: Any) -> str:
    """As it is, or quoted and cut where it would break or fill lines."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 1000 else describe(text, 1000)


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def info(text: str) -> None:
    """Print a message, escaping what a terminal would act on."""
    safe = [x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text]
    with tqdm.external_write_mode(nolock=True):  # not into a progress bar
        print("".join(safe), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    info(f"warning: {text}")


def print_error(error: BaseException) -> None:
    for line in str(error).split("\n"):
        info(f"generate.py: {line}")


# ------------------------------------------------------------------------ the gate


@contextmanager
def opened(file: str | Path, most: int) -> Iterator[BinaryIO]:
    """The file, to be read; InputError also for failures inside the block."""
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
    except (OSError, ValueError) as error:  # a name with a NUL
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
    """`size` bytes from `offset`, by default all; changes are not written."""
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)


def parsed(parse: Callable[[Any], Any], data: Any, file: str | Path, what: str) -> Any:
    """`parse(data)`, or InputError for whatever it raises: libraries raise bare Exceptions, and
    RecursionError for deep nesting. what: damaged JSON, no layout."""
    try:
        return parse(data)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(Path(file), MISSING, f"{what} ({reason})") from None


def parse_yaml(text: str, loader: type[yaml.SafeLoader], file: str | Path) -> Any:
    """YAML from this file; mistakes have their line and column."""

    def load(text: str) -> Any:
        try:
            return yaml.load(text, loader)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            if problem.startswith(("mapping values", "expected")):
                problem += "; quote text with : or # or {"
            if mark := getattr(error, "problem_mark", None):
                problem = f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
            raise InputError(Path(file), MISSING, problem) from None

    return parsed(load, text, file, "cannot be read as YAML")


def parse_json(data: bytes | str, kind: Any, file: str | Path) -> Any:
    """JSON of this type from this file, checked by msgspec."""
    decoder = msgspec.json.Decoder(kind)
    return parsed(decoder.decode, data, file, "damaged JSON")


def converted(value: Any, kind: Any, file: str | Path, what: str) -> Any:
    """A parsed value as this type. what: damaged header."""
    return parsed(lambda value: msgspec.convert(value, kind), value, file, what)


@contextmanager
def opened_image(file: str | Path, most: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image, not yet decoded; InputError also for failures inside the block."""
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
