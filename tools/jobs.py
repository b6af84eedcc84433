"""Many images in one run: their names, seeds, sweeps and shards, and what of them is made already."""

import argparse
import glob
import itertools
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image

from errors import MISSING, InputError, info, print_error
from pipeline import Pipeline, Prepared, with_model_defaults
from regional.layout import Layout
from regional.reader import naming, read_layout
from tools.metadata import SUFFIXES, carried_by, check_writable, is_made_by, made_of, settings, write
from tools.sheets import contact_sheet

SWEPT = (
    "base_ratio", "mask_inject_steps", "double_inject_interval", "single_inject_interval", "guidance", "steps",
    "method", "preset", "region_max_sequence_length",
)  # fmt: skip


MODEL_FLAGS = ("model", "flux", "t5", "clip", "ae")


CHUNK = 100  # layouts whose prompts are encoded together: at full size some 2 GB of memory


class Names(NamedTuple):
    """What goes into a picture's name: its layout's, and where there are others, the swept settings and the seed."""

    name: str
    sweep: tuple[str, ...]
    seed: tuple[str, ...]


class Job(NamedTuple):
    """One picture. file: its layout's. sheet: where the sheet of its sweep goes."""

    names: Names
    file: Path | None
    layout: Layout
    seed: int
    output: Path
    latents: Path | None
    sheet: Path | None


class Failures:
    """A context in which one layout of many may fail: it is reported, and the others go on. Of one alone it is the
    program's error."""

    def __init__(self, args: argparse.Namespace):
        # of several processes that draw together one can't go on without the others
        self.count, self.alone = 0, len(layout_files(args)) <= 1 or bool(args.parallel)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if self.alone or not isinstance(error, (InputError, OSError, torch.OutOfMemoryError)):
            return False
        print_error(error)
        self.count += 1
        return True


def missing_of(group: list[Job], pipeline: Pipeline, args: argparse.Namespace) -> list[tuple[Job, Prepared, dict]]:
    """Those pictures of one layout that are still to be made, with the layout prepared and what makes them."""
    checkpoint, layout = pipeline.checkpoint, with_model_defaults(group[0].layout, pipeline.checkpoint.flux)
    files = {part: str(getattr(checkpoint, part).path) for part in ("flux", "t5", "clip", "ae")}
    used = {"model": checkpoint.name, "files": files, "dtype": str(pipeline.dtype), "torch": torch.__version__}
    # what changes a picture's last bits, or more
    how = {"fp8": pipeline.fp8, "compile": pipeline.compile, "processes": pipeline.parallel and pipeline.parallel.size}
    used |= {key: value for key, value in how.items() if value}
    used |= {"attention": args.attention} if args.attention != "auto" else {}
    used["given"] = {key: value for key in MODEL_FLAGS if (value := getattr(args, key))}
    missing = []
    for job in group:
        made_by = settings(layout, job.seed, used)
        others = [file for file in files_of(job, args) if not is_made_by(file, made_by)]
        if others or args.overwrite:
            check_files(others, args)
            missing.append((job, made_by))
        else:
            info(f"{job.output}: exists already, made by the same settings; it is kept")
            print(job.output)
    if not missing:
        return []
    with naming(group[0].file, flags_of(args)):
        prepared = pipeline.prepare(group[0].layout)
    return [(job, prepared, made_by) for job, made_by in missing]


def is_writer(pipeline: Pipeline) -> bool:
    return not pipeline.parallel or pipeline.parallel.rank == 0


# ------------------------------------------------------------------------------------------------ settings and files


def layout_files(args: argparse.Namespace) -> list[Path | None]:
    """The files that --layout names, of a folder all in it; [None] where the command line alone says what to draw."""
    files = []
    for path in args.layout:
        if not os.path.isdir(path):
            files.append(path)
        elif found := sorted(file for kind in ("yaml", "yml") for file in path.glob(f"*.{kind}")):
            files += found
        else:
            raise InputError("--layout", path, "there is no layout in this folder, no .yaml and no .yml")
    return files or [None]


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key in Layout.__struct_fields__ and key != "seed"}


def plan_jobs(args: argparse.Namespace, size: int, failures: Failures) -> list[Job]:
    """The pictures of this run, or of this worker of several. `size` is the model's default width and height. Refuses,
    before any work, what could not be written."""
    sweeps = [parse_sweep(text) for text in args.sweep]
    if len(dict(sweeps)) < len(sweeps):
        raise InputError("--sweep", ", ".join(args.sweep), "a key is swept twice")
    metadata = made_of(args.config_from_metadata) if args.config_from_metadata else None
    index, count = shard_of(args)
    together, jobs, several = count > 1 or bool(args.parallel), [], len(layout_files(args)) > 1
    for file in layout_files(args):
        file = file or args.config_from_metadata
        with failures:
            layouts = {}
            for values in itertools.product(*(values for _, values in sweeps)):
                swept = {key: value for (key, _), value in zip(sweeps, values)}
                label = tuple(f"{key}={value}" for key, value in swept.items())
                layouts[label] = read_layout(file, flags_of(args) | swept, size, metadata)
            jobs += jobs_of(file, layouts, args, several, together)
    outputs = [path for job in jobs for path in (job.output, job.latents) if path]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise InputError("--output", twice, "several images would have this name; put {name} or {seed} into it")
    read = {os.path.abspath(file) for file in layout_files(args) if file}
    for path in (path for job in jobs for path in files_of(job, args) if os.path.abspath(path) in read):
        raise InputError("--output", path, "that is a layout of this run")
    if not several:
        for job in jobs:
            # if what is there and says how it was made is to be kept is seen later
            check_files([file for file in files_of(job, args) if not carried_by(file)], args)
    for sheet in {job.sheet for job in jobs if job.sheet}:
        check_writable(sheet, args.overwrite)
    return jobs[index::count]


