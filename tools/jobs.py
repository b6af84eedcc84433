"""Many images in one run: names, seeds, sweeps, shards, and which are finished."""

import glob
import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec
import torch
import yaml
from PIL import Image
from torch import Tensor

from errors import MISSING, InputError, flag, info, parse_yaml, print_error, shown, warn
from formats.known import doubts
from model.tokenizers import T5Tokenizer
from regional.layout import Layout
from regional.mask import RegionTokens
from settings import MODEL_KEYS, Settings
from tools.flags import Command, Output, names_in
from tools.metadata import (
    Metadata,
    check_suffix,
    check_writable,
    image_metadata,
    is_sheet,
    matches,
    metadata_in,
    run_metadata,
    save_image,
    save_json,
    save_tensor,
)

POCKET = "this is the built-in pocket model; FLUX.1-dev: --model black-forest-labs/FLUX.1-dev"
SWEPT = (
    "base_ratio", "mask_inject_steps", "double_inject_interval", "single_inject_interval",
    "guidance", "steps", "method", "preset", "region_max_sequence_length",
)  # fmt: skip
Labels = tuple[str, ...]  # of swept settings, each key=value
Reader = Callable[[Path | None, dict[str, Any]], Layout]


class Job(NamedTuple):
    """One image. source: its layout. files: to be written, by content; all hold the metadata.
    sheet: its sweep's contact sheet."""

    source: Path | None
    layout: Layout
    seed: int
    sweep: Labels
    files: dict[str, Path]
    sheet: Path | None


class Worker(NamedTuple):
    """This process among those that split a run. is_shared: there are others."""

    index: int
    count: int
    is_shared: bool


class Failures:
    """Counts layouts that fail while others continue; of one alone the run fails."""

    def __init__(self, is_alone: bool):
        self.count = 0
        self.is_alone = is_alone

    @contextmanager
    def caught(self) -> Iterator[None]:
        try:
            yield
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if self.is_alone or not (isinstance(error, InputError | OSError) or is_full(error)):
                raise
            print_error(error)
            self.count += 1


def advice(error: BaseException, settings: Settings) -> str:
    """What to do about a lack of memory."""
    tips = ["--offload blocks"] if settings.offload != "blocks" else []
    tips += ["--quantize fp8"] if settings.quantize != "fp8" else []
    reason = " ".join(str(error).split())
    return f"{reason} Try {' or '.join(tips) or 'a smaller image'}."


def is_full(error: BaseException) -> bool:
    """Is it a lack of memory? On a CPU torch raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate" in str(error)


class Tolerant:
    """A text stream that never ends a run: what it can't take is lost, as if closed;
    characters it can't show are escaped."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Stop:
    """Ctrl-C and SIGTERM: while an image is drawn, the first lets the running step finish.
    Elsewhere, and the second time, they interrupt."""

    is_asked = False
    is_drawing = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, self.ask) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before):
                signal.signal(kind, handler)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        self.is_drawing = True
        try:
            yield
        finally:
            self.is_drawing = False

    def ask(self, *signal_and_frame: object) -> None:
        if self.is_asked or not self.is_drawing:
            raise KeyboardInterrupt
        self.is_asked = True
        info("generate.py: stopping after this step")


def layout_files(output: Output) -> list[Path | None]:
    """Those of --layout, or an image that embeds one; None if flags are the layout."""
    files = []
    for path in output.layout:
        is_folder = os.path.isdir(path)
        found = sorted([*path.glob("[!.]*.yaml"), *path.glob("[!.]*.yml")]) if is_folder else [path]
        if not found:
            raise InputError("--layout", path, "there is no layout (.yaml, .yml) in this folder")
        files += found
    return files or [output.config_from_metadata]


def worker_of(shard: str | None, is_parallel: bool) -> Worker:
    """By --shard, torchrun or SLURM; --parallel uses their variables otherwise."""
    if is_parallel:
        return Worker(0, 1, is_shared=True)
    env = os.environ
    for rank, size in ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"):
        if shard is None and rank in env and size in env:
            shard = f"{env[rank]}/{env[size]}"
    index, _, count = ("0/1" if shard is None else shard).partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError("--shard", shard, "expected INDEX/COUNT, e.g. 0/4")
    return Worker(int(index), int(count), is_shared=int(count) > 1)


def device_of(name: str) -> str:
    """Of several GPUs, each torchrun or SLURM process has its own."""
    own = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    has_choice = name in ("auto", "cuda") and torch.cuda.device_count() > 1
    return f"cuda:{own}" if own and has_choice else name


