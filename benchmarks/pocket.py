"""The pocket model by itself: single objects by size and place, and, with states kept from its training, over time.

    python benchmarks/pocket.py                             # writes docs/pocket/: tables.md, curve.png
    python benchmarks/pocket.py --states pocket/run/states  # also samples over time, samples.jpg

A canvas with one object is drawn by its caption alone, without regions; 10 steps, guidance 3.5. To see whether the
model knows its shapes everywhere, the canvas is moved: its tokens get the positions that a region at that place of a
larger image has (`img_ids`), while the prompt's stay at 0, as in any image. 500 objects a row; --objects for fewer.
"""

import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.intervals import Mean, mean_of  # noqa: E402
from pipeline import Pipeline  # noqa: E402
from pocket.detect import LEAST_FIT, Looks, see  # noqa: E402
from pocket.scenes import BACKGROUNDS, random_looks  # noqa: E402
from regional.extension import Branches, Extension, Forward, Pass  # noqa: E402
from regional.layout import Layout  # noqa: E402
from tools.sheets import contact_sheet  # noqa: E402

DOCS = ROOT / "docs" / "pocket"
MEASURES = ("color", "pattern", "shape", "strict", "all")
OBJECTS = 500
Place = tuple[int, int]  # row and column of the canvas's first token


class Row(NamedTuple):
    width: int
    height: int
    place: Place = (0, 0)


SIZES = [Row(side, side) for side in (64, 96, 128, 192, 256)]
SIZES += [Row(160, 96), Row(96, 160), Row(128, 256), Row(64, 256)]
PLACES = [
    *(Row(64, 64, place) for place in ((0, 0), (0, 12), (12, 0), (6, 6), (12, 12))),
    *(Row(96, 96, place) for place in ((0, 0), (10, 0), (0, 10), (10, 6))),
    *(Row(128, 128, place) for place in ((0, 0), (0, 8), (8, 0), (8, 8))),
    *(Row(160, 96, place) for place in ((0, 0), (8, 6))),
]


def moved(place: Place) -> Extension:
    """Gives the image tokens the positions of a canvas that begins at this row and column."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        def elsewhere(given: Pass, step: int) -> torch.Tensor:
            offset = torch.tensor([0, *place], device=given.img_ids.device)
            return forward(given._replace(img_ids=given.img_ids + offset), step)

        return elsewhere

    return extend


def guided(scale: float) -> Extension:
    """Classifier-free guidance by a second pass without a prompt, for weights that have not learned it yet."""
    layout = Layout(prompt="", width=64, height=64, steps=1, method="plain", guidance=1)
    empty = pipeline.prepare(layout).conditioning.txt

    def extend(forward: Forward, branches: Branches) -> Forward:
        def both(given: Pass, step: int) -> torch.Tensor:
            without = forward(given._replace(txt=empty), step)
            return torch.lerp(without, forward(given, step), scale)

        return both

    return extend


pipeline: Pipeline | None = None  # of this process


def start_worker() -> None:
    global pipeline
    torch.set_num_threads(1)
    pipeline = Pipeline("pocket", device="cpu", dtype="bfloat16")


def wanted_of(seed: int) -> tuple[Looks, str]:
    rng = np.random.default_rng([77, seed])
    return Looks(*random_looks(rng)), str(rng.choice(list(BACKGROUNDS)))


def draw(row: Row, seed: int, by_two_passes: bool = False) -> Image.Image:
    looks, background = wanted_of(seed)
    prompt = f"a {looks.pattern} {looks.color} {looks.shape} on a {background} background"
    guidance = 1 if by_two_passes else 3.5
    layout = Layout(prompt=prompt, width=row.width, height=row.height, steps=10, method="plain", guidance=guidance)
    prepared = pipeline.prepare(layout)
    extensions = [moved(row.place)] + [guided(3.5)] * by_two_passes
    pipeline.embeddings.clear()
    return pipeline.decode(pipeline.denoise(prepared, seed, extensions))


def measure(row: Row, seed: int) -> dict[str, float]:
    looks, _ = wanted_of(seed)
    seen = see(np.asarray(draw(row, seed)))
    if seen is None:
        return dict.fromkeys(MEASURES, 0.0)
    color, pattern, shape = (a == b for a, b in zip(seen.looks, looks))
    strict = shape and seen.fit >= LEAST_FIT
    return dict(zip(MEASURES, map(float, (color, pattern, shape, strict, color and pattern and shape))))


def table(title: str, rows: list[Row], found: dict[Row, list[dict[str, float]]]) -> str:
    lines = [f"## {title}", "", f"| canvas | first token | {' | '.join(MEASURES)} |"]
    lines.append("|" + "---|" * (len(MEASURES) + 2))
    for row in rows:
        means: list[Mean] = [mean_of([each[name] for each in found[row]]) for name in MEASURES]
        lines.append(f"| {row.width} x {row.height} | {row.place} | {' | '.join(map(str, means))} |")
    return "\n".join(lines)


def plot_curve(log: str) -> None:
    """The autoencoder's PSNR and the transformer's loss over the steps, from the training's log."""
    import matplotlib.pyplot as plt  # in requirements-dev.txt; the measuring does not need it

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    decibels = re.findall(r"autoencoder step (\d+).*held out ([\d.]+) dB", log)
    left.plot(*np.array(decibels, dtype=float).T)
    left.set(title="autoencoder", xlabel="step", ylabel="PSNR on held-out scenes, dB")
    losses = np.array(re.findall(r"^step (\d+) loss ([\d.]+)", log, re.MULTILINE), dtype=float)
    right.semilogy(*losses.T)
    right.set(title="transformer and text encoders", xlabel="step", ylabel="mean loss of 100 steps")
    figure.savefig(DOCS / "curve.png", dpi=100)


def samples_over_time(states: list[Path]) -> None:
    """Eight objects by the weights of each state, pocket.train.Pocket's, named by its step; guidance by two passes."""
    from pocket.train import Pocket

    flux = pipeline.parts.get("flux")
    rows = {}
    for state in states:
        averaged = {key: value.float() for key, value in torch.load(state, weights_only=True).items()}
        model = Pocket(ROOT / "pocket" / "checkpoint")
        model.load_state_dict(averaged)
        flux.load_state_dict({key: value.bfloat16() for key, value in model.flux.state_dict().items()})
        pipeline.parts.get("t5").load_state_dict(model.t5.state_dict())
        pipeline.parts.get("clip").load_state_dict(model.clip.state_dict())
        row = Row(128, 128, (4, 4))
        images = [draw(row, seed, by_two_passes=True).resize((96, 96)) for seed in range(1, 9)]
        rows[f"step {int(state.stem):,}"] = images
    contact_sheet(rows).save(DOCS / "samples.jpg", quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=OBJECTS)
    parser.add_argument("--states", type=Path, help="a folder of averaged weights, STEP.pt")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    DOCS.mkdir(parents=True, exist_ok=True)
    plot_curve((ROOT / "pocket" / "checkpoint" / "training.log").read_text())
    rows = list(dict.fromkeys(SIZES + PLACES))
    found = {}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), start_worker) as pool:
        for row in tqdm(rows, disable=None):
            found[row] = list(pool.map(partial(measure, row), range(args.objects), chunksize=10))
    text = ["# Single objects", table("By size", SIZES, found), table("By place", PLACES, found)]
    (DOCS / "tables.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    if args.states:
        start_worker()
        samples_over_time(sorted(args.states.glob("*.pt")))


if __name__ == "__main__":
    main()
