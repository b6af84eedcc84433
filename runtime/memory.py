"""What fits on the GPU: which of a component's weights stay in host memory."""

from typing import NamedTuple

import torch
from torch import nn

import weights
from errors import info
from formats.recognize import WHAT, Source
from model.layers import Modulation
from regional.layout import Layout
from runtime.offload import FLUX_MODULATION, Streamed, block_of

# How many numbers a step, or a decoding, holds at its peak next to the weights: counted at full
# size on the meta device (14.7 and 25.7, for 1024 x 1024 and 2048 x 2048, 0 to 16 regions, and 769
# prompt tokens), and some more for the libraries' own
VALUES_PER_TOKEN = 18  # times the hidden size
VALUES_PER_TOKEN_IN_FP8 = 30  # without torch.compile
VALUES_PER_PIXEL = 1000
WORKING_T5 = 10**9
GB = 1e9


class Placement(NamedTuple):
    """What of a component stays in host memory: the weights of these blocks, which are streamed,
    and FLUX.1's modulation layers, which pass over the GPU once for each layout."""

    blocks: list[str]
    modulation: bool

    def on_host(self, name: str) -> bool:
        """Is the weight of this name in host memory?"""
        if FLUX_MODULATION.match(name):
            return self.modulation
        return block_of(name) in self.blocks


def place(
    source: Source, offload: str, device: torch.device, dtype: torch.dtype, fp8: bool, room: int
) -> Placement:  # fmt: skip
    """Where the weights of this component, flux or t5, are kept. room: `working_bytes`.

    offload: none and blocks stream none and all of its blocks, auto as few as free memory allows.
    Modulation layers are kept on a CUDA GPU where there is room for them besides all else.
    """
    sizes = weight_bytes(source, dtype, fp8)
    blocks = block_bytes(sizes)
    modulation = sum(size for name, size in sizes.items() if FLUX_MODULATION.match(name))
    if device.type != "cuda":
        return Placement(list(blocks) if offload == "blocks" else [], False)
    if offload == "blocks":
        return Placement(list(blocks), modulation > 0)
    needed = sum(sizes.values()) - modulation + room
    free = free_memory(device)
    streamed = [] if offload == "none" else fewest_blocks(blocks, needed - free)
    if offload == "auto":
        where = "its blocks stay on the GPU"
        if streamed:
            where = f"{len(streamed)} of its {len(blocks)} blocks are streamed from host memory"
        sizes = f"takes {needed / GB:.1f} GB, {free / GB:.1f} GB are free"
        info(f"the {WHAT[source.part]} {sizes}: {where}")
    return Placement(streamed, modulation > 0 and needed + modulation > free)


def fewest_blocks(blocks: dict[str, int], excess: int) -> list[str]:
    """As few blocks, spread evenly, as have to be streamed to save `excess` bytes, or all. blocks:
    their sizes. The streamed ones take two buffers, as large as the largest."""
    names = list(blocks)
    for count in range(len(names)):
        chosen = [names[i * len(names) // count] for i in range(count)]
        sizes = [blocks[name] for name in chosen]
        if sum(sizes) - 2 * max(sizes, default=0) >= excess:
            return chosen
    return names


def weight_bytes(source: Source, dtype: torch.dtype, fp8: bool = False) -> dict[str, int]:
    """The size of each weight on the GPU, by name."""
    sizes = {}
    for name, tensor in weights.on_meta(source).state_dict().items():
        in_fp8 = fp8 and tensor.ndim == 2 and weights.FP8_LAYERS.search(name)
        sizes[name] = tensor.numel() * (1 if in_fp8 else dtype.itemsize)
    return sizes


def block_bytes(sizes: dict[str, int]) -> dict[str, int]:
    """The blocks in the order that they run in, and how many bytes of each would be streamed."""
    blocks = {}
    for name, size in sizes.items():
        if block := block_of(name):
            blocks[block] = blocks.get(block, 0) + size
    return blocks


def working_bytes(hidden: int, layout: Layout, dtype: torch.dtype, fp8: bool) -> int:
    """About what the activations of FLUX.1, of this hidden size, take in a regional step, or the
    VAE's, if they take more."""
    pixels = layout.width * layout.height
    tokens = pixels // 256 + layout.max_sequence_length
    if layout.regions:  # and the background; the second image stream
        prompts = len(layout.regions) + 1
        tokens += pixels // 256 + prompts * layout.region_max_sequence_length
    per_token = VALUES_PER_TOKEN_IN_FP8 if fp8 else VALUES_PER_TOKEN
    values = max(tokens * per_token * hidden, VALUES_PER_PIXEL * pixels)
    return values * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on the GPU, within torch's limit for it."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - own
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, limit - own)


def load_placed(
    source: Source, device: torch.device, dtype: torch.dtype, merges: weights.Merges, offload: str,
    fp8: bool, room: int,
) -> tuple[nn.Module, list[Streamed]]:  # fmt: skip
    """The transformer or T5 with its weights where `place` has them, and what of it is streamed.
    room: as for `place`; 0 if it is T5."""
    placed = place(source, offload, device, dtype, fp8, room or WORKING_T5)
    module = weights.load(source, device, dtype, merges, placed.on_host, fp8)
    streamed = []
    if placed.blocks:
        blocks = [module.get_submodule(block) for block in placed.blocks]
        streamed.append(Streamed(blocks, device, pin=True))
    if placed.modulation:
        layers = [layer for layer in module.modules() if isinstance(layer, Modulation)]
        streamed.append(Streamed(layers, device))
    return module, streamed
