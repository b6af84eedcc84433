"""Does every region show what its own prompt says? The pocket model on random layouts, judged by detect.py.

    python -m pocket.measure --regions 2 4 8 --layouts 50

One row for each number of regions and each setting, the same layouts and seeds in all of them. "plain" is the base
prompt alone, which names every object and no place.
"""

import argparse

import msgspec
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import generate
import weights
from model.autoencoder import to_uint8
from pocket.detect import Looks, detect
from pocket.scenes import BACKGROUNDS, random_looks, split
from regional.attention import portable_attention
from regional.layout import Layout, Region
from regional.mask import region_tokens

# name -> what it changes in the layout
SETTINGS = {
    "plain": {"mask_inject_steps": 0},
    "published: T 40%, beta 0.3": {"mask_inject_steps": "40%", "base_ratio": 0.3},
    "T 60%, beta 0.1": {"mask_inject_steps": "60%", "base_ratio": 0.1},
    "T 80%, beta 0": {"mask_inject_steps": "80%", "base_ratio": 0.0},
}


def random_layout(seed: int, regions: int, size: int = 256) -> tuple[Layout, list[Looks]]:
    """Disjoint boxes of at least 64 pixels a side, half of them with a margin around; what each should show."""
    rng = np.random.default_rng([seed, regions])
    background = str(rng.choice(list(BACKGROUNDS)))
    wanted, written, boxes = [], [], []
    while len(boxes) < regions:
        boxes = split(rng, size, size, regions, least=64)
    for box in boxes:
        looks = Looks(*random_looks(rng))
        prompt = f"a {looks.pattern} {looks.color} {looks.shape} on a {background} background"
        wanted.append(looks)
        written.append(Region(prompt=prompt, box=tuple(shrink(rng, box) if rng.random() < 0.5 else box)))
    names = ", ".join(f"a {w.pattern} {w.color} {w.shape}" for w in wanted)
    layout = Layout(
        prompt=f"{names} on a {background} background", background_prompt=f"a {background} background",
        width=size, height=size, seed=seed, regions=tuple(written),
    )  # fmt: skip
    return layout, wanted


def shrink(rng: np.random.Generator, box: tuple[int, ...]) -> list[int]:
    """Take up to 32 pixels off each side, on the token grid, while 64 are left."""
    x0, y0, x1, y1 = box
    for _ in range(2):
        x0 += 16 * int(rng.integers(0, 2)) * (x1 - x0 > 64)
        x1 -= 16 * int(rng.integers(0, 2)) * (x1 - x0 > 64)
        y0 += 16 * int(rng.integers(0, 2)) * (y1 - y0 > 64)
        y1 -= 16 * int(rng.integers(0, 2)) * (y1 - y0 > 64)
    return [x0, y0, x1, y1]


def judge(picture: np.ndarray, layout: Layout, wanted: list[Looks]) -> np.ndarray:
    """For each region: colour right, pattern right, both, shape right. (R, 4) bool."""
    rows = []
    for region, want in zip(layout.regions, wanted):
        area = np.zeros(picture.shape[:2], dtype=bool)
        x0, y0, x1, y1 = (int(v) for v in region.box)
        area[y0:y1, x0:x1] = True
        seen = detect(picture, area) or Looks("", "", "")
        color, pattern = seen.color == want.color, seen.pattern == want.pattern
        rows.append([color, pattern, color and pattern, seen.shape == want.shape])
    return np.array(rows)


class Model:
    """The whole model, loaded once; `draw` is what generate.py does for one layout."""

    def __init__(self, folder: str):
        cpu, dtype = torch.device("cpu"), torch.float32
        self.checkpoint = weights.find(folder)
        self.flux = weights.load_flux(self.checkpoint.flux, cpu, dtype)
        self.autoencoder = weights.load_autoencoder(self.checkpoint.ae, cpu, dtype)

    @torch.inference_mode()
    def draw(self, layout: Layout) -> np.ndarray:
        layout = generate.with_model_defaults(layout, self.checkpoint.flux)
        tokens = region_tokens(layout) if layout.regional_steps(layout.steps) else None
        conditioning = generate.encode(self.checkpoint, layout, tokens, torch.device("cpu"), torch.float32)
        latents = generate.sample(self.flux, layout, tokens, conditioning, layout.seed, portable_attention)
        return to_uint8(self.autoencoder.decode(latents))[0].numpy()


def interval(right: np.ndarray) -> float:
    """Half the width of a share's 95 % confidence interval, over layouts: regions of one layout are not independent."""
    return 1.96 * right.std(ddof=1) / len(right) ** 0.5


def measure(model: Model, layouts: list[tuple[Layout, list[Looks]]], name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Shares right (layouts, 4) of judge's four columns, and the pictures."""
    scores, pictures = [], []
    for layout, wanted in tqdm(layouts, desc=f"{len(layouts[0][1])} regions, {name}", disable=None, leave=False):
        pictures.append(model.draw(msgspec.structs.replace(layout, **SETTINGS[name])))
        scores.append(judge(pictures[-1], layout, wanted).mean(0))
    return np.array(scores), pictures


def sheet(rows: list[list[np.ndarray]], gap: int = 8) -> Image.Image:
    """Pictures of one size in rows, a white gap between them."""
    height, width, _ = rows[0][0].shape
    image = Image.new("RGB", ((width + gap) * len(rows[0]) - gap, (height + gap) * len(rows) - gap), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            image.paste(Image.fromarray(picture), (j * (width + gap), i * (height + gap)))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--regions", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--layouts", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--sheet", metavar="FILE", help="also show the first five layouts of each row in one picture")
    args = parser.parse_args()
    model, rows = Model(args.model), []
    print(f"{args.layouts} layouts a row, 24 steps, guidance {args.guidance}, {args.size} x {args.size}\n")
    print("| regions | setting | colour | pattern | both (95 %) | shape |\n|---|---|---|---|---|---|")
    for regions in args.regions:
        layouts = [random_layout(seed, regions, args.size) for seed in range(args.layouts)]
        layouts = [(msgspec.structs.replace(a, guidance=args.guidance), wanted) for a, wanted in layouts]
        for name in args.settings:
            scores, pictures = measure(model, layouts, name)
            rows.append(pictures[:5])
            color, pattern, both, shape = scores.mean(0)
            error = interval(scores[:, 2])
            print(
                f"| {regions} | {name} | {color:.3f} | {pattern:.3f} | {both:.3f} ± {error:.3f} | {shape:.3f} |",
                flush=True,
            )
    if args.sheet:
        sheet(rows).save(args.sheet)


if __name__ == "__main__":
    main()
