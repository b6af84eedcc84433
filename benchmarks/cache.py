"""A step cache against fewer steps: what do skipped blocks cost, at equal work?

    python benchmarks/cache.py

First-block cache (benchmarks/variants.py): where the first block's residual has moved by less than a threshold since
the other blocks were last computed, their sum is used again. The pocket model draws held-out layouts by the preset
`control` in 24 steps with a cache, and without one in fewer steps. Writes docs/control/cache.md.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import control  # noqa: E402
from benchmarks.intervals import mean_of  # noqa: E402
from benchmarks.variants import StepCache  # noqa: E402
from pocket.judge import judge  # noqa: E402

SEEDS = range(4200, 4225)
COUNTS = (4, 8)
STEPS = 24
MEASURES = ("both", "shape", "all")


class Way(NamedTuple):
    steps: int
    threshold: float = 0.0

    def __str__(self) -> str:
        return f"{self.steps} steps" + (f", cache {self.threshold:g}" if self.threshold else "")


CACHED = [Way(STEPS, threshold) for threshold in (0.1, 0.2, 0.3)]
PLAIN = [Way(steps) for steps in (24, 16, 12, 10, 8)]


def start_worker() -> None:
    control.start_worker(control.DTYPE)


def measure(task: tuple[int, int, Way]) -> dict[str, float]:
    """What the judge says, and how many steps' blocks were computed."""
    regions, seed, way = task
    case = control.case_of(seed, regions, "boxes")
    made = control.model
    layout = control.layout_of(case, control.control(regions), way.steps)
    prepared = made.exact.prepare(layout)
    cache = StepCache(made.flux.parts.get("flux"), way.threshold)
    latents = made.flux.denoise(prepared, layout.seed, [cache.extend] if way.threshold else [])
    picture = np.asarray(made.exact.decode(latents))
    return {**judge(picture, case), "computed": way.steps - cache.skipped}


def main() -> None:
    tasks = [(regions, seed, way) for regions in COUNTS for seed in SEEDS for way in CACHED + PLAIN]
    with ProcessPoolExecutor(2, get_context("spawn"), start_worker) as pool:
        found = dict(zip(tasks, pool.map(measure, tasks, chunksize=len(CACHED + PLAIN))))

    def values(regions: int, way: Way, name: str) -> np.ndarray:
        return np.array([found[regions, seed, way][name] for seed in SEEDS])

    lines = [
        "# A step cache against fewer steps",
        "",
        __doc__.split("\n\n")[2].replace(" Writes docs/control/cache.md.", "").strip(),
        "",
    ]
    lines += ["| regions | | steps computed | both (95 %) | shape | all | all, less that of as many plain steps |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for regions in COUNTS:
        for way in CACHED + PLAIN:
            computed = values(regions, way, "computed").mean()
            cells = [str(mean_of(values(regions, way, name))) for name in MEASURES]
            less = ""
            if way.threshold:
                other = min((x for x in PLAIN if x.steps >= computed), key=lambda x: x.steps)
                gain = values(regions, way, "all") - values(regions, other, "all")
                less = f"{mean_of(gain, is_fraction=False)} ({other.steps} steps)"
            lines.append(f"| {regions} | {way} | {computed:.1f} | {' | '.join(cells)} | {less} |")
    (ROOT / "docs" / "control" / "cache.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
