"""What regions cost: seconds and peak memory against the number of masks, for plain FLUX, composition and ours.

    python benchmarks/masks.py           # the pocket model on the CPU
    python benchmarks/masks.py --full    # FLUX.1-dev's sizes with random weights, on a CUDA GPU

The paper's Figure 6 on this machine. Regions are a grid over the whole picture; T 40 %, beta 0.1. Each measurement is a
process of its own, which draws once to warm up and then --repeats times; the median counts. Only the sampling is timed:
text encoders and VAE are the same for all. With --rank 16 regional runs are also measured where every region has a LoRA
of its own, of this rank, on all matrices of all blocks.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import pipeline  # noqa: E402
import weights  # noqa: E402
from extensions.lora import Change, Lora, LowRank  # noqa: E402
from extensions.region_lora import region_loras  # noqa: E402
from formats import components  # noqa: E402
from model.transformer import Flux, FluxParams  # noqa: E402
from regional.layout import FLUX_DEV, Layout, Region, RegionLora  # noqa: E402
from regional.mask import region_tokens  # noqa: E402
from runtime import choose  # noqa: E402

GRIDS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2), 16: (4, 4)}
METHODS = ("plain", "rpg", "regional", "regional with LoRAs")
PAPER = {
    "plain": [18] * 5,
    "rpg": [None, 97, 180, 310, 572],
    "regional": [None, 23, 36, 46, 63],
}  # seconds, its Figure 6


def grid(masks: int, size: int, loras: tuple[RegionLora, ...]) -> tuple[Region, ...]:
    columns, rows = GRIDS[masks]
    edges = [[size * i // n for i in range(n + 1)] for n in (columns, rows)]
    return tuple(
        Region(prompt="r", box=(x0, y0, x1, y1), loras=loras)
        for y0, y1 in zip(edges[1], edges[1][1:])
        for x0, x1 in zip(edges[0], edges[0][1:])
    )


def random_full_size(device: torch.device) -> Flux:
    """FLUX.1-dev's transformer with random weights, small enough that nothing overflows."""
    with torch.device("meta"):
        flux = Flux(FluxParams())
    flux = flux.to(torch.bfloat16).to_empty(device=device)
    for name, parameter in flux.named_parameters():
        torch.nn.init.ones_(parameter) if name.endswith("scale") else torch.nn.init.normal_(parameter, std=0.02)
    return flux.requires_grad_(False)


def random_lora(flux: Flux, rank: int) -> Lora:
    changes = []
    for name, weight in flux.named_parameters():
        if "blocks" in name and weight.ndim == 2 and "mod" not in name:
            (rows, columns), like = weight.shape, {"device": weight.device, "dtype": weight.dtype}
            up, down = torch.randn(rows, rank, **like), torch.randn(rank, columns, **like)
            changes.append(Change(name, 0, rows, LowRank(up, down, 1e-3 / rank)))
    return Lora(Path("random"), {"flux": changes}, [])


@torch.inference_mode()
def measure(masks: int, method: str, full: bool, region_length: int, repeats: int, rank: int) -> dict[str, float]:
    """In this process: seconds a picture, and the peak memory in bytes beyond the model."""
    device = torch.device("cuda" if full else "cpu")
    flux = random_full_size(device) if full else components.load(weights.find("pocket").flux, device, torch.float32)
    size, text_length = (1024, 512) if full else (256, 64)
    loras = {"random": random_lora(flux, rank)} if method.endswith("LoRAs") else {}
    method = method.split()[0]
    layout = Layout(
        prompt="p", width=size, height=size, steps=24, base_ratio=0.1, mask_inject_steps="40%", method=method,
        regions=grid(masks, size, tuple(RegionLora(file=name) for name in loras)),
    )  # fmt: skip
    dtype = flux.img_in.weight.dtype
    params = flux.params
    sizes = {"depth": params.depth, "depth_single_blocks": params.depth_single_blocks}
    layout = layout.resolved(FLUX_DEV._replace(**sizes))
    tokens = region_tokens(layout) if method != "plain" else None
    conditioning = pipeline.Conditioning(
        *(
            torch.randn(shape, device=device, dtype=dtype)
            for shape in (
                (1, text_length, params.context_in_dim),
                (masks, region_length, params.context_in_dim),
                (1 + masks, params.vec_in_dim),
            )
        )
    )
    attention = choose.choose_attention("auto", device, dtype, False)

    extensions = [region_loras(flux, layout, loras, device, dtype)] if loras else []

    def draw() -> float:
        start = time.perf_counter()
        latents = pipeline.sample(flux, layout, tokens, conditioning, 0, pipeline.by(attention), extensions)
        latents.sum().item()  # waits for the GPU
        return time.perf_counter() - start

    before = memory(full)
    with choose.library_attention(flux, layout, conditioning.txt, False):
        draw()
        seconds = [draw() for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "bytes": memory(full) - before}


def memory(full: bool) -> int:
    """Peak bytes so far."""
    return torch.cuda.max_memory_allocated() if full else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--region-length", type=int, help="text tokens of each region; default: an eighth of the image's"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=0, help="also measure regions with LoRAs of this rank")
    parser.add_argument("--one", nargs=2, metavar=("MASKS", "METHOD"), help=argparse.SUPPRESS)  # one measurement
    args = parser.parse_args()
    region_length = args.region_length or (512 if args.full else 32)
    if args.one:
        print(json.dumps(measure(int(args.one[0]), args.one[1], args.full, region_length, args.repeats, args.rank)))
        return
    print("| masks | method | s | of plain | paper: of plain | peak MiB beyond the model |\n|---|---|---|---|---|---|")
    for i, masks in enumerate(GRIDS):
        found = {}
        for method in METHODS if args.rank else METHODS[:3]:
            command = [sys.executable, *sys.argv, "--one", str(masks), method]
            found[method] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            ratio = found[method]["seconds"] / found["plain"]["seconds"]
            paper = f"{PAPER[method][i] / 18:.2f}" if method in PAPER and PAPER[method][i] else ""
            print(
                f"| {masks} | {method} | {found[method]['seconds']:.2f} | {ratio:.2f} | {paper} "
                f"| {found[method]['bytes'] / 2**20:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
