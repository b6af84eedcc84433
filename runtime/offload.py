"""Modules that run on a device while their weights stay in host memory, copied over in turn.

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
APART = re.compile(r"(img_mod|txt_mod|modulation)\b|.*relative_attention_bias$")


def block_of(name: str) -> str | None:
    """The block of FLUX.1 or T5 that a weight, by its name, would be streamed with."""
    found = BLOCK.match(name)
    return found[1] if found and not FLUX_MODULATION.match(name) else None


class Streamed:
    """Takes care of `modules`, whose weights are in host memory, and which are called in this
    order, again and again.

    device: where they run. pin: move each module's weights into one piece of memory first, pinned
    for a GPU, so that one copy in the background fetches them. It takes time and, for a while, the
    memory of a module's weights again.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, pin: bool = False):
        self.device = device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.owners = []  # of each module: the layers with weights, and the weights' names
        self.weights = []  # of each module: the weights in host memory
        self.pieces = []  # of each module: what is copied, its weights or the piece they lie in
        for index, module in enumerate(modules):
            owners = [
                (owner, key)
                for path, owner in module.named_modules()
                for key, _ in owner.named_parameters(recurse=False)
                if not APART.match(path)
            ]
            host = [getattr(owner, key).data for owner, key in owners]
            pieces = host
            if pin:
                pinned = dict(pin_memory=self.copying is not None)
                pieces = [torch.empty(padded_size(*host), dtype=torch.uint8, **pinned)]
                host = [view.copy_(x) for view, x in zip(laid_out(pieces[0], host), host)]
            self.owners.append(owners)
            self.weights.append(host)
            self.pieces.append(pieces)
            self.put(index, host)  # What it was before is free, one module after the other.
            module.register_forward_pre_hook(lambda *_, index=index: self.turn_of(index))
        self.forget()

    def forget(self) -> None:
        self.buffers = []
        self.running = None  # which module runs
        self.fetched = None  # which is in the other buffer

    def turn_of(self, index: int) -> None:
        """Have this module's weights on the device, not the last one's; fetch the next."""
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
        """Begin to copy a module's weights into the last buffer, once its last module is done."""
        if not self.buffers:
            size = max(padded_size(*pieces) for pieces in self.pieces)
            like = dict(dtype=torch.uint8, device=self.device)
            self.buffers = [torch.empty(size, **like) for _ in range(2)]
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
        """Give the device's memory back, until the next turn."""
        self.put_back()
        self.wait()
        self.forget()


def laid_out(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, one behind the other in a buffer of bytes."""
    views = []
    start = 0
    for x in like:
        views.append(buffer[start : start + x.nbytes].view(x.dtype).view(x.shape))
        start += padded_size(x)
    return views


def padded_size(*weights: Tensor) -> int:
    """The bytes that `laid_out` takes for them."""
    return sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights)


def read_ahead(source: Source) -> None:
    """Read a component's files, in the background, into the host's file cache, if they fit, so
    that loading it does not wait for the disk."""
    files = {tensor.file for tensor in source.tensors.values()}
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not on Linux
        return
    available = re.search(r"MemAvailable:\s+(\d+) kB", text)
    if available and sum(file.stat().st_size for file in files) < 1024 * int(available[1]):
        threading.Thread(target=read_files, args=(files,), daemon=True).start()


def read_files(files: set[Path]) -> None:
    chunk = bytearray(1 << 24)
    for path in files:
        # Loading will tell what is wrong.
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            while file.readinto(chunk):
                pass
