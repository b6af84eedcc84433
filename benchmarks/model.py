"""What a step of FLUX.1-dev should take on an H100, predicted before any GPU has run it.

    python benchmarks/model.py

The kernel is simulated: its programs, from the lists that it is given, go in launch order to the
first free one of 132 multiprocessors. What a program takes is estimated from its instructions
and public timings of the same loop; the rest of a step is FLOPs and bytes over rates.
"""

import heapq
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model.transformer import Flux, FluxParams
from regional.attention import RegionalAttention, Tokens, dense_attention
from regional.kernel import HEADS_TOGETHER, launch_for, tile_lists
from regional.layout import FLUX_DEV, Layout, Region
from regional.mask import region_tokens
from runtime.offload import FLUX_MODULATION
from runtime.unmasked import forbids_nothing
from tools.cost import plain_flops, regional_flops

SMS = 132  # multiprocessors
FULL, PARTIAL, FIXED, EMPTY = 2.30, 2.88, 3.35, 1.5  # us: tile of keys; program; one without any
GEMM, LIBRARY, LIBRARY_ALONE = 650e12, 600e12, 630e12  # FLOP/s; attention in a step and by itself
BANDWIDTH = 2.8e12  # bytes/s
# A block's compiled element-wise kernels read and write so many times L x D x 2 bytes: modulate 2,
# norm and RoPE 4, GELU 8, residual 3; single blocks join attn and MLP, 2; double blocks join q and
# k, 2, and v, 2, and modulate again, 4. With RoPE in float32 single blocks move 8 more.
UNITS = {"double": 25, "single": 19}
FLOAT32_ROPE = 8
FINISH_UNITS = 12  # SingleStreamBlock.finish holds x, h, attn, MLP 4, and attn and MLP joined 5
RUNTIME = 0.6e9  # bytes of CUDA's context and the libraries' workspaces
STEPS, REGIONAL, TEXT, SIZE, IMAGE = 24, 10, 512, 1024, 64 * 64
FLUX = FluxParams()
BLOCKS = {"double": FLUX.depth, "single": FLUX.depth_single_blocks}
PAIR, ROW = 4 * FLUX.hidden_size, 2 * FLUX.hidden_size  # FLOPs of a query and key; bytes of a token
Boxes = list[tuple[float, ...]]


def grid(m: int, n: int) -> Boxes:
    return [(i / m, j / n, (i + 1) / m, (j + 1) / n) for j in range(n) for i in range(m)]


LAYOUTS = {
    "R = 1, the whole image": grid(1, 1), "one box and background": [(0.25, 0.25, 0.75, 0.75)],
    "R = 4, quadrants": grid(2, 2), "R = 8, 4 x 2": grid(4, 2), "R = 16, 4 x 4": grid(4, 4),
    "8 overlapping and background": [
        (0, 0, 0.5, 0.45), (0.3, 0.05, 0.7, 0.55), (0.55, 0.1, 0.95, 0.45), (0.05, 0.35, 0.4, 0.85),
        (0.25, 0.3, 0.75, 0.7), (0.6, 0.35, 0.95, 0.85), (0.1, 0.65, 0.6, 0.95),
        (0.45, 0.6, 0.9, 0.95),
    ], "3 strips": grid(3, 1),
}  # fmt: skip
PREDICTED = ("R = 1, the whole image", "R = 4, quadrants", "R = 16, 4 x 4")  # whole steps


def layout_of(boxes: Boxes) -> Layout:
    regions = [Region(prompt="", box=tuple(round(SIZE * x) for x in box)) for box in boxes]
    return Layout(prompt="", width=SIZE, height=SIZE, regions=tuple(regions)).resolved(FLUX_DEV)


def tokens_of(boxes: Boxes, kind: str = "single") -> Tokens:
    """The sequence of the blocks of this kind, as a regional step has it."""
    bits = region_tokens(layout_of(boxes)).sorted()[0].bits(TEXT)
    return RegionalAttention(dense_attention, bits, TEXT, IMAGE, 0.3).tokens(kind, is_masked=True)


def programs(tokens: Tokens, full: float = FULL) -> tuple[list[float], int]:
    """The microseconds of each program of one head, in launch order; and the allowed pairs."""
    launch = launch_for(torch.bfloat16, (9, 0))
    plan, pairs = tile_lists(tokens, launch.block_m, launch.block_n)
    _, _, full_begin, mixed_begin, keys_end = plan.queries.T
    work = FIXED + full * (mixed_begin - full_begin) + PARTIAL * (keys_end - mixed_begin)
    return torch.where(keys_end > full_begin, work, EMPTY).tolist(), pairs


