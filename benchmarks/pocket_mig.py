"""A pocket COCO-MIG: 2 to 6 instances of our own vocabulary, drawn by each method, found and scored as COCO-MIG does.

    python benchmarks/pocket_mig.py                # writes docs/control/mig.md
    python benchmarks/pocket_mig.py --quick        # 6 images a number of instances; prints the table only

An instance is a box about as large as its object, anywhere in the image; boxes keep apart. Its category is a shape, its
attribute a color and a pattern. The detector is pocket/detect.py: connected pixels of one color are an object.

    python benchmarks/pocket_mig.py --detect IMAGE # as a detector of benchmarks/layouts.py
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.control import CURVES, DTYPE, STEPS, Model  # noqa: E402
from benchmarks.layouts import SIDE, Detections, Instance, Truth, scaled, scores  # noqa: E402
from pocket.detect import grown, nearest_tones, see  # noqa: E402
from pocket.judge import SIZE, Case  # noqa: E402
from pocket.scenes import BACKGROUNDS, COLORS, Scene, draw, place, random_looks, split  # noqa: E402
from regional.layout import Layout, Region  # noqa: E402

INSTANCES = range(2, 7)
IMAGES = 50  # a number of instances
LEAST_PIXELS = 150  # of an object
GAP = 2  # pixels on both sides of an edge between two tones


def random_image(count: int, seed: int) -> tuple[Truth, Layout, Scene]:
    """What an image of so many instances is to show, for the scorer and for the methods."""
    rng = np.random.default_rng([1902, count, seed])
    background = str(rng.choice(list(BACKGROUNDS)))
    on = f"on a {background} background"
    things = [place(rng, random_looks(rng), cell) for cell in split(rng, SIZE, SIZE, count)]
    boxes = [box_of(thing.center, thing.radius) for thing in things]
    prompts = [thing.caption for thing in things]
    instances = [
        Instance(prompt, thing.shape, prompt.removeprefix("a "), [x * SIDE / SIZE for x in box])
        for prompt, thing, box in zip(prompts, things, boxes)
    ]
    layout = Layout(
        prompt=f"{', '.join(prompts)} {on}", background_prompt=f"a {background} background",
        width=SIZE, height=SIZE, seed=seed,
        regions=tuple(Region(prompt=f"{prompt} {on}", box=box) for prompt, box in zip(prompts, boxes)),
    )  # fmt: skip
    return Truth(layout.prompt, instances), layout, Scene(SIZE, SIZE, background, tuple(things))


def box_of(center: tuple[int, int], radius: tuple[int, int]) -> tuple[int, int, int, int]:
    (x, y), (rx, ry) = center, radius
    return x - rx, y - ry, x + rx, y + ry


def objects_in(picture: np.ndarray) -> Detections:
    """Boxes of the objects in a picture (H, W, 3) uint8, by shape and by "pattern color shape"."""
    color, _ = nearest_tones(picture)
    found: Detections = {}
    objects = [near & (color == i) for i in range(len(COLORS)) for near in connected(grown(color == i, GAP))]
    for area in objects:
        if area.sum() < LEAST_PIXELS:
            continue
        rows, columns = (area.any(axis).nonzero()[0] for axis in (1, 0))
        seen = see(picture, area)
        if seen:
            box = [int(x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
            looks = seen.looks
            for name in looks.shape, f"{looks.pattern} {looks.color} {looks.shape}":
                found.setdefault(name, []).append(box)
    return found


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (H, W) bool."""
    label = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    before = None
    while before is None or (label != before).any():
        before = label
        label = spread(spread(label).T).T
    return [label == value for value in np.unique(label[label > 0])]


def spread(label: np.ndarray) -> np.ndarray:
    """The largest label of each run in a row, in all of its pixels; runs end at zeros."""
    begins = np.ones(label.shape, dtype=bool)
    begins[:, 1:] = (label[:, 1:] > 0) != (label[:, :-1] > 0)
    run = begins.cumsum().reshape(label.shape)
    largest = np.zeros(run.max() + 1, dtype=label.dtype)
    np.maximum.at(largest, run, label)
    return largest[run]


model: Model | None = None  # of this process


def start_worker() -> None:
    global model
    torch.set_num_threads(1)
    model = Model(getattr(torch, DTYPE))


def found_by(method: str | None, which: tuple[int, int]) -> Detections:
    """What the detector sees of an image: method, a name in CURVES; None is the drawing of what was asked for."""
    count, seed = which
    _, layout, scene = random_image(count, seed)
    if method is None:
        picture = draw(scene)
    else:
        picture = model.draw(Case(layout, [], None, scene.background), CURVES[method](count), STEPS)
    return scaled(objects_in(picture), SIZE)


def table(images: int, workers: int) -> str:
    lines = [
        "| method | I-SR | " + " | ".join(f"L{count}" for count in INSTANCES) + " | SR | I-mIoU |",
        "|" + "---|" * (len(INSTANCES) + 4),
    ]
    which = [(count, 5000 + i) for count in INSTANCES for i in range(images)]
    truths = {str(each): random_image(*each)[0] for each in which}
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        for method in (None, *CURVES):
            found = list(tqdm(pool.map(partial(found_by, method), which, chunksize=4), total=len(which), disable=None))
            detections = dict(zip(truths, found))
            every = scores(truths, detections)
            cells = [str(every["I-SR"])]
            for count in INSTANCES:
                own = {str(each): truths[str(each)] for each in which if each[0] == count}
                cells.append(f"{scores(own, detections)['I-SR'].value:.3f}")
            cells += [str(every["SR"]), str(every["I-mIoU"])]
            lines.append(f"| {method or 'drawn by hand'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--detect", type=Path, metavar="IMAGE")
    args = parser.parse_args()
    if args.detect:
        with Image.open(args.detect) as image:
            print(json.dumps(objects_in(np.asarray(image.convert("RGB")))))
        return
    text = table(6 if args.quick else IMAGES, args.workers)
    print(text)
    if not args.quick:
        note = f"{IMAGES} images a number of instances; means over instances or images, 95 % intervals over images."
        (ROOT / "docs" / "control" / "mig.md").write_text(f"# A pocket COCO-MIG\n\n{note}\n\n{text}\n")


if __name__ == "__main__":
    main()