def jobs_of(
    file: Path | None, layouts: dict[tuple[str, ...], Layout], args: argparse.Namespace, several: bool, sharded: bool
) -> list[Job]:
    seeds = list(dict.fromkeys(getattr(args, "seed", None) or [next(iter(layouts.values())).seed]))
    for seed in seeds:
        if seed is None and sharded:
            raise InputError("seed", MISSING, "missing; workers that share images can't each choose one", file)
        if seed is not None and not 0 <= seed < 2**63:
            raise InputError("--seed", seed, "expected a number from 0 to 2^63 - 1")
    name = file.stem if file else "picture"
    runs = [
        (layout, seed, Names(name, swept, (str(seed),) if len(seeds) > 1 else ()))
        for swept, layout in layouts.items()
        for seed in seeds
    ]
    names = [names for *_, names in runs] + ([Names(name, ("sheet",), ())] if args.sweep else [])
    output = args.output or ("{name}.png" if several or sharded else free_name(names))
    if not output.lower().endswith(SUFFIXES):
        raise InputError("--output", output, f"the suffix must be one of {', '.join(SUFFIXES)}")
    if args.save_latents and not args.save_latents.endswith(".safetensors"):
        raise InputError("--save-latents", args.save_latents, "the suffix must be .safetensors")
    jobs, chosen = [], random.randrange(2**32)
    for layout, seed, names in runs:
        path = filled(output, names, chosen if seed is None else seed)
        if seed is None:  # what is there already may be finished, by the seed that it has
            seed = (carried_by(path) or {"seed": chosen})["seed"]
        latents = filled(args.save_latents, names, seed) if args.save_latents else None
        sheet = filled(output, Names(name, ("sheet",), ()), seed) if args.sweep else None
        jobs.append(Job(names, file, layout, seed, path, latents, sheet))
    return jobs


def filled(template: str, names: Names, seed: int) -> Path:
    """The path with {name}, {seed} and {sweep} filled in; what tells pictures apart and is not in it is appended."""
    rest = [mark for key in ("sweep", "seed") if f"{{{key}}}" not in template for mark in getattr(names, key)]
    for key, value in {"name": names.name, "seed": str(seed), "sweep": "_".join(names.sweep)}.items():
        template = template.replace(f"{{{key}}}", value)
    path = Path(template)
    return path.with_stem("_".join([path.stem, *rest]))


def free_name(names: list[Names]) -> str:
    """The default template, or the first of {name}_1, {name}_2 ... where nothing is in the way."""
    templates = ["{name}.png", *(f"{{name}}_{i}.png" for i in range(1, 10000))]
    return next(t for t in templates if not any(filled(t, each, 0).exists() for each in names))


def files_of(job: Job, args: argparse.Namespace) -> list[Path]:
    """All that is written of a picture, each of which carries what made it; of attention maps the numbers."""
    files = [job.output] + ([job.latents] if job.latents else [])
    files += [job.output.with_suffix(".json")] if args.metadata else []
    return files + ([args.attention_maps / f"{job.output.stem}.safetensors"] if args.attention_maps else [])


def check_files(files: list[Path], args: argparse.Namespace) -> None:
    for file in files:
        if args.attention_maps and file.parent == args.attention_maps:
            args.attention_maps.mkdir(parents=True, exist_ok=True)
            for sheet in file.parent.glob(f"{glob.escape(file.stem)}_step*.png"):
                check_writable(sheet, args.overwrite)
        check_writable(file, args.overwrite)


def shard_of(args: argparse.Namespace) -> tuple[int, int]:
    """Which worker this is, of how many: --shard, or torchrun's or SLURM's variables."""
    if args.parallel:
        return 0, 1
    env = os.environ
    text = args.shard
    if text is None:
        pairs = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
        text = next((f"{env[rank]}/{env[size]}" for rank, size in pairs if rank in env and size in env), "0/1")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError("--shard", text, "expected I/N, a number from 0 on and how many there are, such as 0/4")
    return int(index), int(count)


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    key, _, values = text.partition("=")
    key = key.strip().replace("-", "_")
    if key not in SWEPT or not values:
        raise InputError("--sweep", text, f"expected one of {', '.join(SWEPT)}, then = and values")
    try:
        return key, [yaml.safe_load(value) for value in values.split(",")]
    except yaml.YAMLError as error:
        raise InputError("--sweep", text, "its values can't be read") from error


def write_sheets(jobs: list[Job], args: argparse.Namespace) -> None:
    """Of each sweep: a column for each value of the last key, a row for each of everything else."""
    if shard_of(args)[1] > 1:
        info("no sheet is made of a sweep that several workers share")
        return
    several = len({job.seed for job in jobs}) > 1
    for path in dict.fromkeys(job.sheet for job in jobs):
        rows = {}
        for job in (job for job in jobs if job.sheet == path):
            *others, column = job.names.sweep
            row = ", ".join([*others, *([f"seed {job.seed}"] if several else [])])
            rows.setdefault(row, {})[column] = Image.open(job.output)
        pictures = {row: list(images.values()) for row, images in rows.items()}
        write(path, contact_sheet(pictures, list(next(iter(rows.values())))).save)
        print(path)
