"""Bad input, worded in one place, and messages to the user."""

import re
import sys
from pathlib import Path
from typing import Any

MISSING: Any = object()  # the value of an InputError that names none


class InputError(Exception):
    """Bad input; generate.py prints it and exits with 2.

    key: what is wrong, such as regions[1].box, a flag or a file's path. value: what was given, or MISSING to name none.
    problem: one clause, without a full stop. source: where the key stands, a file's name or "the command line".
    """

    def __init__(self, key: str | Path, value: Any = None, problem: str | None = None, source: Any = None):
        super().__init__(key, value, problem, source)
        if problem is None:  # the sentence in one piece, until branch b is merged
            value = MISSING
            key, _, problem = key.rstrip(".").partition(": ")
            key = Path(key) if Path(key).exists() else key
        self.key = key
        self.value = value
        self.problem = " ".join(problem.split())
        self.source = source

    def __str__(self) -> str:
        name = shown(self.key)
        if self.value is not MISSING:
            is_flag = name.startswith("--")
            value = shown(self.value) if is_flag or isinstance(self.value, Path) else describe(self.value)
            name += f" {value}" if is_flag else f" = {value}"  # flags as they were typed
        start = f"{shown(self.source)}: " if self.source else ""
        return f"{start}{name}: {shown(self.problem)}."

    def within(self, source: str | Path) -> "InputError":
        """The same error with its source, unless it has one or its key is a file or a flag, which needs none."""
        if not (self.source or isinstance(self.key, Path) or self.key.startswith("--")):
            self.source = source
        return self


class InputErrors(InputError):
    """Several mistakes, a line for each."""

    def __init__(self, errors: list[InputError]):
        Exception.__init__(self, errors)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))

    def within(self, source: str | Path) -> "InputErrors":
        return InputErrors([error.within(source) for error in self.errors])


def describe(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut to `most` characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more than 4300 digits
        return f"{type(value).__name__} of a size that can't be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(name: Any) -> str:
    """A name or message as it is, or quoted, cut and in one line where it would break lines or fill the screen."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 1000 else describe(text, 1000)


def is_broken(text: str) -> bool:
    """Does it hold half of a surrogate pair?"""
    return re.search("[\ud800-\udfff]", text) is not None


def info(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    info(f"warning: {text}")


def print_error(error: BaseException) -> None:
    """Print an error as generate.py's, a line for each of several mistakes."""
    for line in str(error).split("\n"):
        info(f"generate.py: {line}")


say = info  # until branch b is merged
