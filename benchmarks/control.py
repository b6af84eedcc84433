"""Regional control, measured: does every region show what its own prompt says, and at what price?

    python benchmarks/control.py             # everything; Ctrl-C writes the rows that are whole, a new run goes on
    python benchmarks/control.py --methods   # the comparison of methods alone, a third of the images
    python benchmarks/control.py --quick     # 4 regions in boxes alone, under 2 minutes; exit code 1 below 85 %

The pocket model draws random layouts (pocket/judge.py) by several methods: `plain`, the base prompt alone, which
names every object and no place; `rpg`, a whole picture for each region, put together in every step; `regional`, this
program's, and variants of it. The same layouts and seeds for all. The sweeps have layouts of their own, 1000 to 1029;
settings chosen there are compared on others, 4000 to 4049, and variants of the chosen one on 4100 to 4119; those appear
nowhere else.

Writes docs/control/: tables.md (methods), sweeps.md (sweeps and variants), both as json too, plots and contact sheets
of the first layouts. The single results are kept in benchmarks/run/control.jsonl; another checkpoint needs a new file.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import weights  # noqa: E402
from benchmarks.intervals import Mean, mean_of  # noqa: E402
from benchmarks.variants import StepCache, hard_binding, one_way, open_images, texts_at_corners  # noqa: E402
from formats import components  # noqa: E402
from model.attention import Block  # noqa: E402
from model.transformer import Flux  # noqa: E402
from pipeline import Pipeline  # noqa: E402
from pocket.judge import Case, drawn, judge, random_case  # noqa: E402
from regional import sampling  # noqa: E402
from regional.extension import Extension  # noqa: E402
from regional.layout import PRESETS, Layout  # noqa: E402
from regional.mask import region_tokens, stage_ratios  # noqa: E402
from tools import cost  # noqa: E402
from tools.cost import resolved  # noqa: E402
from tools.sheets import contact_sheet  # noqa: E402

RUN, DOCS = ROOT / "benchmarks" / "run", ROOT / "docs" / "control"
KINDS = ("boxes", "overlapping boxes", "free forms")
REGIONS = (2, 4, 8, 16)
SWEPT_REGIONS = (2, 4, 8)
MANY = (4, 8, 16)
MEASURES = (
    "both", "color", "pattern", "shape", "strict", "all", "leakage", "duplicates", "background", "seams", "visible",
    "cut", "coherence", "cost",
)  # fmt: skip
NO_FRACTIONS = ("seams", "coherence", "cost")
PAIRED = ("both", "shape", "all", "leakage", "background", "seams", "cut", "cost")


class Setting(NamedTuple):
    """How a layout is drawn: a method and its settings; masked_blocks, where it is not all of them, by name. strength,
    feather and opacity are those of every region."""

    method: str
    base_ratio: float = 0.3
    mask_inject_steps: str = "40%"
    masked_blocks: str = "all"
    region_length: int | str = 64
    strength: float = 1
    feather: float = 0
    overlap: str = "share"
    opacity: float = 1
    base_steps: str = "100%"
    variant: str = ""

    def __str__(self) -> str:
        if self.method == "plain":
            return "plain"
        parts = [self.method, f"T {self.mask_inject_steps}", f"beta {self.base_ratio:g}"]
        parts += [f"base branch {self.base_steps}"] if self.base_steps != "100%" else []
        parts += [f"{self.masked_blocks} blocks"] if self.masked_blocks != "all" else []
        parts += [f"{self.region_length} text tokens"] if self.region_length != 64 else []
        parts += [f"strength {self.strength:g}"] if self.strength != 1 else []
        parts += [f"feather {self.feather:g}"] if self.feather else []
        parts += [f"overlap {self.overlap}"] if self.overlap != "share" else []
        parts += [f"opacity {self.opacity:g}"] if self.opacity != 1 else []
        return ", ".join(parts + [self.variant] * bool(self.variant))


# Which blocks are masked; the others are open. The pocket model has 2 double and 5 single blocks.
MASKED_BLOCKS: dict[str, Callable[[Block], bool]] = {
    "all": lambda block: True,
    "every 2nd": lambda block: block.index % 2 == 0,
    "double": lambda block: block.kind == "double",
    "single": lambda block: block.kind == "single",
    "early single": lambda block: block.kind == "single" and block.index < 2,
    "middle single": lambda block: block.kind == "single" and 2 <= block.index < 4,
    "late single": lambda block: block.kind == "single" and block.index >= 4,
    "late two single": lambda block: block.kind == "single" and block.index >= 3,
    "double and early single": lambda block: block.kind == "double" or block.index < 2,
    "no": lambda block: False,
}
VARIANTS = {  # which are not the published method
    "": {},
    "shared stream": {"base_stream": "shared"},
    "open image attention": {"image_attention": "open"},
}
# Not settings of the program: by the extensions of benchmarks/variants.py.
AT_CORNERS = "texts at corners"
EXPERIMENTS: dict[str, Callable[[Case, int, Flux], list[Extension]]] = {
    AT_CORNERS: lambda case, prompts, flux: [texts_at_corners(case, prompts)],
    "one-way image attention": lambda case, prompts, flux: [one_way()],
    "late images open": lambda case, prompts, flux: [open_images(MASKED_BLOCKS["late two single"])],
    "early images open": lambda case, prompts, flux: [open_images(MASKED_BLOCKS["double"])],
    "bound for 1 step": lambda case, prompts, flux: [hard_binding(1, len(case.wanted))],
    "bound for 2 steps": lambda case, prompts, flux: [hard_binding(2, len(case.wanted))],
    "cache .1": lambda case, prompts, flux: [StepCache(flux, 0.1).extend],
    "cache .2": lambda case, prompts, flux: [StepCache(flux, 0.2).extend],
}


# What becomes of the regional stages, (end, base ratio of each region): patched, not settings either.
Stages = list[tuple[int, list[float]]]
STAGES: dict[str, Callable[[Stages], Stages]] = {
    "from step 1 on": lambda stages: [(1, [1.0] * len(stages[0][1])), *stages],
    "from step 2 on": lambda stages: [(2, [1.0] * len(stages[0][1])), *stages],
    "beta from 0 to 0.5": lambda stages: ramp(stages, 0, 0.5),
    "beta from 0.3 to 0": lambda stages: ramp(stages, 0.3, 0),
}


def ramp(stages: Stages, first: float, last: float) -> Stages:
    end, ratios = stages[-1]
    values = np.linspace(first, last, end).tolist()
    return [(step + 1, [values[step]] * len(ratios)) for step in range(end)]


PLAIN = Setting("plain")
PARAMS = components.flux_params(weights.find("pocket").flux)


def layout_of(case: Case, setting: Setting, steps: int) -> Layout:
    own = {"strength": setting.strength, "feather": setting.feather, "opacity": setting.opacity}
    is_masked = MASKED_BLOCKS[setting.masked_blocks]
    depths = {"double": PARAMS.depth, "single": PARAMS.depth_single_blocks}
    blocks = {
        f"{kind}_blocks": tuple(i for i in range(depth) if is_masked(Block(kind, i))) for kind, depth in depths.items()
    }
    return msgspec.structs.replace(
        case.layout, steps=steps, region_max_sequence_length=setting.region_length, method=setting.method,
        base_ratio=setting.base_ratio, mask_inject_steps=setting.mask_inject_steps, base_steps=setting.base_steps,
        **blocks, overlap=setting.overlap,
        regions=tuple(msgspec.structs.replace(region, **own) for region in case.layout.regions),
        **VARIANTS.get(setting.variant, {}),
    )  # fmt: skip


@functools.cache
def cost_of(job: "Job") -> float:
    """The matrix products of the whole image, in those of plain steps; NaN for what extensions do."""
    setting = job.setting
    if setting is None or setting.variant in EXPERIMENTS:
        return math.nan
    layout = layout_of(case_of(job.seed, job.regions, job.kind), setting, job.steps)
    layout = resolved(msgspec.structs.replace(layout, max_sequence_length=64), PARAMS)
    if setting.method == "plain":
        return 1.0
    change = STAGES.get(setting.variant, lambda stages: stages)
    with patch.object(cost, "stage_ratios", lambda *given: change(stage_ratios(*given))):
        *regional, (steps, plain, _) = cost.stages(layout, PARAMS, region_tokens(layout))
    total = start = 0
    for end, flops, _ in regional:
        total += (end - start) * flops
        start = end
    return (total + (steps - start) * plain) / (steps * plain)


class Model:
    """The pocket model, loaded once a process."""

    def __init__(self, dtype: torch.dtype):
        self.exact = Pipeline("pocket", device="cpu", dtype="float32")  # encodes and decodes
        self.flux = Pipeline("pocket", device="cpu", dtype=str(dtype).removeprefix("torch."))

    def draw(self, case: Case, setting: Setting, steps: int) -> np.ndarray:
        """The image (H, W, 3) uint8."""
        layout = layout_of(case, setting, steps)
        prepared = self.exact.prepare(layout)
        extensions = []
        if setting.variant in EXPERIMENTS:
            flux = self.flux.parts.get("flux")
            extensions = EXPERIMENTS[setting.variant](case, len(prepared.tokens.prompts), flux)
        change = STAGES.get(setting.variant, lambda stages: stages)
        with patch.object(sampling, "stage_ratios", lambda *given: change(stage_ratios(*given))):
            latents = self.flux.denoise(prepared, layout.seed, extensions)
        return np.asarray(self.exact.decode(latents))


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


@functools.lru_cache(maxsize=64)
def case_of(seed: int, regions: int, kind: str) -> Case:
    return random_case(seed, regions, kind, RUN / "masks")


def picture_of(job: Job) -> np.ndarray:
    case = case_of(job.seed, job.regions, job.kind)
    return drawn(case) if job.setting is None else model.draw(case, job.setting, job.steps)


def measure(job: Job) -> tuple[str, dict[str, float]]:
    return job.key, judge(picture_of(job), case_of(job.seed, job.regions, job.kind))


def run(jobs: list[Job], workers: int, keep: Path | None) -> dict[str, dict[str, float]]:
    """The measures of each job, by its key. What `keep` holds is not done again; what is done is added to it."""
    results = dict(map(json.loads, keep.read_text().splitlines())) if keep and keep.exists() else {}
    results = {
        key: found for key, found in results.items() if found.keys() >= set(MEASURES) - {"cost"}
    }  # not an older judge's
    missing = [job for job in dict.fromkeys(jobs) if job.key not in results]
    (RUN / "masks").mkdir(parents=True, exist_ok=True)
    if not missing:
        return results
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (jobs[0].dtype,)) as pool,
        open(keep or os.devnull, "a") as file,
    ):
        try:
            for key, measures in tqdm(pool.map(measure, missing, chunksize=4), total=len(missing), disable=None):
                results[key] = measures
                print(json.dumps([key, measures]), file=file, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    return results


# ------------------------------------------------------------------------------------------------ what is compared

STEPS, DTYPE = 10, "bfloat16"  # all shares are whole steps; on 40 layouts 12 steps were as accurate as 24
PUBLISHED = Setting("regional")
EQUAL = Setting("regional", base_ratio=0.1)  # to RPG_BEST, in base ratio and regional steps
RPG_BEST = Setting("rpg", base_ratio=0.1)
RAG = EQUAL._replace(variant="bound for 2 steps")
STEPS_AND_RATIOS = [
    Setting("regional", beta, T) for T in ("20%", "40%", "60%", "80%", "100%") for beta in (0.0, 0.1, 0.3)
]
RULES = ("", "one-way image attention", "late images open", "early images open", "open image attention")
SWEEPS = {  # title: the kind of layouts, the numbers of regions, the settings
    "Base ratio and regional steps": ("boxes", SWEPT_REGIONS, [PLAIN, *STEPS_AND_RATIOS]),
    "The same by composition (RPG)": (
        "boxes", SWEPT_REGIONS, [Setting("rpg", beta, T) for T in ("40%", "60%") for beta in (0.0, 0.1, 0.3)],
    ),
    "Which blocks are masked": (
        "boxes", SWEPT_REGIONS, [PUBLISHED._replace(masked_blocks=blocks) for blocks in MASKED_BLOCKS],
    ),
    "Strength of the regions' texts": (
        "boxes", SWEPT_REGIONS, [EQUAL._replace(strength=strength) for strength in (0, 0.25, 0.5, 1, 2, 4)],
    ),
    "Feather": ("boxes", SWEPT_REGIONS, [EQUAL._replace(feather=feather) for feather in (0, 32, 64, 96)]),
    "Text tokens of each region": (
        "boxes", SWEPT_REGIONS, [PUBLISHED._replace(region_length=length) for length in (64, 32, 16)],
    ),
    "Which image tokens see each other": (
        "boxes", MANY, [EQUAL._replace(mask_inject_steps=T, variant=rule) for T in ("40%", "60%") for rule in RULES],
    ),
    "Overlap": (
        "overlapping boxes", MANY,
        [EQUAL._replace(mask_inject_steps=T, overlap=overlap)
         for T in ("40%", "60%", "80%") for overlap in ("share", "last", "smallest")]
        + [EQUAL._replace(mask_inject_steps="60%", overlap="last", opacity=opacity) for opacity in (0.95, 0.8, 0.5)],
    ),
    "Free forms": (
        "free forms", MANY,
        [EQUAL._replace(mask_inject_steps=T, variant=rule) for T in ("40%", "60%", "80%") for rule in RULES[:2]],
    ),
    "When regions begin, and ratios that change": (
        "boxes", MANY, [EQUAL._replace(variant=name) for name in ("", *STAGES)],
    ),
    "No base branch in the later regional steps": (
        "boxes", REGIONS, [EQUAL._replace(mask_inject_steps=T, base_steps="40%") for T in ("60%", "80%")],
    ),
    "Binding and caching": (
        "boxes", MANY,
        [EQUAL._replace(variant=name) for name in ("", "bound for 1 step", "bound for 2 steps", "shared stream")],
    ),
}  # fmt: skip


def control(regions: int) -> Setting:
    """The preset, chosen by the sweeps."""
    settings = dict(PRESETS["control"])
    return Setting("regional", region_length=settings.pop("region_max_sequence_length"), **settings)


CURVES: dict[str, Callable[[int], Setting]] = {
    "plain": lambda regions: PLAIN,
    "RPG-style, beta 0.1": lambda regions: RPG_BEST,
    "regional, published": lambda regions: PUBLISHED,
    "regional, preset control": control,
}
SWEEP_SEEDS, SEEDS, VARIANT_SEEDS = range(1000, 1030), range(4000, 4050), range(4100, 4120)
OF_PRESET: dict[str, dict[str, object]] = {  # what becomes of the preset's settings, one at a time
    "beta 0": {"base_ratio": 0.0, "base_steps": "100%"},
    "base branch throughout": {"base_steps": "100%"},
    "all text tokens": {"region_length": 64},
    "one-way": {"variant": "one-way image attention"},
    "late open": {"variant": "late images open"},
    "begins at step 1": {"variant": "from step 1 on"},
    "bound for 2 steps (RAG)": {"variant": "bound for 2 steps"},
}
IF_OVERLAPPING: dict[str, dict[str, object]] = {
    "share": {"overlap": "share"},
    "last": {"overlap": "last"},
    "opacity 0.8": {"overlap": "last", "opacity": 0.8},
}


def variants_of(kind: str, regions: int) -> list[Setting]:
    """The preset, then each variant of it alone."""
    changes = OF_PRESET | (IF_OVERLAPPING if kind == "overlapping boxes" else {})
    preset = control(regions)
    return list(dict.fromkeys([preset, *(preset._replace(**change) for change in changes.values())]))


def earlier(regions: int) -> Setting:
    """The preset of earlier versions, chosen on boxes alone."""
    share = {"overlap": "share", "base_steps": "100%", "mask_inject_steps": "40%" if regions <= 6 else "60%"}
    return control(regions)._replace(**share)


class Row(NamedTuple):
    kind: str
    regions: int
    setting: Setting | None
    seeds: range

    def jobs(self, steps: int = STEPS, dtype: str = DTYPE) -> list[Job]:
        return [Job(self.kind, self.regions, seed, self.setting, steps, dtype) for seed in self.seeds]


def methods() -> dict[str, list[Row]]:
    """Title -> rows of tables.md."""
    found = {}
    for kind in KINDS:
        more = {"boxes": [EQUAL], "overlapping boxes": [earlier]}.get(kind, [])
        found[f"Methods: {kind}"] = [
            Row(kind, regions, setting(regions) if callable(setting) else setting, SEEDS)
            for regions in REGIONS
            for setting in (None, PLAIN, PUBLISHED, *more, control, RPG_BEST, RAG)
        ]
    found["Positions of the regions' texts"] = [
        Row("boxes", regions, control(regions)._replace(variant=variant), SEEDS)
        for regions in (2, 4, 8, 16)
        for variant in ("", AT_CORNERS)
    ]
    return found


def sweeps() -> dict[str, list[Row]]:
    """Title -> rows of sweeps.md."""
    found = {}
    for kind in KINDS:
        found[f"Variants of the preset: {kind}"] = [
            Row(kind, regions, setting, VARIANT_SEEDS) for regions in REGIONS for setting in variants_of(kind, regions)
        ]
    for title, (kind, counts, settings) in SWEEPS.items():
        found[title] = [Row(kind, regions, each, SWEEP_SEEDS) for regions in counts for each in settings]
    return found


# ------------------------------------------------------------------------------------------------ what is written


def values_of(row: Row, name: str, results: dict[str, dict[str, float]]) -> list[float]:
    """A measure of each layout; the cost of the first ten."""
    if name == "cost":
        return [cost_of(job) if i < 10 else math.nan for i, job in enumerate(row.jobs())]
    return [results[job.key][name] for job in row.jobs()]


def summary(row: Row, results: dict[str, dict[str, float]]) -> dict[str, Mean]:
    """Each measure's mean over the layouts and its interval."""
    return {name: mean_of(values_of(row, name, results), is_fraction=name not in NO_FRACTIONS) for name in MEASURES}


