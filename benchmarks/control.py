"""Regional control, measured: does every region show what its own prompt says, and at what price?

    python benchmarks/control.py             # everything, under an hour on 2 cores; goes on where it was stopped
    python benchmarks/control.py --quick     # 4 regions in boxes alone, under 2 minutes; exit code 1 below 85 %

The pocket model draws random layouts (pocket/judge.py) by three methods: `plain`, the base prompt alone, which names
every object and no place; `rpg`, one whole picture for each region put together in every step (regional/compose.py);
`regional`, this program's. The same layouts and seeds for all of them. Writes docs/control/tables.md, tables.json, plots
and contact sheets; the single results are kept in benchmarks/run/control.jsonl.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import generate  # noqa: E402
import weights  # noqa: E402
from model.attention import Block  # noqa: E402
from model.autoencoder import to_uint8  # noqa: E402
from pocket.judge import KINDS, Case, drawn, judge, random_case  # noqa: E402
from regional.attention import portable_attention  # noqa: E402
from regional.layout import Layout  # noqa: E402
from regional.mask import region_tokens  # noqa: E402
from regional.sheets import contact_sheet  # noqa: E402

RUN, DOCS = ROOT / "benchmarks" / "run", ROOT / "docs" / "control"
REGIONS = (1, 2, 3, 4, 6, 8, 12, 16)
SWEPT_REGIONS = (2, 4, 8)
MEASURES = (
    "both", "color", "pattern", "shape", "leakage", "duplicates", "background", "seams", "step", "cut", "coherence",
    "seconds",
)  # fmt: skip


class Setting(NamedTuple):
    """How a layout is drawn: a method and its settings; masked_blocks, where it is not all of them, by name."""

    method: str
    base_ratio: float = 0.3
    mask_inject_steps: str = "40%"
    masked_blocks: str = "all"
    region_length: int = 64

    def __str__(self) -> str:
        if self.method == "plain":
            return "plain"
        parts = [self.method, f"T {self.mask_inject_steps}", f"beta {self.base_ratio:g}"]
        parts += [f"{self.masked_blocks} blocks"] if self.masked_blocks != "all" else []
        parts += [f"{self.region_length} text tokens"] if self.region_length != 64 else []
        return ", ".join(parts)


# Which blocks are masked; the others are open. The pocket model has 2 double and 5 single blocks.
MASKED_BLOCKS: dict[str, Callable[[Block], bool]] = {
    "all": lambda block: True,
    "every 2nd": lambda block: block.index % 2 == 0,
    "double": lambda block: block.kind == "double",
    "single": lambda block: block.kind == "single",
    "early single": lambda block: block.kind == "single" and block.index < 2,
    "middle single": lambda block: block.kind == "single" and 1 <= block.index < 4,
    "late single": lambda block: block.kind == "single" and block.index >= 3,
    "double and early single": lambda block: block.kind == "double" or block.index < 2,
    "no": lambda block: False,
}
PLAIN = Setting("plain")


class Model:
    """The pocket model, loaded once a process."""

    def __init__(self, dtype: torch.dtype):
        cpu = torch.device("cpu")
        self.checkpoint = weights.find("pocket")
        self.flux = weights.load_flux(self.checkpoint.flux, cpu, dtype)
        self.autoencoder = weights.load_autoencoder(self.checkpoint.ae, cpu, torch.float32)
        self.encode = functools.lru_cache(maxsize=4)(self.encode)  # a case has the same prompts in all its settings

    @torch.inference_mode()
    def draw(self, case: Case, setting: Setting, steps: int) -> tuple[np.ndarray, float]:
        """The picture (H, W, 3) uint8, and the seconds its sampling took."""
        layout = msgspec.structs.replace(case.layout, steps=steps, region_max_sequence_length=setting.region_length)
        layout = generate.with_model_defaults(layout, self.checkpoint.flux)
        conditioning = self.encode(layout)
        layout = msgspec.structs.replace(
            layout, method=setting.method, base_ratio=setting.base_ratio, mask_inject_steps=setting.mask_inject_steps
        )
        tokens = region_tokens(layout) if layout.regional_steps(steps) else None
        start = time.perf_counter()
        latents = generate.sample(
            self.flux, layout, tokens, conditioning, layout.seed, portable_attention,
            is_masked=MASKED_BLOCKS[setting.masked_blocks],
        )  # fmt: skip
        seconds = time.perf_counter() - start
        return to_uint8(self.autoencoder.decode(latents.float()))[0].numpy(), seconds


    def encode(self, layout: Layout) -> generate.Conditioning:
        tokens, cpu = region_tokens(layout), torch.device("cpu")
        encoded = generate.encode(self.checkpoint, layout, tokens, True, cpu, torch.float32)
        return generate.Conditioning(*(x.to(self.flux.img_in.weight.dtype) for x in encoded))


# ------------------------------------------------------------------------------------------------ what is measured


class Job(NamedTuple):
    """One case and one setting; `setting` None is the drawing of what was asked for."""

    kind: str
    regions: int
    seed: int
    setting: Setting | None
    steps: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.kind} | {self.regions} | {self.seed} | {self.setting} | {self.steps} | {self.dtype}"


model: Model | None = None  # of this process


def start_worker(dtype: str) -> None:
    global model
    torch.set_num_threads(1)
    model = Model(getattr(torch, dtype))


def picture_of(job: Job) -> tuple[np.ndarray, Case, float]:
    case = random_case(job.seed, job.regions, job.kind, RUN / "masks")
    if job.setting is None:
        return drawn(case), case, 0.0
    picture, seconds = model.draw(case, job.setting, job.steps)
    return picture, case, seconds


def measure(job: Job) -> tuple[str, dict[str, float]]:
    picture, case, seconds = picture_of(job)
    return job.key, {**judge(picture, case), "seconds": seconds}


def run(jobs: list[Job], workers: int, keep: Path | None) -> dict[str, dict[str, float]]:
    """The measures of each job, by its key. What `keep` holds is not done again; what is done is added to it."""
    results = dict(map(json.loads, keep.read_text().splitlines())) if keep and keep.exists() else {}
    missing = [job for job in dict.fromkeys(jobs) if job.key not in results]
    (RUN / "masks").mkdir(parents=True, exist_ok=True)
    if not missing:
        return results
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (jobs[0].dtype,)) as pool,
        open(keep or os.devnull, "a") as file,
    ):
        for key, measures in tqdm(pool.map(measure, missing, chunksize=4), total=len(missing), disable=None):
            results[key] = measures
            print(json.dumps([key, measures]), file=file, flush=True)
    return results


# ------------------------------------------------------------------------------------------------ what is compared

PUBLISHED = Setting("regional", 0.3, "40%")
BEST = Setting("regional", 0.1, "60%")
RPG_PUBLISHED = Setting("rpg", 0.3, "40%")
RPG_BEST = Setting("rpg", 0.1, "60%")
SWEEPS = {
    "Base ratio and regional steps": [
        Setting("regional", beta, T) for T in ("20%", "40%", "60%", "80%", "100%") for beta in (0.0, 0.1, 0.3, 0.5)
    ],
    "The same of RPG-style composition": [
        Setting("rpg", beta, T) for T in ("40%", "60%", "80%") for beta in (0.0, 0.1, 0.3)
    ],
    "Which blocks are masked": [PUBLISHED._replace(masked_blocks=blocks) for blocks in MASKED_BLOCKS],
    "Text tokens of each region": [PUBLISHED._replace(region_length=length) for length in (64, 32, 16)],
}
