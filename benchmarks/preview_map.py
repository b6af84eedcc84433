"""How the pocket VAE's latents become RGB in the previews of each step: RGB in extensions/preview.py.

python benchmarks/preview_map.py
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from extensions.preview import by_pixel
from pipeline import Pipeline
from regional.reader import read_layout
from sampler.flow import pack
from tools.metadata import run_metadata

LAYOUTS = ("eight", "map", "mask", "overlap", "polygon", "poster", "strength")


def main() -> None:
    pipeline = Pipeline()
    rows = []
    colors = []
    for name in LAYOUTS:
        for seed in (1, 2):
            prepared = pipeline.prepare(read_layout(ROOT / f"examples/{name}.yaml", {"steps": 8}, 256))
            latents = pipeline.denoise(prepared, seed)
            size = (latents.shape[3], latents.shape[2])
            image = pipeline.decode(latents).resize(size, Image.Resampling.BOX)
            rows.append(by_pixel(pack(latents)[0], size[1] // 2, size[0] // 2).reshape(-1, 17))
            colors.append(np.asarray(image, dtype=float).reshape(-1, 3))
    x = np.concatenate(rows)
    y = np.concatenate(colors)
    rgb = np.linalg.lstsq(x, y)[0].round()
    rest = ((x @ rgb).clip(0, 255) - y).var() / y.var()
    print(f"POCKET = {run_metadata(pipeline)['inputs']['ae']!r}  # {1 - rest:.3f} of the variance")
    print(*(" ".join(f"{value:.0f}" for value in row) for row in rgb.T), sep="\n")


if __name__ == "__main__":
    main()
