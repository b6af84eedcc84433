"""What fits on the card: whether a part's blocks stay in host memory, by the sizes in its file and what is free."""

import math

import torch

import weights
from errors import say
from extensions.loading import find_controlnet
from formats.recognize import WHAT, Source
from model.transformer import FluxParams
from regional.layout import Layout
from runtime.offload import FLUX_MODULATION

# How many numbers a step, or a decoding, holds at its peak beside the weights: counted at full size on the meta device
# (15.6 and 26.1, for 1024 x 1024 and 2048 x 2048, 0 to 16 regions, and 769), and some more for the libraries' own
VALUES_PER_TOKEN = 18  # times the hidden size


VALUES_PER_TOKEN_IN_FP8 = 30  # without torch.compile


VALUES_PER_PIXEL = 1000


WORKING_T5, GB = 1e9, 1e9


def stays_on_host(
    source: Source, offload: str, device: torch.device, dtype: torch.dtype, fp8: bool, layout: Layout | None
) -> bool:
    """Are the blocks of this part, flux or t5, to be streamed from host memory? offload: auto, none or blocks."""
    if offload != "auto" or device.type != "cuda":
        return offload == "blocks"
    needed = resident_bytes(source, dtype, fp8) + working_bytes(source, layout, dtype, fp8)
    free, what = free_memory(device), WHAT[source.part]
    streamed = needed > free
    where = "are streamed from host memory (--offload blocks)" if streamed else "stay on the card"
    say(f"the {what} takes {needed / GB:.1f} GB, {free / GB:.1f} GB are free: its blocks {where}")
    return streamed


def resident_bytes(source: Source, dtype: torch.dtype, fp8: bool = False, modulation: bool = False) -> int:
    """The weights on the card; FLUX.1's modulation layers, which are never there altogether, only if asked for."""
    total = 0
    for name, tensor in weights.on_meta(source).state_dict().items():
        if modulation or not FLUX_MODULATION.search(name):
            in_fp8 = fp8 and tensor.ndim == 2 and weights.FP8_LAYERS.search(name)
            total += tensor.numel() * (1 if in_fp8 else dtype.itemsize)
    return total


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
    """Bytes that this process can still take on the card; torch may have been told to keep to a part of it."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - own
    return min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - own)
