"""What regional control can be measured by: random layouts for the pocket model, and what a picture shows of them.

A case is a layout together with what every region should show. `judge` looks at the picture alone (detect.py) and at
the case; it does not know by which method, or by which settings, the picture was made.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pocket.detect import LEAST_FIT, Looks, Seen, grown, nearest_of, nearest_tones, see
from pocket.scenes import BACKGROUNDS, COLORS, Scene, draw, place, random_looks, split
from regional.layout import Layout, Region

SIZE = 256
JUST_VISIBLE = 2.3  # a just noticeable difference of two colours side by side, in CIE L*a*b* (Mahy et al. 1994)
KINDS = ("boxes", "overlapping boxes", "free forms", "overlapping free forms")


class Case(NamedTuple):
    """A layout, what each region should show, each region's pixels (R, H, W) bool, and the background asked for."""

    layout: Layout
    wanted: list[Looks]
    areas: np.ndarray
    background: str


# ------------------------------------------------------------------------------------------------ random layouts


def random_case(seed: int, regions: int, kind: str = "boxes", folder: Path | None = None) -> Case:
    """One of KINDS on SIZE x SIZE pixels. Half of the regions leave a margin to the background, but overlapping boxes
    none. Free forms are written as mask pictures to `folder`."""
    rng = np.random.default_rng([seed, regions])
    background = str(rng.choice(list(BACKGROUNDS)))
    cells = []
    while len(cells) < regions:
        cells = split(rng, SIZE, SIZE, regions, least=64 if regions <= 8 else 48)
    wanted = [Looks(*random_looks(rng)) for _ in cells]
    margins = rng.random(regions) < 0.5
    free, overlap = "free" in kind, 16 * ("overlapping" in kind)
    if free:
        areas = free_forms(rng, cells, margins)
        areas = np.stack([grown(area, overlap // 2) for area in areas])  # so that neighbours overlap by all of it
    else:
        boxes = [
            widen(box, overlap) if overlap else shrink(rng, box) if margin else box
            for box, margin in zip(cells, margins)
        ]
        areas = np.stack([filled(box) for box in boxes])
    shapes = []
    for i in range(regions):
        if free:
            path = folder / f"{kind} {regions} {seed} {i}.png"
            own = folder / f"{os.getpid()}.png"  # another process may be reading the file
            Image.fromarray(areas[i].astype(np.uint8) * 255).save(own)
            own.replace(path)
            shapes.append({"mask": str(path)})
        else:
            shapes.append({"box": tuple(boxes[i])})
    prompts = [f"a {w.pattern} {w.color} {w.shape}" for w in wanted]
    on = f"on a {background} background"
    layout = Layout(
        prompt=f"{', '.join(prompts)} {on}", background_prompt=f"a {background} background",
        width=SIZE, height=SIZE, seed=seed,
        regions=tuple(Region(prompt=f"{prompt} {on}", **shape) for prompt, shape in zip(prompts, shapes)),
    )  # fmt: skip
    return Case(layout, wanted, areas, background)


def shrink(rng: np.random.Generator, box: tuple[int, ...]) -> list[int]:
    """Take up to 32 pixels off each side, on the token grid, while 64 are left."""
    x0, y0, x1, y1 = box
    for _ in range(2):
        x0 += 16 * int(rng.integers(0, 2)) * (x1 - x0 > 64)
        x1 -= 16 * int(rng.integers(0, 2)) * (x1 - x0 > 64)
        y0 += 16 * int(rng.integers(0, 2)) * (y1 - y0 > 64)
        y1 -= 16 * int(rng.integers(0, 2)) * (y1 - y0 > 64)
    return [x0, y0, x1, y1]


def widen(box: tuple[int, ...], pixels: int) -> list[int]:
    """Move the right and the lower side into the neighbours."""
    x0, y0, x1, y1 = box
    return [x0, y0, min(SIZE, x1 + pixels), min(SIZE, y1 + pixels)]


def filled(box: tuple[int, ...]) -> np.ndarray:
    area = np.zeros((SIZE, SIZE), dtype=bool)
    x0, y0, x1, y1 = box
    area[y0:y1, x0:x1] = True
    return area


def free_forms(rng: np.random.Generator, cells: list[tuple[int, ...]], margins: np.ndarray) -> np.ndarray:
    """Each cell as a rounded form with a wavy border, (R, SIZE, SIZE) bool, disjoint; with a margin or without."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    waves = [Image.fromarray(rng.normal(0, 9, (6, 6)).astype(np.float32)) for _ in range(2)]
    dx, dy = (np.asarray(wave.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for wave in waves)
    distances = []
    for x0, y0, x1, y1 in cells:
        across = (x + dx - (x0 + x1) / 2) / (x1 - x0) * 2
        down = (y + dy - (y0 + y1) / 2) / (y1 - y0) * 2
        distances.append(across**4 + down**4)
    distances = np.stack(distances)
    mine = distances.argmin(0)[None] == np.arange(len(cells))[:, None, None]
    return mine & (~margins[:, None, None] | (distances < 1))


# ------------------------------------------------------------------------------------------------ what a picture shows


def judge(picture: np.ndarray, case: Case) -> dict[str, float]:
    """Measures of a picture (H, W, 3) uint8, each a mean over the layout; NaN where there is nothing to measure.

    color, pattern, both, shape, all: the share of regions that show it; both: color and pattern. A region is looked at
        where no other one is. strict: the share whose shape is right and not deformed.
    leakage: of the object pixels in a region, the share in a color that others ask for and it does not.
    duplicates: looks (color and pattern) seen in more regions than ask for them, as a share of the regions.
    background: of the pixels in no region, the share nearest to the background asked for.
    seams: the mean step between two pixels across a region border, over that across other edges of the token grid.
    visible: the share of region borders that can be seen in the background: of the pieces one token long with no object
        near, those whose two sides, 4 pixels deep, differ by more than JUST_VISIBLE.
    cut: of the pairs of pixels across region borders, the share where an object ends just there.
    coherence: how much the background differs between regions: the standard deviation of its mean, of 255 levels.
    """
    color, _ = nearest_tones(picture)
    alone = case.areas & (case.areas.sum(0) == 1)
    found = [see(picture, area) or Seen(Looks("", "", ""), 0) for area in alone]
    seen = [each.looks for each in found]
    right = np.array([[a == b for a, b in zip(s, w)] for s, w in zip(seen, case.wanted)])
    is_clean = np.array([each.fit >= LEAST_FIT for each in found])
    names = list(COLORS)
    leaks = []
    for i, area in enumerate(alone):
        objects = color[area & (color >= 0)]
        others = {w.color for w in case.wanted} - {case.wanted[i].color}
        leaks.append(np.isin(objects, [names.index(c) for c in others]).mean() if len(objects) else 0.0)
    asked, shown = ([looks[:2] for looks in every] for every in (case.wanted, seen))
    extra = sum(max(0, shown.count(looks) - asked.count(looks)) for looks in set(asked))
    uncovered = ~case.areas.any(0)
    return {
        "color": right[:, 0].mean(), "pattern": right[:, 1].mean(), "both": right[:, :2].all(1).mean(),
        "shape": right[:, 2].mean(), "strict": (right[:, 2] & is_clean).mean(), "all": right.all(1).mean(),
        "leakage": float(np.mean(leaks)), "duplicates": extra / len(asked),
        "background": is_background(picture, case.background)[uncovered].mean() if uncovered.sum() > 500 else np.nan,
        "coherence": coherence(picture, color, alone), **borders(picture.astype(float), color, case.areas),
    }  # fmt: skip


def is_background(picture: np.ndarray, name: str) -> np.ndarray:
    tones = np.array(list(BACKGROUNDS.values()) + list(COLORS.values()))
    return nearest_of(picture, tones) == list(BACKGROUNDS).index(name)


def borders(picture: np.ndarray, color: np.ndarray, areas: np.ndarray) -> dict[str, float]:
    """`seams`, `visible` and `cut`, from the pairs of pixels across the edges of the token grid."""
    steps, differences, border, objects, near = [], [], [], [], []
    lab = cielab(picture)
    for turned in False, True:
        of_both = picture, lab, color >= 0, areas.transpose(1, 2, 0)
        p, tones, c, a = (x.swapaxes(0, 1) if turned else x for x in of_both)
        edges = np.arange(16, SIZE, 16)
        border.append((a[8::16, edges - 8] != a[8::16, edges + 8]).any(2))  # token centres decide
        steps.append(np.abs(p[:, edges] - p[:, edges - 1]).mean(2))
        objects.append(c[:, edges].astype(int) + c[:, edges - 1])
        before, after = (in_pieces(tones, edges, depth).mean((1, 3)) for depth in (range(-4, 0), range(4)))
        differences.append(np.linalg.norm(before - after, axis=2))
        near.append(in_pieces(c, edges, range(-4, 4)).any((1, 3)))
    steps, differences, border, objects, near = map(np.stack, (steps, differences, border, objects, near))
    if not border.any():
        return {"seams": np.nan, "visible": np.nan, "cut": np.nan}
    pixels, empty = border.repeat(16, axis=1), border & ~near
    return {
        "seams": steps[pixels].mean() / steps[~pixels].mean(),
        "visible": (differences[empty] > JUST_VISIBLE).mean() if empty.any() else np.nan,
        "cut": (objects[pixels] == 1).mean(),
    }


def in_pieces(x: np.ndarray, edges: np.ndarray, depth: range) -> np.ndarray:
    """The columns of x (H, W, ...) at these distances from the edges, in pieces one token long: (pieces, 16, edges,
    depth, ...)."""
    beside = x[:, edges[:, None] + np.array(depth)]
    return beside.reshape(SIZE // 16, 16, *beside.shape[1:])


def cielab(picture: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 255 levels to CIE L*a*b* under D65, where distances are about as large as they look."""
    x = picture / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.moveaxis(linear @ to_xyz.T / to_xyz.sum(1), -1, 0)
    x, y, z = (np.where(v > (6 / 29) ** 3, np.cbrt(v), v * (29 / 6) ** 2 / 3 + 4 / 29) for v in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def coherence(picture: np.ndarray, color: np.ndarray, areas: np.ndarray) -> float:
    means = [picture[area & (color < 0)].mean(0) for area in areas if (area & (color < 0)).sum() > 100]
    return float(np.std(means, axis=0).mean()) if len(means) > 1 else np.nan


def drawn(case: Case) -> np.ndarray:
    """What was asked for, drawn by hand. The measures of it are what a perfect picture would have."""
    return draw(wanted_scene(case))


def wanted_scene(case: Case) -> Scene:
    """What was asked for, each object in the box of the part that is its region's alone."""
    rng, things = np.random.default_rng(case.layout.seed), []
    for looks, area in zip(case.wanted, case.areas & (case.areas.sum(0) == 1)):
        rows, columns = area.any(1).nonzero()[0], area.any(0).nonzero()[0]
        things.append(place(rng, looks, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
    return Scene(SIZE, SIZE, case.background, tuple(things))
