"""What fits on the GPU: which of a part's weights stay in host memory, by the sizes in its file and
what is free."""

import math
from typing import NamedTuple

import torch
from torch import nn

import weights
from errors import info
from extensions.loading import find_controlnet
from formats.recognize import WHAT, Source
from model.layers import Modulation
from model.transformer import FluxParams
from regional.layout import Layout
from runtime.offload import FLUX_MODULATION, Streamed, block_of

# How many numbers a step, or a decoding, holds at its peak beside the weights: counted at full size
# on the meta device (14.7 and 25.7, for 1024 x 1024 and 2048 x 2048, 0 to 16 regions, and 769 text
# tokens), and some more for the libraries' own
VALUES_PER_TOKEN = 18  # times the hidden size


VALUES_PER_TOKEN_IN_FP8 = 30  # without torch.compile


VALUES_PER_PIXEL = 1000


WORKING_T5, GB = 1e9, 1e9


class Placement(NamedTuple):
    """What of a part stays in host memory: the weights of these blocks, which are streamed, and
    FLUX.1's modulation layers, which pass over the GPU once for each layout."""

    blocks: list[str]
    modulation: bool

    def on_host(self, name: str) -> bool:
        """Is the weight of this name in host memory?"""
        modulates = FLUX_MODULATION.match(name) is not None
        return self.modulation if modulates else block_of(name) in self.blocks


def place(
    source: Source, offload: str, device: torch.device, dtype: torch.dtype, fp8: bool, layout: Layout | None
) -> Placement:
    """Where the weights of this part, flux or t5, are kept.

    offload: none and blocks stream none and all of its blocks, auto as few as free memory allows.
    Modulation layers are kept on a CUDA GPU where there is room for them beside all else.
    """
    sizes = weight_bytes(source, dtype, fp8)
    blocks = block_bytes(sizes)
    modulation = sum(size for name, size in sizes.items() if FLUX_MODULATION.match(name))
    if device.type != "cuda":
        return Placement(list(blocks) if offload == "blocks" else [], False)
    if offload == "blocks":
        return Placement(list(blocks), modulation > 0)
    needed = sum(sizes.values()) - modulation + working_bytes(source, layout, dtype, fp8)
    free = free_memory(device)
    streamed = [] if offload == "none" else fewest_blocks(blocks, needed - free)
    if offload == "auto":
        what = WHAT[source.part]
        where = f"{len(streamed)} of its {len(blocks)} blocks are streamed from host memory"
        where = where if streamed else "its blocks stay on the GPU"
        info(f"the {what} takes {needed / GB:.1f} GB, {free / GB:.1f} GB are free: {where}")
    return Placement(streamed, modulation > 0 and needed + modulation > free)


def fewest_blocks(blocks: dict[str, int], excess: int) -> list[str]:
    """As few blocks, spread evenly, as have to be streamed to save `excess` bytes; all if that is
    not enough. blocks: their sizes. The streamed ones take two buffers, as large as the largest."""
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


def working_bytes(source: Source, layout: Layout | None, dtype: torch.dtype, fp8: bool) -> int:
    """About what else is needed at most: the ControlNets, and the activations of FLUX.1 in a regional step or the VAE's
    beside its weights."""
    if source.part != "flux" or layout is None:
        return int(WORKING_T5)
    params: FluxParams = weights.flux_params(source)
    nets = [find_controlnet(name) for name in {control.model for control in layout.controlnets}]
    pixels, regions = layout.width * layout.height, len(layout.regions)
    tokens = pixels // 256 + layout.max_sequence_length
    if regions:  # and the background; the second image stream
        tokens += pixels // 256 + (regions + 1) * layout.region_max_sequence_length
    activations = tokens * (VALUES_PER_TOKEN_IN_FP8 if fp8 else VALUES_PER_TOKEN) * params.hidden_size
    values = max(activations, VALUES_PER_PIXEL * pixels)
    values += sum(math.prod(tensor.shape) for net in nets for tensor in net.tensors.values())
    return values * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on the GPU, of which torch may have been told to keep
    to a part."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - own
    return min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - own)


def load_placed(
    source: Source, device: torch.device, dtype: torch.dtype, merges: weights.Merges, offload: str,
    fp8: bool, layout: Layout | None,
) -> tuple[nn.Module, list[Streamed]]:  # fmt: skip
    """The transformer or T5 with its weights where `place` has them, and what of it is streamed."""
    placed = place(source, offload, device, dtype, fp8, layout)
    in_fp8 = weights.FP8_LAYERS.search if fp8 else weights.nothing
    placement = weights.Placement(placed.on_host, in_fp8)
    module = weights.load(source, device, dtype, merges, placement)
    streamed = []
    if placed.blocks:
        blocks = [module.get_submodule(block) for block in placed.blocks]
        streamed.append(Streamed(blocks, device, pin=True))
    if placed.modulation:
        layers = [layer for layer in module.modules() if isinstance(layer, Modulation)]
        streamed.append(Streamed(layers, device))
    return module, streamed
