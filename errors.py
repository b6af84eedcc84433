"""Bad input, worded in one place, and messages to the user."""

import os
import stat
import sys
from pathlib import Path
from typing import Any

MISSING: Any = object()  # the value of an InputError that names none
MOST = 10  # mistakes that are reported at once


class InputError(Exception):
    """Bad input; generate.py prints it and exits with 2.

    key: what is wrong, such as regions[1].box, a flag or a file's Path. value: what was given, or
    MISSING to name none; file names as Paths. problem: one clause, without a full stop. source:
    where the key stands, a file's name or "the command line".
    """

    def __init__(self, key: str | Path, value: Any, problem: str, source: str | Path | None = None):
        super().__init__(key, value, problem, source)
        self.key = key
        self.value = value
        self.problem = problem
        self.source = source

    def __str__(self) -> str:
        name = shown(self.key)
        is_flag = name.startswith("--")  # shown as it was typed
        if self.value is not MISSING:
            is_name = is_flag or isinstance(self.value, Path)
            name += " " if is_flag else " = "
            name += shown(self.value) if is_name else describe(self.value)
        start = f"{shown(self.source)}: " if self.source else ""
        return f"{start}{name}: {shown(' '.join(self.problem.split()))}."

    def within(self, source: str | Path) -> "InputError":
        """The same error with its source, unless it has one or its key is a file or a flag."""
        if not (self.source or isinstance(self.key, Path) or self.key.startswith("--")):
            self.source = source
        return self


class InputErrors(InputError):
    """Several mistakes, a line for each. As a context it collects InputErrors; the tenth, or
    `raise_any`, raises them all."""

    def __init__(self):
        self.errors: list[InputError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, InputError) or error is self:
            return False
        self.errors.append(error)
        if len(self.errors) == MOST:
            raise self
        return True

    def raise_any(self) -> None:
        if self.errors:
            raise self

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))

    def within(self, source: str | Path) -> "InputErrors":
        for error in self.errors:
            error.within(source)
        return self


def describe(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut to `most` characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of over 4300 digits
        return f"{type(value).__name__} of a size that can't be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(name: Any) -> str:
    """A name or message as it is, or quoted and cut where it would break or fill lines."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 1000 else describe(text, 1000)


def check_file(file: str | Path, most: int) -> None:
    """OSError for pipes and devices, which may never end, and for more than `most` bytes."""
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):
        raise OSError("not a regular file")
    if about.st_size > most:
        raise OSError(f"its {about.st_size:,} bytes are more than {most:,}")


def info(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    info(f"warning: {text}")


def print_error(error: BaseException) -> None:
    for line in str(error).split("\n"):
        info(f"generate.py: {line}")
