"""What fp8 costs in exactness: each layer's error on the inputs that it has in a run, and that of whole pictures.

    python benchmarks/fp8.py                                     # the pocket model, on layout.yaml
    python benchmarks/fp8.py --model PATH --layout FILE --device cuda

A layer's error is |fp8(x) - exact(x)| / |exact(x)|, Euclidean, over a whole call, where x comes from a run of the exact
model, in its dtype; each kind of layer has the mean and the worst over its blocks and all calls. "Weights alone" leaves
the inputs as they are. Pictures are compared by their latents, likewise, and by their pixels (PSNR in dB); for scale,
the same for bfloat16 against float32 where the model runs in float32. Of the pocket model it is also counted, on random
layouts of 4 regions, how many regions show what they should (10 steps, as in benchmarks/control.py).
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.intervals import Mean, mean_of  # noqa: E402
from formats.fp8 import Fp8Linear  # noqa: E402
from pipeline import Pipeline  # noqa: E402
from pocket.judge import judge, random_case  # noqa: E402
from regional.reader import read_layout  # noqa: E402


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


class Watch:
    """Feeds every input of the exact model's layers to their twins in fp8, with the inputs rounded and without."""

    def __init__(self, exact: torch.nn.Module, small: torch.nn.Module):
        self.both, self.weights = defaultdict(list), defaultdict(list)
        for name, twin in small.named_modules():
            if isinstance(twin, Fp8Linear):
                kind = re.sub(r"\.\d+\.", ".", name, count=1)
                exact.get_submodule(name).register_forward_hook(self.look(kind, twin), with_kwargs=True)

    def look(self, kind: str, twin: Fp8Linear):
        def hook(layer, args, kwargs, out):
            multiplies = twin.multiplies
            for errors, twin.multiplies in (self.both, multiplies), (self.weights, False):
                errors[kind].append(error(twin(*args, **kwargs), out))
            twin.multiplies = multiplies

        return hook


def regions_right(pipeline: Pipeline, layouts: int) -> Mean:
    """The share of regions in which color and pattern are right."""
    right = []
    for seed in range(layouts):
        case = random_case(seed, 4)
        z = pipeline.denoise(pipeline.prepare(replace(case.layout, steps=10)), case.layout.seed)
        right.append(judge(np.asarray(pipeline.decode(z)), case)["both"])
    return mean_of(right)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--layout", type=Path, default=Path(__file__).parent.parent / "layout.yaml")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layouts", type=int, default=50, help="of the pocket model; 0 leaves them out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    args = parser.parse_args()
    found = {}
    pipelines = {
        "exact": Pipeline(args.model, device=args.device, quantize="none"),
        "fp8": Pipeline(args.model, device=args.device, quantize="fp8"),
    }
    if pipelines["exact"].dtype == torch.float32:
        pipelines["bfloat16"] = Pipeline(args.model, device=args.device, dtype="bfloat16", quantize="none")
    for name, pipeline in pipelines.items():
        prepared = pipeline.prepare(read_layout(args.layout, {}, pipeline.defaults.size))
        pipeline.drop("t5", "clip")
        latents = [pipeline.denoise(prepared, seed) for seed in args.seeds]
        found[name] = latents, [np.asarray(pipeline.decode(z)) for z in latents]
        if name == "exact":
            kept = prepared
    if args.model == "pocket" and args.layouts:
        print("| 4 regions, both right | share (95 %) |\n|---|---|")
        for name, pipeline in pipelines.items():
            print(f"| {name} | {regions_right(pipeline, args.layouts)} |", flush=True)
        print()
    watch = Watch(pipelines["exact"].parts.get("flux", kept.layout), pipelines["fp8"].parts.get("flux", kept.layout))
    pipelines["exact"].denoise(kept, args.seeds[0])

    print("| layer | weights alone: mean | worst | inputs too: mean | worst |\n|---|---|---|---|---|")
    for kind, both in watch.both.items():
        alone = watch.weights[kind]
        print(f"| {kind} | {np.mean(alone):.4f} | {max(alone):.4f} | {np.mean(both):.4f} | {max(both):.4f} |")
    print("\n| picture | seed | latents | PSNR |\n|---|---|---|---|")
    exact_latents, exact_pixels = found.pop("exact")
    for name, (latents, pixels) in found.items():
        for i, seed in enumerate(args.seeds):
            distance = psnr(pixels[i], exact_pixels[i])
            print(f"| {name} | {seed} | {error(latents[i], exact_latents[i]):.4f} | {distance:.1f} |")


if __name__ == "__main__":
    main()
