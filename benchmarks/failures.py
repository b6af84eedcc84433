"""A benchmark goes on after a participant that fails: its row reports why, and the exit code is 1
at the end."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def reason(error: BaseException) -> str:
    """An exception in one line that fits into a table's cell."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 200 else f"{text[:197]}..."


class Failures:
    """The rows that failed."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def add(self, row: str, error: BaseException) -> None:
        """Print a row, `| size | name |` or any beginning of one, with the reason behind it."""
        self.rows.append(row)
        print(f"{row} failed: {reason(error)} |", flush=True)

    @contextmanager
    def caught(self, row: str) -> Iterator[None]:
        """Ends a `with` block that fails, after its row is printed and its memory is free."""
        try:
            yield
        except Exception as error:
            self.add(row, error)
            error.__traceback__ = None  # it holds the tensors of every frame
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def exit_code(self) -> int:
        for row in self.rows:
            print(f"failed: {row}")
        return int(bool(self.rows))