def plan_jobs(
    files: list[Path | None], command: Command, read: Reader, worker: Worker, failures: Failures
) -> list[Job]:  # fmt: skip
    """This worker's images. read: a file's layout with some keys overridden. InputError for
    what could not be written."""
    output = command.output
    jobs = []
    for file in files:
        with failures.caught():
            layouts = {}
            for swept in swept_settings(output.sweep) if output.sweep else [{}]:
                labels = tuple(f"{key}={value}" for key, value in swept.items())
                layouts[labels] = read(file, swept)
            jobs += jobs_of(file, layouts, output, worker, is_one=len(files) == 1)
    check_names(jobs, inputs_of(command, {id(job.layout): job.layout for job in jobs}.values()))
    for sheet in {job.sheet for job in jobs} - {None}:
        check_writable(sheet, output.overwrite or is_sheet(sheet))
    jobs = jobs[worker.index :: worker.count]
    for job in jobs if len(files) == 1 else ():
        is_finished(job, output, None)
    return jobs


def swept_settings(sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """The layout keys of each combination of KEY=A,B, KEY=C,D ..."""
    found = {}
    for text in sweeps:
        key, _, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if key not in SWEPT or not values:
            raise InputError("--sweep", text, f"expected one of {', '.join(SWEPT)}, = and values")
        if key in found:
            raise InputError("--sweep", text, "this key is swept twice")
        try:
            found[key] = [parse_yaml(x, yaml.SafeLoader, "") for x in values.split(",")]
        except InputError:
            raise InputError("--sweep", text, "its values are not valid YAML") from None
    return [dict(zip(found, values)) for values in itertools.product(*found.values())]


def jobs_of(
    file: Path | None, layouts: dict[Labels, Layout], output: Output, worker: Worker, is_one: bool
) -> list[Job]:
    """The jobs of one layout file. layouts: by what is swept."""
    seeds = list(dict.fromkeys(output.seed)) or [next(iter(layouts.values())).seed]
    if None in seeds and worker.is_shared:
        source = file or "the command line"
        raise InputError("seed", MISSING, "is missing; workers can't choose one each", source)
    for seed in seeds:
        if seed is not None and not 0 <= seed < 2**63:
            raise InputError("--seed", seed, "expected a number from 0 to 2^63 - 1")
    images = [(sweep, seed) for sweep in layouts for seed in seeds]
    path_of = partial(fill, file.stem if file else "picture", has_seeds=len(seeds) > 1)
    sheet_of = partial(path_of, ("sheet",), has_seeds=False)

    def is_free(template: str) -> bool:
        paths = [path_of(*image, template) for image in images]
        paths += [sheet_of(None, template)] * bool(output.sweep)
        return not any(path.exists() for path in paths)

    template = output.output or "{name}.png"
    if not output.output and is_one and not worker.is_shared:
        templates = (f"{{name}}_{i}.png" for i in range(1, 10000))
        template = next(filter(is_free, [template, *templates]))
    check_suffix("--output", template)
    latents = output.save_latents
    if latents:
        check_suffix("--save-latents", latents, (".safetensors",))
    chosen = random.randrange(2**32)
    jobs = []
    for sweep, seed in images:
        if seed is None:  # An existing image, with its own seed, may be finished.
            existing = path_of(sweep, chosen, template)
            found = None if output.overwrite else metadata_in(existing)
            seed = found["seed"] if found else chosen
        image = path_of(sweep, seed, template)
        files = {"image": image}
        if latents:
            files["latents"] = path_of(sweep, seed, latents)
        if output.metadata:
            files["metadata"] = image.with_suffix(".json")
        if output.attention_maps:
            files["maps"] = output.attention_maps / f"{image.stem}.safetensors"
        sheet = sheet_of(seed, template) if output.sweep else None
        jobs.append(Job(file, layouts[sweep], seed, sweep, files, sheet))
    return jobs


def fill(name: str, sweep: Labels, seed: int | None, template: str, has_seeds: bool) -> Path:
    """A template's path; what tells images apart and has no field is appended."""
    rest = [] if "{sweep}" in template else [*sweep]
    rest += [f"{seed}"] if has_seeds and "{seed}" not in template else []
    path = template.replace("{name}", name).replace("{seed}", f"{seed}")
    path = Path(path.replace("{sweep}", "_".join(sweep)))
    return path.with_stem("_".join([path.stem, *rest]))


def inputs_of(command: Command, layouts: Iterable[Layout]) -> dict[str, str]:
    """What a run reads, by its real path, and how it is called."""
    files = {file: "a layout" for file in layout_files(command.output) if file}
    for key in MODEL_KEYS:
        place = Path(getattr(command.settings, key) or "pocket")
        files |= {file: f"a file of {flag(key)}" for file in (place, *place.glob("*"), *place.glob("*/*"))}
    for layout in layouts:
        files |= {name: key for key, name in names_in(msgspec.to_builtins(layout))}
    return {os.path.realpath(file): what for file, what in files.items()}


def check_output(key: str, path: Path, inputs: dict[str, str]) -> None:
    """InputError for a file that the run reads; --overwrite must not destroy it."""
    if what := inputs.get(os.path.realpath(path)):
        raise InputError(key, path, f"this run reads that file, as {what}; choose another name")


def check_names(jobs: list[Job], inputs: dict[str, str]) -> None:
    """InputError if a file would be written twice, or is an input."""
    taken = set()
    for job in jobs:
        for path in (*job.files.values(), *step_sheets(job, inputs), job.sheet):
            if path:
                check_output("--output", path, inputs)
        for path in map(os.path.realpath, job.files.values()):
            if path in taken:
                problem = "several images would have this name; put {name} or {seed} into it"
                raise InputError("--output", Path(path), problem)
            taken.add(path)


def step_sheets(job: Job, inputs: dict[str, str]) -> list[Path]:
    """The inputs that lie where a job's attention maps are drawn."""
    if "maps" not in job.files:
        return []
    folder = os.path.realpath(job.files["maps"].parent)
    name = re.escape(job.files["maps"].stem) + r"_step\d+\.png"
    found = [Path(path) for path in inputs if os.path.dirname(path) == folder]
    return [path for path in found if re.fullmatch(name, path.name)]


def is_first(settings: Settings) -> bool:
    """Does this process print and write? Of a parallel run, one does."""
    return not settings.parallel or os.environ.get("RANK", "0") == "0"


def announce(jobs: list[Job], worker: Worker, pipeline: Any) -> None:
    if worker.count > 1:
        info(f"worker {worker.index} of {worker.count}: {len(jobs)} images")
    seeds = dict.fromkeys(str(job.seed) for job in jobs)
    info(f"seed {', '.join(seeds)}")
    checkpoint = pipeline.checkpoint
    if checkpoint.name == "pocket":
        info(POCKET)
    layouts = {id(job.layout): job.layout.resolved(pipeline.defaults) for job in jobs}
    t5 = T5Tokenizer(checkpoint.t5_tokenizer)
    for doubt in doubts(list(layouts.values()), checkpoint.flux, t5):
        warn(doubt)


def unfinished(group: list[Job], pipeline: Any, output: Output) -> list[tuple[Job, Metadata]]:
    """One layout's images still to be made, with their metadata."""
    layout = group[0].layout.filled(pipeline.defaults)
    has_maps = group[0].layout.resolved(pipeline.defaults).regional_steps() > 0
    missing = []
    for job in group:
        image = shown(job.files["image"])
        if "maps" in job.files and not has_maps:
            info(f"{image}: no step of it is regional, so it has no attention maps")
            del job.files["maps"]
        metadata = image_metadata(layout, job.seed, run_metadata(pipeline))
        if is_finished(job, output, metadata):
            info(f"{image}: exists already, made by the same settings; it is kept")
            print(image)
        else:
            missing.append((job, metadata))
    return missing


def report_step(ends: list[float], start: float) -> None:
    """Note when a step ended; say when the run's first did. start: of the program."""
    if not ends and torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.perf_counter())
    if len(ends) == 1:
        info(f"the first step ended {ends[0] - start:.1f} s after the start")


