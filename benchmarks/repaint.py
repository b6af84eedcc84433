"""Images in, measured: one region repainted, and images to start from.

    python benchmarks/repaint.py     # some 5 minutes on 2 idle cores; writes docs/control/repaint.md and repaint.jpg

The pocket model draws layouts of 4 regions in boxes (pocket/judge.py; seeds that no other table has) by the preset
`control` in 10 steps. Then region 0 asks for something else, and is repainted in that image, or all regions do, and
the image is what a new one starts from, at several `denoise`.
"""

import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import control  # noqa: E402
from benchmarks.intervals import mean_of  # noqa: E402
from pocket.detect import Looks  # noqa: E402
from pocket.judge import Case, judge, random_case  # noqa: E402
from pocket.scenes import random_looks  # noqa: E402
from regional.layout import Layout, Repaint, Start  # noqa: E402
from tools.sheets import contact_sheet  # noqa: E402

DOCS = ROOT / "docs" / "control"
SEEDS = range(5100, 5150)
REGIONS = 4
DENOISE = (0.3, 0.6, 0.9)
FEATHERS = (0, 16)


def start_worker() -> None:
    control.start_worker(control.DTYPE)


def asking_for(case: Case, wanted: list[Looks]) -> Case:
    """The same boxes, other objects."""
    prompts = [f"a {w.pattern} {w.color} {w.shape}" for w in wanted]
    on = f"on a {case.background} background"
    regions = [
        msgspec.structs.replace(region, prompt=f"{prompt} {on}") for region, prompt in zip(case.layout.regions, prompts)
    ]
    layout = msgspec.structs.replace(case.layout, prompt=f"{', '.join(prompts)} {on}", regions=tuple(regions))
    return case._replace(layout=layout, wanted=wanted)


def draw(layout: Layout) -> np.ndarray:
    made = control.model
    prepared = made.exact.prepare(layout)
    return np.asarray(made.exact.decode(made.flux.denoise(prepared, layout.seed), prepared.layout))


def images_of(seed: int) -> tuple[dict[str, np.ndarray], dict[str, Case]]:
    case = random_case(seed, REGIONS)
    rng = np.random.default_rng(seed)
    others = [Looks(*random_looks(rng)) for _ in range(REGIONS)]
    one = asking_for(case, [others[0], *case.wanted[1:]])
    every = asking_for(case, others)
    setting = control.control(REGIONS)
    layouts = [control.layout_of(each, setting, control.STEPS) for each in (case, one, every)]
    images = {"first": draw(layouts[0]), "fresh": draw(layouts[1])}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "first.png"))
        Image.fromarray(images["first"]).save(file)
        for feather in FEATHERS:
            repaint = Start(file=file, repaint=Repaint(regions=(0,), feather=feather))
            images[f"repainted, feather {feather}"] = draw(msgspec.structs.replace(layouts[1], image=repaint))
        for denoise in DENOISE:
            start = Start(file=file, denoise=denoise)
            images[f"denoise {denoise}"] = draw(msgspec.structs.replace(layouts[2], image=start))
    return images, {"first": case, "one": one, "every": every}


def measure(seed: int) -> dict[str, dict[str, float]]:
    """By image: region 0 and the others as asked now, all regions as asked first and now; pixels, borders."""
    images, cases = images_of(seed)
    inside = cases["first"].areas[0]
    found = {}
    for name, image in images.items():
        asked = cases["every"] if name.startswith("denoise") else cases["one"]
        region = asked._replace(wanted=asked.wanted[:1], areas=asked.areas[:1])
        own = judge(image, region)
        changed = (image != images["first"]).any(2)
        found[name] = {
            "region": own["both"], "region, with shape": own["all"], "seams": own["seams"], "cut": own["cut"],
            "changed outside": changed[~inside].mean(), "stays": judge(image, cases["first"])["both"],
            "follows": judge(image, asked)["both"],
            "distance": np.abs(image.astype(float) - images["first"]).mean(),
        }  # fmt: skip
    return found


def main() -> None:
    with ProcessPoolExecutor(2, get_context("spawn"), start_worker) as pool:
        found = list(pool.map(measure, SEEDS))

    def cell(image: str, name: str, is_fraction: bool = True) -> str:
        return str(mean_of([each[image][name] for each in found], is_fraction))

    repainted = [f"repainted, feather {feather}" for feather in FEATHERS]
    gains = [
        mean_of([each[name]["region"] - each["fresh"]["region"] for each in found], is_fraction=False)
        for name in repainted
    ]
    lines = ["# Repainting and images to start from", "", __doc__.split("\n\n")[2].strip().replace("\n", " "), ""]
    lines += [f"{len(SEEDS)} layouts a row, with 95 % intervals over layouts. `fresh` is a new image of the same seed."]
    lines += [
        "",
        "| region 0 asks for something else | color and pattern right | shape, too | seams of its border | cut |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name in ("fresh", *repainted):
        row = [cell(name, "region"), cell(name, "region, with shape"), cell(name, "seams", False), cell(name, "cut")]
        lines.append(f"| {name} | {' | '.join(row)} |")
    outside = max(each[repainted[0]]["changed outside"] for each in found)
    lines += ["", f"Repainted less fresh, color and pattern: {gains[0]} without a feather, {gains[1]} with 16 pixels."]
    lines += [f"Pixels outside region 0 that the first changes: {outside:.3f} of them, in the worst image."]
    lines += [
        "",
        "| all regions ask for something else | still as in the first image | as asked now | mean change, of 255 |",
    ]
    lines += ["|---|---|---|---|"]
    for denoise in DENOISE:
        name = f"denoise {denoise}"
        lines.append(f"| {name} | {cell(name, 'stays')} | {cell(name, 'follows')} | {cell(name, 'distance', False)} |")
    lines += ["", "![The first layouts](repaint.jpg)"]
    (DOCS / "repaint.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    start_worker()
    columns = [images_of(seed)[0] for seed in SEEDS[:8]]
    small = {name: [Image.fromarray(images[name]).resize((128, 128)) for images in columns] for name in columns[0]}
    contact_sheet(small).save(DOCS / "repaint.jpg", quality=85)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
