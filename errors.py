"""Bad input, worded in one place, and messages to the user."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING: Any = object()  # the value of an InputError that names none
MOST = 10  # mistakes that are reported at once


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
        """The same error with its source, unless it has one or its key is a file or a flag."""
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
    """A name or message as it is, or quoted and cut where it would break or fill lines."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 1000 else describe(text, 1000)


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


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