def save(
    job: Job, image: Image.Image, latents: Tensor, maps: Any, tokens: RegionTokens | None,
    metadata: Metadata, is_embedded: bool,
) -> None:  # fmt: skip
    """Write a job's files, the image last: where it is, the others are, too."""
    if "latents" in job.files:
        save_tensor("latents", latents, metadata, job.files["latents"])
    if "metadata" in job.files:
        save_json(metadata, job.files["metadata"])
    if maps:
        from tools.sheets import save_maps

        save_maps(maps, job.files["maps"].with_suffix(""), image, tokens.prompts, metadata)
    save_image(image, metadata if is_embedded else None, job.files["image"])


def is_finished(job: Job, output: Output, metadata: Metadata | None) -> bool:
    """Do all files of an image exist with this metadata, or any if that is None? InputError for
    others in the way."""
    is_same = partial(matches, metadata=metadata) if metadata else metadata_in
    others = [file for file in job.files.values() if not is_same(file)]
    maps = job.files.get("maps")
    if maps in others:
        maps.parent.mkdir(parents=True, exist_ok=True)
        sheets = maps.parent.glob(f"{glob.escape(maps.stem)}_step*.png")
        others += [sheet for sheet in sheets if not is_same(sheet)]  # a killed run left the others
    for file in others:
        check_writable(file, output.overwrite)
    return not others and not output.overwrite
