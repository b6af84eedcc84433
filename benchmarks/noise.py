"""Does a draft at half the size show what the full size will? By the noise that both begin from.

    python benchmarks/noise.py      # prints a table; 24 layouts of 4 regions, preset control

The same layout and seed at 128 x 128 and at 256 x 256 pixels. Both images are averaged to 8 x 8 pixels. The
correlation is that of these, and, as the layout alone makes images alike, that of what the seed adds: an image's
difference from the mean of its layout's images over all seeds. grid: both take their noise from one array, by its
middle. pyramid: the draft's noise is the mean of 2 x 2 of the full one's, scaled to variance 1.
"""

import sys
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.control import DTYPE, STEPS, Model, control  # noqa: E402
from benchmarks.intervals import mean_of  # noqa: E402
from pocket.judge import SIZE, Case, random_case  # noqa: E402
from regional import sampling  # noqa: E402
from sampler.flow import noise  # noqa: E402

LAYOUTS, SEEDS = range(700, 724), range(4)
GRID = 2 * SIZE


def cropped(width: int, height: int, seed: int) -> Tensor:
    left, top = (GRID - width) // 16, (GRID - height) // 16
    return noise(GRID, GRID, seed)[:, :, top : top + height // 8, left : left + width // 8]


def averaged(width: int, height: int, seed: int) -> Tensor:
    if width == SIZE:
        return noise(width, height, seed)
    return 2 * torch.nn.functional.avg_pool2d(noise(2 * width, 2 * height, seed), 2)


def halved(case: Case) -> Case:
    regions = tuple(
        msgspec.structs.replace(region, box=tuple(x / 2 for x in region.box)) for region in case.layout.regions
    )
    layout = msgspec.structs.replace(case.layout, width=SIZE // 2, height=SIZE // 2, regions=regions)
    return case._replace(layout=layout)


def small(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((8, 8), Image.Resampling.BOX), dtype=float).ravel()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def main() -> None:
    torch.set_num_threads(1)
    model = Model(getattr(torch, DTYPE))
    print("| noise | correlation | by the seed |\n|---|---|---|")
    for name, source in ("today's", noise), ("grid", cropped), ("pyramid", averaged):
        sampling.noise = source
        whole, own = [], []
        for number in LAYOUTS:
            full = random_case(number, 4)
            images = []
            for case in full, halved(full):
                seeded = [msgspec.structs.replace(case.layout, seed=1000 * number + seed) for seed in SEEDS]
                drawn = [model.draw(case._replace(layout=layout), control(4), STEPS) for layout in seeded]
                images.append(np.stack([small(picture) for picture in drawn]))
            large, draft = images
            whole.append(np.mean([correlation(a, b) for a, b in zip(large, draft)]))
            large, draft = large - large.mean(0), draft - draft.mean(0)
            own.append(np.mean([correlation(a, b) for a, b in zip(large, draft)]))
        print(f"| {name} | {mean_of(whole, False)} | {mean_of(own, False)} |", flush=True)


if __name__ == "__main__":
    main()
