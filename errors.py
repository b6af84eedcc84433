"""What the program tells its user: errors in bad input, and messages."""

import re
import sys
from typing import Any


class InputError(Exception):
    """Bad input, in one sentence that names the file, the key and the value; generate.py prints it and exits with 2."""


def describe(value: Any, most: int = 80) -> str:
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
    return re.search("[\ud800-\udfff]", text) is not None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
