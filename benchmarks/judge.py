"""How far the judge of the pocket model's images can be trusted: what it reads of drawn objects, and of deformed ones.

    python benchmarks/judge.py          # writes docs/control/judge.md, in some minutes

Whole layouts are drawn as asked for and judged, as they are and after the autoencoder; the shapes of all their objects
make a confusion table. Then outlines are cut, bent, mixed and doubled, and the share that passes as clean is counted.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import weights  # noqa: E402
from benchmarks.intervals import mean_of  # noqa: E402
from formats import components  # noqa: E402
from model.autoencoder import to_uint8  # noqa: E402
from pocket.detect import LEAST_FIT, see, shape_fits  # noqa: E402
from pocket.judge import drawn, judge, random_case  # noqa: E402
from pocket.scenes import FINE, SHAPES  # noqa: E402

SEEDS = range(300, 340)
MEASURES = ("color", "pattern", "shape", "strict")
NAMES = list(SHAPES)


@torch.inference_mode()
def decoded(picture: np.ndarray, model: torch.nn.Module) -> np.ndarray:
    """What the autoencoder makes of a picture (H, W, 3) uint8."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    return to_uint8(model.decode(model.encode(x)))[0].numpy()


def measured(change) -> tuple[list[str], Counter]:
    """Lines of a table by number of regions, and how often each shape is read as which; `change` is applied to each
    drawn layout first."""
    lines = []
    read = Counter()
    for regions in 1, 2, 4, 8, 16:
        measures = []
        for seed in SEEDS:
            case = random_case(seed, regions)
            picture = change(drawn(case))
            measures.append(judge(picture, case))
            for area, wanted in zip(case.areas, case.wanted):
                seen = see(picture, area)
                shape = "nothing" if seen is None else seen.looks.shape if seen.fit >= LEAST_FIT else "deformed"
                read[wanted.shape, shape] += 1
        cells = [str(mean_of([each[name] for each in measures])) for name in MEASURES]
        lines.append(f"| {regions} | {' | '.join(cells)} |")
    return lines, read


def confusion(read: Counter) -> list[str]:
    columns = [*NAMES, "deformed", "nothing"]
    lines = [f"| drawn | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name in NAMES:
        total = sum(read[name, column] for column in columns)
        cells = [f"{read[name, column] / total:.3f}" if read[name, column] else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# ------------------------------------------------------------------------------------------------ deformed outlines


def outline(name: str, points: int = 96) -> np.ndarray:
    """Points (N, 2) at equal distances along a shape in [-1, 1] x [-1, 1]."""
    corners = np.vstack([SHAPES[name], SHAPES[name][:1]])
    along = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    wanted = np.linspace(0, along[-1], points, endpoint=False)
    return np.stack([np.interp(wanted, along, corners[:, axis]) for axis in (0, 1)], axis=1)


def filled(points: np.ndarray, radius: int) -> np.ndarray:
    """The polygon as a mask with a margin, (H, H) bool."""
    side = round(2.8 * radius)
    image = Image.new("L", (side * FINE, side * FINE))
    ImageDraw.Draw(image).polygon([tuple(p) for p in (points * radius + side / 2) * FINE], fill=255)
    return np.asarray(image.reduce(FINE)) > 127


def cut(rng: np.random.Generator, name: str, radius: int, fraction: float) -> np.ndarray:
    """Without a part at one of its four sides, as an object that ends at its region's border."""
    mask = np.rot90(filled(outline(name), radius), rng.integers(4)).copy()
    mask[: round(0.4 * radius) + round(2 * radius * fraction)] = False
    return np.rot90(mask, rng.integers(4))


def bent(rng: np.random.Generator, name: str, radius: int, amount: float) -> np.ndarray:
    """Every point moved by smooth noise whose deviation is `amount` of the radius."""
    mask = filled(outline(name), radius)
    side = len(mask)
    noise = [Image.fromarray(rng.normal(0, amount * radius, (4, 4)).astype(np.float32)) for _ in range(2)]
    moved = [np.asarray(each.resize((side, side), Image.Resampling.BICUBIC)) for each in noise]
    places = [np.rint(at + by).clip(0, side - 1).astype(int) for at, by in zip(np.mgrid[:side, :side], moved)]
    return mask[places[0], places[1]]


def mixed(rng: np.random.Generator, name: str, radius: int) -> np.ndarray:
    """Halfway to another shape."""
    own = outline(name)
    other = outline(str(rng.choice([each for each in NAMES if each != name])))
    turns = [np.roll(other, turn, axis=0) for turn in range(len(other))]
    nearest = min(turns, key=lambda turned: np.square(own - turned).sum())
    return filled((own + nearest) / 2, radius)


def doubled(rng: np.random.Generator, name: str, radius: int) -> np.ndarray:
    """Two of it that overlap, side by side."""
    mask = filled(outline(name), radius)
    mask = np.pad(mask, radius)
    down = int(rng.integers(-radius // 2, radius // 2 + 1))
    return mask | np.roll(mask, (down, round(0.7 * radius)), axis=(0, 1))


DEFORMED = {
    "as drawn": lambda rng, name, radius: filled(outline(name), radius),
    "cut by 20 %": lambda rng, name, radius: cut(rng, name, radius, 0.2),
    "cut by 30 %": lambda rng, name, radius: cut(rng, name, radius, 0.3),
    "bent a little (.15)": lambda rng, name, radius: bent(rng, name, radius, 0.15),
    "bent (.3)": lambda rng, name, radius: bent(rng, name, radius, 0.3),
    "halfway to another shape": mixed,
    "doubled": doubled,
}


def passing(radius: int, tries: int = 30) -> list[str]:
    """Lines of a table: for each kind of outline the share of each shape that is read as it and as clean."""
    lines = [f"| {2 * radius} pixels | {' | '.join(NAMES)} |", "|" + "---|" * (len(NAMES) + 1)]
    for kind, make in DEFORMED.items():
        rng = np.random.default_rng(0)
        cells = []
        for name in NAMES:
            fits = [shape_fits(make(rng, name, radius)) for _ in range(tries)]
            clean = [max(fit, key=fit.get) == name and fit[name] >= LEAST_FIT for fit in fits]
            cells.append(f"{np.mean(clean):.2f}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    model = components.load(weights.find("pocket").ae, "cpu", torch.float32)
    text = [
        "# What the judge reads of drawn truth", "",
        f"`python benchmarks/judge.py`: {len(SEEDS)} layouts of boxes a row, drawn as asked for; means over",
        "layouts with 95 % intervals. strict: the shape is right and the object fits it (`shape_fits` in",
        f"pocket/detect.py, at least {LEAST_FIT}); else it is deformed.",
    ]  # fmt: skip
    changes = {"as drawn": lambda picture: picture, "after the autoencoder": lambda picture: decoded(picture, model)}
    for title, change in changes.items():
        lines, read = measured(change)
        header = [f"| regions | {' | '.join(MEASURES)} |", "|" + "---|" * (len(MEASURES) + 1)]
        text += ["", f"## Drawn layouts, {title}", "", *header, *lines, ""]
        text += ["Shapes, all rows together:", "", *confusion(read)]
    text += ["", "## Outlines that are deformed", ""]
    text += ["The share that is read as its shape and as clean. A square cut off at a side is still a square.", ""]
    for radius in 20, 48:
        text += [*passing(radius), ""]
    (ROOT / "docs" / "control" / "judge.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
