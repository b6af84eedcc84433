"""The images of the README: three layouts by their seeds 1 to 5, as generate.py draws them.

python benchmarks/samples.py     # writes docs/samples.png
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from pipeline import Pipeline  # noqa: E402
from regional.reader import read_layout  # noqa: E402
from tools.sheets import contact_sheet  # noqa: E402

LAYOUTS = ("layout.yaml", "examples/overlap.yaml", "examples/poster.yaml")
SIDE = 176  # pixels, in the sheet


def main() -> None:
    pipeline = Pipeline("pocket")
    rows = {}
    for name in LAYOUTS:
        layout = read_layout(ROOT / name, {}, pipeline.defaults.size)
        rows[name] = [pipeline(layout, seed=seed).resize((SIDE, SIDE)) for seed in range(1, 6)]
    contact_sheet(rows).save(ROOT / "docs" / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
