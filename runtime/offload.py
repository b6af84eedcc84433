"""Modules that run on a device with weights that stay in host memory, copied over in turn.

The device holds those of two modules: of the running one, and of the next, copied meanwhile,
also behind blocks that are not streamed. Results are bit-identical.
"""

import os
import re
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.recognize import Source

ALIGNMENT = 256  # bytes, like torch's allocations
MODULATION = "modulation"
FLUX_MODULATION = re.compile(r"\w+_blocks\.\d+\.(img_mod|txt_mod|modulation)\.")
BLOCK = re.compile(r"((?:\w+_blocks|encoder\.block)\.\d+)\.(?!.*relative_attention)")
APART = re.compile(r"(img_mod|txt_mod|modulation)\.|.*relative_attention_bias\.")


def group_of(name: str) -> str | None:
    """What a weight is streamed with: its block, or FLUX.1's modulation layers, which run at
    another time. T5's distance table has none: all blocks use it."""
    if FLUX_MODULATION.match(name):
        return MODULATION
    found = BLOCK.match(name)
    return found and found[1]


class Streamed:
    """Streams modules that are called in this order, again and again.

    pin: each one's weights move into one piece of memory, pinned for a GPU, so that one
    background copy fetches them. It takes time and, for a while, a module's memory again.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, pin: bool = False):
        self.device = device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.owners = []  # of each module: its layers and their weights' names
        self.weights = []  # those in host memory
        self.pieces = []  # what is copied: these, or the piece they lie in
        for index, module in enumerate(modules):
            names = [name for name, _ in module.named_parameters()]
            paths = [name.rpartition(".") for name in names if not APART.match(name)]
            owners = [(module.get_submodule(path), key) for path, _, key in paths]
            host = [getattr(owner, key).data for owner, key in owners]
            pieces = host
            if pin:
                size = padded_size(*host)
                pinned = self.copying is not None
                pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned)]
                host = [view.copy_(x) for view, x in zip(laid_out(*pieces, host), host)]
            self.owners.append(owners)
            self.weights.append(host)
            self.pieces.append(pieces)
            self.put(index, host)  # frees what it was, one module after the other
            module.register_forward_pre_hook(lambda *_, index=index: self.turn_of(index))
        self.forget()

    def forget(self) -> None:
        self.buffers = []
        self.running = None  # which module runs
        self.fetched = None  # which is in the other buffer

    def turn_of(self, index: int) -> None:
        """Put this module's weights in place of the last one's; fetch the next."""
        if index == self.running:
            return
        if index != self.fetched:
            self.fetch(index)
        self.wait()
        self.put(index, laid_out(self.buffers[-1], self.weights[index]))
        self.put_back()
        self.running = index
        self.buffers.reverse()  # The last is the one to fill next.
        self.fetch((index + 1) % len(self.weights))

    def fetch(self, index: int) -> None:
        """Begin to copy a module's weights into the last buffer, once it is free."""
        if not self.buffers:
            size = max(padded_size(*pieces) for pieces in self.pieces)
            self.buffers = list(torch.empty(2, size, dtype=torch.uint8, device=self.device))
        if self.copying:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copying):  # It does nothing without a stream.
            pieces = self.pieces[index]
            for view, piece in zip(laid_out(self.buffers[-1], pieces), pieces):
                view.copy_(piece, non_blocking=True)
        self.fetched = index

    def wait(self) -> None:
        if self.copying:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)

    def put(self, index: int, weights: list[Tensor]) -> None:
        for (owner, key), weight in zip(self.owners[index], weights):
            owner._parameters[key] = nn.Parameter(weight, requires_grad=False)

    def put_back(self) -> None:
        if self.running is not None:
            self.put(self.running, self.weights[self.running])

    def release(self) -> None:
        """Free the device's memory until the next turn."""
        self.put_back()
        self.wait()
        self.forget()


def laid_out(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, one after another in a buffer."""
    sizes = [padded_size(x) for x in like]
    pieces = buffer[: sum(sizes)].split(sizes)
    return [piece[: x.nbytes].view(x.dtype).view(x.shape) for piece, x in zip(pieces, like)]


def padded_size(*weights: Tensor) -> int:
    """The bytes that `laid_out` takes for them."""
    return sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights)


def read_ahead(source: Source) -> None:
    """Read a component's files into the file cache, if they fit, in the background."""
    files = {tensor.file for tensor in source.tensors.values()}
    about = Path("/proc/meminfo")  # on Linux
    text = about.read_text() if about.exists() else ""
    available = re.search(r"MemAvailable:\s+(\d+) kB", text)
    size = sum(file.stat().st_size for file in files)
    if available and size < 1024 * int(available[1]):
        threading.Thread(target=read_files, args=(files,), daemon=True).start()


def read_files(files: set[Path]) -> None:
    for path in files:
        with suppress(OSError):  # Loading will tell what is wrong.
            shutil.copyfile(path, os.devnull)