def simulated(head: list[float], together: int = HEADS_TOGETHER) -> float:
    """Microseconds until the programs of all heads, so many of them side by side, have run."""
    free = [0.0] * SMS
    for time in [time for time in head for _ in range(together)] * (FLUX.num_heads // together):
        heapq.heappush(free, heapq.heappop(free) + time)
    return max(free)


def masked_attention(tokens: Tokens) -> float:
    """Microseconds as the code is now: of the kernel, or of the library and copies around it."""
    if not forbids_nothing(tokens.bits):
        return simulated(programs(tokens)[0])
    count = int((tokens.bits != 0).sum())
    rows = 7 * count + int((tokens.base_weight > 0).sum()) + len(tokens.bits)
    return 1e6 * (PAIR * count**2 / LIBRARY_ALONE + rows * ROW / BANDWIDTH)


def step(boxes: Boxes, rope_units: int = 0) -> float:
    """Milliseconds of a compiled step, regional, or plain without boxes."""
    flops = plain_flops(FLUX, TEXT, IMAGE)
    lengths = dict.fromkeys(BLOCKS, TEXT + IMAGE)
    attention = base = PAIR * (TEXT + IMAGE) ** 2 * sum(BLOCKS.values())
    masked = 0
    if boxes:
        layout = layout_of(boxes)
        flops = regional_flops(layout, FLUX, region_tokens(layout), base=True)
        for kind, count in BLOCKS.items():
            tokens = tokens_of(boxes, kind)
            lengths[kind] = len(tokens.bits)
            masked += count * masked_attention(tokens) / 1e6
            attention += count * PAIR * programs(tokens)[1]
    units = {**UNITS, "single": UNITS["single"] + rope_units}
    moved = sum(ROW * BLOCKS[kind] * units[kind] * lengths[kind] for kind in BLOCKS)
    return 1e3 * ((flops - attention) / GEMM + base / LIBRARY + masked + moved / BANDWIDTH)


def memory(regions: int) -> float:
    """GB on the GPU in a compiled step in bfloat16, with the modulation layers on the host."""
    with torch.device("meta"):
        named = Flux(FLUX).named_parameters()
    resident = sum(weight.numel() for name, weight in named if not FLUX_MODULATION.search(name))
    length = TEXT * (regions + 1) + (2 if regions else 1) * IMAGE
    vectors = STEPS * (12 * FLUX.depth + 3 * FLUX.depth_single_blocks + 2) * FLUX.hidden_size
    given = TEXT * (regions + 1) * FLUX.context_in_dim + vectors
    return (2 * (resident + given) + FINISH_UNITS * length * ROW + RUNTIME) / 1e9


def kernel_row(name: str) -> str:
    tokens = tokens_of(LAYOUTS[name])
    head, pairs = programs(tokens)
    ideal = sum(head) * FLUX.num_heads / SMS
    times = simulated(head, 1), masked_attention(tokens)
    each = " | ".join(f"{time:.0f} ({time / ideal - 1:+.1%})" for time in times)
    rates = " -> ".join(f"{FLUX.num_heads * 512 * pairs / time / 1e6:.0f}" for time in times)
    return f"| {name} | {len(head)} ({head.count(EMPTY)}) | {ideal:.0f} | {each} | {rates} |"


def step_row(name: str, boxes: Boxes, plain: float) -> str:
    before, now = step(boxes, FLOAT32_ROPE), step(boxes)
    run = (REGIONAL * now + (STEPS - REGIONAL) * plain) / (STEPS * plain)
    return f"| {name} | {before:.0f} | {now:.0f} | {run:.2f} | {memory(len(boxes)):.1f} |"


if __name__ == "__main__":
    print("| layout | programs (empty) | ideal us | before | now | TFLOP/s |\n" + "|---" * 6 + "|")
    print(*map(kernel_row, LAYOUTS), sep="\n")
    quadrants = tokens_of(LAYOUTS["R = 4, quadrants"])
    faster = [round(simulated(programs(quadrants, FULL / gain)[0])) for gain in (1.03, 1.08)]
    print("\nQuadrants, us, if the third tile in flight gains 3 or 8 %:", *faster)
    print("\n| step | RoPE in float32, ms | ms | run / plain | GB |\n" + "|---" * 5 + "|")
    for name in ("plain", *PREDICTED):
        print(step_row(name, LAYOUTS.get(name, []), step([])))
