"""Prompt embeddings that are kept for later: in memory, and in a folder for other runs."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class PromptCache:
    """Prompt embeddings by a hash of all that they depend on."""

    def __init__(self, folder: str | None):
        self.folder = Path(folder) if folder else None
        self.known: dict[str, Tensor] = {}

    def get(self, part: str, depends_on: Any, encode: Callable[[], Tensor]) -> Tensor:
        name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        file = self.folder / f"{part}-{name}.safetensors" if self.folder else None
        if name not in self.known and file and file.exists():
            with suppress(SafetensorError):  # A broken file is written again.
                self.known[name] = load_file(file)["states"]
        if name not in self.known:
            self.known[name] = encode()
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_stem(f".{file.stem}.{os.getpid()}")
                save_file({"states": self.known[name].contiguous()}, unfinished)
                unfinished.replace(file)
        return self.known[name]

    def clear(self) -> None:
        self.known.clear()
