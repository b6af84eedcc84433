"""How fast a checkpoint loads on the CPU, and how much memory that takes, beside what safetensors itself offers.

    python benchmarks/loading.py --gigabytes 4

A random bfloat16 checkpoint with FLUX.1's block sizes is written twice, as one BFL file and as a sharded diffusers
folder. Each run is a fresh process that loads it and then touches every page of every weight; the two ways take turns.
The rival is `safetensors.torch.load_file` and `load_state_dict(assign=True)` onto a module on the meta device; for the
diffusers layout it has to join q, k, v and the MLP with `torch.cat` in between, as our names want them. Peak memory is
VmHWM, which counts file-backed pages, and Python and torch themselves. The files are in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import weights  # noqa: E402
from formats import components  # noqa: E402
from formats import key_names as namings  # noqa: E402
from model.transformer import Flux, FluxParams  # noqa: E402

GIGABYTES_PER_DOUBLE_BLOCK = 1.25  # with its two single blocks, in bfloat16
SHARDS = 3

Shapes = dict[str, tuple[int, ...]]


def flux_shapes(gigabytes: float) -> Shapes:
    depth = max(1, round(gigabytes / GIGABYTES_PER_DOUBLE_BLOCK))
    with torch.device("meta"):
        model = Flux(FluxParams(depth=depth, depth_single_blocks=2 * depth))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def diffusers_shapes(shapes: Shapes, hidden: int = 3072) -> Shapes:
    """The same weights under diffusers' names: joined projections apart, `hidden` rows each, the last has the rest."""
    apart = {}
    for name, shape in shapes.items():
        *firsts, last = [row.key for row in namings.flux_from_diffusers(name, {})]
        apart |= {key: (hidden, *shape[1:]) for key in firsts}
        apart[last] = (shape[0] - hidden * len(firsts), *shape[1:])
    return apart


def write(path: Path, shapes: Shapes) -> int:
    """A safetensors file of random bfloat16 numbers, written piece by piece; returns its size in bytes."""
    noise = torch.randn(1 << 22).bfloat16().view(torch.uint8).numpy().tobytes()
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(at, 0, -len(noise)):
            file.write(noise[:left])
    return path.stat().st_size


def write_shards(folder: Path, shapes: Shapes) -> int:
    folder.mkdir()
    names, files = list(shapes), [f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    parts = [names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS] for i in range(SHARDS)]
    index = {"weight_map": {name: file for file, part in zip(files, parts) for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(write(folder / file, {name: shapes[name] for name in part}) for file, part in zip(files, parts))


def load_ours(path: Path) -> Flux:
    return components.load(weights.pick("flux", "--flux", path), "cpu", torch.bfloat16)


def load_rival(path: Path) -> Flux:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    state = {key: tensor for file in files for key, tensor in load_file(file).items()}
    depth = len({key.split(".")[1] for key in state if key.startswith(("double_blocks.", "transformer_blocks."))})
    with torch.device("meta"):
        model = Flux(FluxParams(depth=depth, depth_single_blocks=2 * depth))
    if path.is_dir():
        state = {name: join(namings.flux_from_diffusers(name, state), state) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model


def join(rows: list[namings.Rows], state: dict[str, torch.Tensor]) -> torch.Tensor:
    pieces = [state[row.key][row.start : row.stop] for row in rows]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def measure(way: str, path: Path) -> None:
    """In a process of its own: load, touch every page, print the seconds and the peak in bytes."""
    begin = time.perf_counter()
    model = {"ours": load_ours, "rival": load_rival}[way](path)
    for tensor in model.state_dict().values():
        tensor.flatten().view(torch.uint8)[::4096].sum()
    seconds = time.perf_counter() - begin
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps([seconds, 1024 * int(peak)]))


def run(way: str, path: Path) -> tuple[float, float]:
    command = [sys.executable, __file__, "--measure", way, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(layout: str, path: Path, size: int, repeats: int) -> None:
    """One line of the table: medians over `repeats` runs each, in turns, after a first one for the page cache."""
    runs = [(run("ours", path), run("rival", path)) for _ in range(repeats + 1)][1:]
    seconds, peaks = zip(*[list(zip(*pair)) for pair in runs])
    ours, rival = (statistics.median(column) for column in zip(*seconds))
    our_peak, rival_peak = (max(column) / size for column in zip(*peaks))
    print(
        f"| {layout} | {size / 1e9:.2f} GB | {ours:.2f} s | {rival:.2f} s | {ours / rival:.2f} "
        f"| {our_peak:.2f} x | {rival_peak:.2f} x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write the checkpoints (default: the system's temporary folder)")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], Path(args.measure[1]))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| layout | size | ours | rival | ratio | our peak / size | rival's |\n|---|---|---|---|---|---|---|")
    shapes = flux_shapes(args.gigabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file, shards = Path(folder, "flux.safetensors"), Path(folder, "transformer")
        compare("BFL", file, write(file, shapes), args.repeats)
        file.unlink()
        compare("diffusers", shards, write_shards(shards, diffusers_shapes(shapes)), args.repeats)


if __name__ == "__main__":
    main()
