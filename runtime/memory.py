"""What fits on the GPU: which of a component's weights stay in host memory."""

from collections import Counter

import torch
from torch import nn

from errors import info
from formats import components
from formats.loader import FP8_LAYERS
from formats.recognize import WHAT, Source
from model.layers import Modulation
from regional.layout import Layout
from runtime.offload import MODULATION, Streamed, group_of

# How many numbers a step or a decoding holds at its peak besides weights: counted on the meta
# device (14.7, in FP8 25.7; for 1024 x 1024 and 2048 x 2048, 0 to 16 regions, 769 prompt
# tokens), plus some for the libraries' own.
VALUES_PER_TOKEN = 18  # times the hidden size
VALUES_PER_TOKEN_IN_FP8 = 30  # without torch.compile
VALUES_PER_PIXEL = 1000
TOKENS_PER_REFERENCE = 4150  # at most; each has about a megapixel
IMAGE_PROMPT = 729  # tokens of an image, by FLUX.1 Redux
WORKING_T5 = 10**9
GB = 1e9


def place(
    source: Source, offload: str, device: torch.device, dtype: torch.dtype, fp8: bool, room: int
) -> list[str]:  # fmt: skip
    """The groups of flux or t5 that stay in host memory: no blocks, all, or, if auto, as few as
    free memory allows; on CUDA modulation layers, too, unless they fit besides all else."""
    sizes = group_bytes(source, dtype, fp8)
    blocks = {key: sizes[key] for key in sizes if key not in (None, MODULATION)}
    on_gpu = device.type == "cuda"
    modulation = [MODULATION] if on_gpu and MODULATION in sizes else []
    streamed = list(blocks) if offload == "blocks" else []
    if offload == "blocks" or not on_gpu:
        return streamed + modulation
    needed = sum(sizes.values()) - sizes[MODULATION] + room
    free = free_memory(device)
    if offload == "auto":
        streamed = fewest_blocks(blocks, needed - free)
        where = f"{len(streamed)} of its {len(blocks)} blocks are streamed from host memory"
        amounts = f"takes {needed / GB:.1f} GB, {free / GB:.1f} GB are free"
        info(f"the {WHAT[source.part]} {amounts}: {where}")
    return streamed if needed + sizes[MODULATION] <= free else streamed + modulation


def fewest_blocks(blocks: dict[str, int], excess: int) -> list[str]:
    """The fewest blocks, spread evenly, that save `excess` bytes if streamed, or all. They take
    two buffers, as large as the largest."""
    names = list(blocks)
    for count in range(len(names)):
        chosen = [names[i * len(names) // count] for i in range(count)]
        sizes = [blocks[name] for name in chosen]
        if sum(sizes) - 2 * max(sizes, default=0) >= excess:
            return chosen
    return names


def group_bytes(source: Source, dtype: torch.dtype, fp8: bool = False) -> Counter[str | None]:
    """What weights take on the GPU, by `group_of`; blocks are in order."""
    sizes = Counter()
    for name, tensor in components.on_meta(source).state_dict().items():
        in_fp8 = fp8 and tensor.ndim == 2 and FP8_LAYERS.search(name)
        sizes[group_of(name)] += tensor.numel() * (1 if in_fp8 else dtype.itemsize)
    return sizes


def working_bytes(hidden: int, layout: Layout, dtype: torch.dtype, fp8: bool) -> int:
    """About what activations take in a regional step, or in the VAE if more."""
    pixels = layout.width * layout.height
    tokens = pixels // 256 + layout.max_sequence_length
    prompts = [x for part in (layout, *layout.regions) for x in part.image_prompts]
    tokens += IMAGE_PROMPT * len(prompts)
    if layout.regions:  # and the background; the second image stream
        prompts = len(layout.regions) + 1
        tokens += pixels // 256 + prompts * layout.region_max_sequence_length
    references = [x for part in (layout, *layout.regions) for x in part.references]
    tokens += TOKENS_PER_REFERENCE * len(references)
    if layout.cfg_batch and layout.true_cfg_scale > 1:
        tokens *= 2
    per_token = VALUES_PER_TOKEN_IN_FP8 if fp8 else VALUES_PER_TOKEN
    values = max(tokens * per_token * hidden, VALUES_PER_PIXEL * pixels)
    return values * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """GPU bytes that this process may still take, within torch's limit."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - own
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, limit - own)


def load_placed(
    source: Source, device: torch.device, dtype: torch.dtype, merges: components.Merges,
    offload: str, fp8: bool, room: int,
) -> tuple[nn.Module, list[Streamed]]:  # fmt: skip
    """The transformer or T5, its weights where `place` has them, and what is streamed of it.
    room: `working_bytes`, 0 for T5."""
    placed = place(source, offload, device, dtype, fp8, room or WORKING_T5)
    module = components.load(source, device, dtype, merges, lambda x: group_of(x) in placed, fp8)
    streamed = []
    if blocks := [module.get_submodule(name) for name in placed if name != MODULATION]:
        streamed.append(Streamed(blocks, device, pin=True))
    if MODULATION in placed:
        layers = [layer for layer in module.modules() if isinstance(layer, Modulation)]
        streamed.append(Streamed(layers, device))
    return module, streamed
