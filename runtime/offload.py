"""Modules that run on a device while their weights stay in host memory, copied over one module ahead of its turn.

The device holds the weights of two modules at a time: the one that runs, and the next, which is being copied meanwhile.
What is computed is the same to the bit.
"""

import re
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.recognize import Source

ALIGNMENT = 256  # bytes, as torch's own allocations have it


# What may stay in host memory, by its name. FLUX.1's modulation layers are called at another time than the rest of
# their blocks, and T5's table of distances is used by all blocks.
FLUX_BLOCKS = re.compile(r"(double|single)_blocks\.\d+\.")


FLUX_MODULATION = re.compile(r"(double|single)_blocks\.\d+\.(img_mod|txt_mod|modulation)\.")


T5_BLOCKS = re.compile(r"encoder\.block\.\d+\.(?!.*relative_attention_bias)")


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

    device: where they run. pin: copy the weights into pinned memory first, from where copying is fast and in the
    background; it takes time and as much memory again for a while.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, pin: bool = False):
        self.device = device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.weights = []  # of each module: (owner, name, weight in host memory)
        self.buffers, self.running, self.fetched = [], None, None  # which module runs, which comes after it
        for index, module in enumerate(modules):
            found = tensors_of(module)
            host = [weight.data for *_, weight in found]
            host = pinned(host) if pin and self.copying else host
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
            size = max(sum(padded_size(weight) for *_, weight in module) for module in self.weights)
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        if self.copying:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copying):  # does nothing without a stream
            for view, (*_, weight) in zip(self.views(self.buffers[-1], index), self.weights[index]):
                view.copy_(weight, non_blocking=True)
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


def pinned(weights: list[Tensor]) -> list[Tensor]:
    """Copies in one piece of pinned memory: torch rounds each piece up to a power of two."""
    views = laid_out(torch.empty(sum(map(padded_size, weights)), dtype=torch.uint8, pin_memory=True), weights)
    for view, weight in zip(views, weights):
        view.copy_(weight)
    return views


def padded_size(weight: Tensor) -> int:
    return -(-weight.nbytes // ALIGNMENT) * ALIGNMENT


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