def differences(title: str, rows: list[Row], results: dict[str, dict[str, float]]) -> str:
    """Each row less its preset's, on the same layouts with the same seeds."""
    lines = [f"## {title}: less the preset", "", "| regions | setting | " + " | ".join(PAIRED) + " |"]
    lines.append("|" + "---|" * (len(PAIRED) + 2))
    for row in rows:
        preset = row._replace(setting=control(row.regions))
        if row.setting in (None, preset.setting) or preset not in rows:
            continue
        cells = []
        for name in PAIRED:
            pairs = zip(values_of(row, name, results), values_of(preset, name, results))
            mean = mean_of([one - other for one, other in pairs], is_fraction=False)
            cells.append("" if np.isnan(mean.value) else f"{mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}]")
        lines.append(f"| {row.regions} | {row.setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(title: str, rows: list[Row], results: dict[str, dict[str, float]]) -> str:
    lines = [f"## {title}", "", "| regions | setting | both (95 %) | " + " | ".join(MEASURES[1:]) + " |"]
    lines.append("|" + "---|" * (len(MEASURES) + 2))
    for row in rows:
        means = summary(row, results)
        cells = [str(means["both"])]
        cells += ["" if np.isnan(means[name].value) else f"{means[name].value:.3g}" for name in MEASURES[1:]]
        lines.append(f"| {row.regions} | {row.setting or 'drawn by hand'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def whole(rows: list[Row], results: dict[str, dict[str, float]]) -> list[Row]:
    return [row for row in rows if all(job.key in results for job in row.jobs())]


def plot(axis, x: list[float], means: list[Mean], label: str) -> None:
    """A curve with its intervals, in an axis of matplotlib."""
    errors = np.transpose([mean.errors for mean in means])
    axis.errorbar(x, [mean.value for mean in means], errors, label=label, capsize=2, marker=".")


def plot_accuracy(results: dict[str, dict[str, float]]) -> None:
    """Both attributes right against the number of regions."""
    import matplotlib.pyplot as plt  # in requirements-dev.txt; the measuring does not need it

    compared = methods()
    kinds = [kind for kind in KINDS if whole(compared[f"Methods: {kind}"], results)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.2), sharey=True, squeeze=False)
    for kind, axis in zip(kinds, axes[0]):
        rows = whole(compared[f"Methods: {kind}"], results)
        for name, setting in CURVES.items():
            curve = [row for row in rows if row.setting == setting(row.regions)]
            if curve:
                means = [summary(row, results)["both"] for row in curve]
                plot(axis, [row.regions for row in curve], means, name)
        axis.set(title=kind, xlabel="regions", ylim=(0, 1.03))
    axes[0][0].set_ylabel("color and pattern right")
    axes[0][0].legend(fontsize=7)
    figure.savefig(DOCS / "accuracy.png", dpi=100, bbox_inches="tight")


def plot_sweep(results: dict[str, dict[str, float]]) -> None:
    """What base ratio and regional steps do to accuracy and to the borders."""
    import matplotlib.pyplot as plt

    measures = ("both", "seams", "cut")
    figure, axes = plt.subplots(len(SWEPT_REGIONS), len(measures), figsize=(12, 9), layout="constrained")
    for regions, line in zip(SWEPT_REGIONS, axes):
        for measure_, axis in zip(measures, line):
            swept = STEPS_AND_RATIOS
            for beta in sorted({setting.base_ratio for setting in swept}):
                rows = [Row("boxes", regions, each, SWEEP_SEEDS) for each in swept if each.base_ratio == beta]
                rows = whole(rows, results)
                means = [summary(row, results)[measure_] for row in rows]
                shares = [float(row.setting.mask_inject_steps.rstrip("%")) for row in rows]
                if rows:
                    plot(axis, shares, means, f"beta {beta:g}")
            axis.set(title=f"{regions} regions: {measure_}", xlabel="T, % of the steps")
    axes[0][0].legend(fontsize=7)
    figure.savefig(DOCS / "sweep.png", dpi=100, bbox_inches="tight")


def draw_sheet(kind: str, regions: int) -> None:
    """The first layouts of a table, by every setting in it; not the best."""
    settings = dict.fromkeys(row.setting for row in methods()[f"Methods: {kind}"])
    rows = {
        str(setting or "drawn by hand"): [
            Image.fromarray(picture_of(Job(kind, regions, seed, setting, STEPS, DTYPE))).resize((128, 128))
            for seed in SEEDS[:8]
        ]
        for setting in settings
    }
    contact_sheet(rows).save(DOCS / f"{kind.replace(' ', '_')}_{regions}.jpg", quality=85)


def write_page(name: str, heading: str, tables: dict[str, list[Row]], results: dict[str, dict[str, float]]) -> None:
    """docs/control/NAME.md and NAME.json, of the rows that are whole."""
    text, numbers = [f"# {heading}", f"Checkpoint {checkpoint()}."], {}
    for title, rows in tables.items():
        if rows := whole(rows, results):
            text.append(markdown(title, rows, results))
            if title.startswith(("Methods", "Variants")):
                text.append(differences(title, rows, results))
            numbers[title] = [
                {"kind": row.kind, "regions": row.regions, "setting": str(row.setting or "drawn by hand")}
                | {
                    name: [None if np.isnan(x) else round(x, 4) for x in mean]
                    for name, mean in summary(row, results).items()
                }
                for row in rows
            ]
    (DOCS / f"{name}.md").write_text("\n\n".join(text) + "\n")
    (DOCS / f"{name}.json").write_text(json.dumps(numbers, indent=0) + "\n")


def checkpoint() -> str:
    """The beginning of the SHA-256 of the transformer's file."""
    with open(weights.find("pocket").flux.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def write_all(results: dict[str, dict[str, float]], methods_alone: bool) -> None:
    """All that docs/control/ holds, of the rows that are whole."""
    DOCS.mkdir(parents=True, exist_ok=True)
    write_page("tables", "Regional control, measured", methods(), results)
    plot_accuracy(results)
    if not methods_alone:
        write_page("sweeps", "Regional control: sweeps, and variants of the preset", sweeps(), results)
        plot_sweep(results)
    start_worker(DTYPE)
    for kind, regions in ("boxes", 4), ("boxes", 16), ("overlapping boxes", 4), ("free forms", 8):
        draw_sheet(kind, regions)


def quick(workers: int) -> int:
    """Prints one table; 0 if 85 % of the regions of 4 show what they should."""
    seeds = range(3000, 3024)
    rows = [Row("boxes", 4, setting, seeds) for setting in (None, PLAIN, PUBLISHED, control(4))]
    jobs = [job for row in rows for job in row.jobs()]
    results = run(jobs, workers, None)
    print(markdown("4 regions in boxes", rows, results))
    return int(summary(rows[-1], results)["both"].value < 0.85)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.quick:
        return quick(args.workers)
    jobs = []
    compared = methods() if args.methods else methods() | sweeps()
    for rows in compared.values():  # settings of one case side by side: it is encoded once
        jobs += sorted((job for row in rows for job in row.jobs()), key=lambda job: (job.kind, job.regions, job.seed))
    write_all(run(jobs, args.workers, RUN / "control.jsonl"), args.methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
