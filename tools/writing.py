"""Output files: which can be written, and each whole or not at all."""

import glob
import os
import re
import socket
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import MISSING, InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
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


def check_suffix(flag: str, name: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    if Path(name).suffix.lower() not in suffixes:
        raise InputError(flag, name, f"the suffix must be {' or '.join(suffixes)}")


def check_writable(path: Path, overwrite: bool) -> None:
    """InputError if the file can't be written, or exists and is not to be overwritten."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(path, MISSING, f"there is no folder {path.parent} to write it to")
    name = os.fsencode(path.name)
    if len(name) > 200 or path.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(path, MISSING, "no file of this name can be written there")
    if path.exists() and not overwrite:
        raise InputError(path, MISSING, "exists already; --overwrite replaces it")
