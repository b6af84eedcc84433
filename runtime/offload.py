"""Modules that run on a device while their weights stay in host memory, copied over one module ahead of its turn.

The device holds the weights of two of them at a time: the one that runs, and the next, which is
being copied meanwhile. They may be only some of a model's blocks: each copy is then hidden behind
all blocks up to the next of them. What is computed is the same to the bit.
"""

import re
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.recognize import Source

ALIGNMENT = 256  # bytes, as torch's own allocations have it


# FLUX.1's modulation layers are called at another time than the rest of their blocks, and T5's
# table of distances is used by all blocks.
FLUX_MODULATION = re.compile(r"(double|single)_blocks\.\d+\.(img_mod|txt_mod|modulation)\.")


BLOCK = re.compile(r"((?:(?:double|single)_blocks|encoder\.block)\.\d+)\.(?!.*relative_attention)")


def block_of(name: str) -> str | None:
    """The block of FLUX.1 or T5 that a weight, by its name, would be streamed with."""
    found = BLOCK.match(name)
    return found[1] if found and not FLUX_MODULATION.match(name) else None


def tensors_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The weights that a module is called with, (owner, name, weight)."""
    return [
        (owner, key, weight)
        for path, owner in module.named_modules()
        for key, weight in owner.named_parameters(recurse=False)
        if not re.search(r"^(img_mod|txt_mod|modulation)\b|relative_attention_bias$", path)
    ]


class Streamed:
    """Takes care of `modules`, whose weights are in host memory, and which are called in this order, again and again.

    device: where they run. pin: move each module's weights into one piece of memory first, pinned
    for a GPU, so that one copy in the background fetches them. It takes time and, for a while, the
    memory of a module's weights again.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, pin: bool = False):
        self.device = device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.weights = []  # of each module: (owner, name, weight in host memory)
        self.pieces = []  # of each module: what is copied, its weights or the piece they lie in
        self.buffers, self.running, self.fetched = [], None, None  # which module runs, which comes after it
        for index, module in enumerate(modules):
            found = tensors_of(module)
            host = [weight.data for *_, weight in found]
            self.pieces.append(host)
            if pin:
                on_gpu = self.copying is not None
                piece = torch.empty(padded_size(*host), dtype=torch.uint8, pin_memory=on_gpu)
                self.pieces[index] = [piece]
                host = [view.copy_(weight) for view, weight in zip(laid_out(piece, host), host)]
            self.weights.append([(owner, key, weight) for (owner, key, _), weight in zip(found, host)])
            self.put(index, host)  # what it was before is free, one module after the other
            module.register_forward_pre_hook(lambda module, args, index=index: self.turn_of(index))

    def turn_of(self, index: int) -> None:
        """Have the weights of this module on the device, and those of the one before out of it; fetch the next."""
        if index == self.running:
            return
        if index != self.fetched:
            self.fetch(index)
        if self.copying:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self.put(index, self.views(self.buffers[-1], index))
        self.put_back()
        self.running = index
        self.buffers.reverse()  # the last is the one to fill next
        self.fetch((index + 1) % len(self.weights))

    def fetch(self, index: int) -> None:
        """Begin to copy a module's weights into the last buffer, once the module that had it is done."""
        if not self.buffers:
            size = max(padded_size(*pieces) for pieces in self.pieces)
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        if self.copying:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copying):  # does nothing without a stream
            pieces = self.pieces[index]
            for view, piece in zip(laid_out(self.buffers[-1], pieces), pieces):
                view.copy_(piece, non_blocking=True)
        self.fetched = index

    def views(self, buffer: Tensor, index: int) -> list[Tensor]:
        """A module's weights as they lie in a buffer."""
        return laid_out(buffer, [weight for *_, weight in self.weights[index]])

    def put(self, index: int, weights: list[Tensor]) -> None:
        for (owner, key, _), weight in zip(self.weights[index], weights):
            owner._parameters[key] = nn.Parameter(weight, requires_grad=False)

    def put_back(self) -> None:
        if self.running is not None:
            self.put(self.running, [weight for *_, weight in self.weights[self.running]])

    def release(self) -> None:
        """Give the device's memory back, until the next turn."""
        self.put_back()
        if self.copying:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self.buffers, self.running, self.fetched = [], None, None


def laid_out(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, one behind the other in a buffer of bytes."""
    views, start = [], 0
    for x in like:
        views.append(buffer[start : start + x.nbytes].view(x.dtype).view(x.shape))
        start += padded_size(x)
    return views


def padded_size(*weights: Tensor) -> int:
    """The bytes that `laid_out` takes for them."""
    return sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights)


def read_ahead(source: Source) -> None:
    """Have a part's files read, in the background, into the host's memory for files, if they fit: loading it, soon,
    will not have to wait for the disk."""
    files = {tensor.file for tensor in source.tensors.values()}
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not on Linux
        return
    if available and sum(file.stat().st_size for file in files) < 1024 * int(available[1]):
        threading.Thread(target=read_files, args=(files,), daemon=True).start()


def read_files(files: set[Path]) -> None:
    chunk = bytearray(1 << 24)
    for path in files:
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # loading will tell what is wrong
            while file.readinto(chunk):
                pass
