"""The images of a run: names, seeds, shards, which are finished, and how they are made."""

import contextlib
import glob
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec
import torch
from tqdm import tqdm

from errors import MISSING, InputError, flag, info, print_error, shown, warn
from formats.known import doubts
from model.tokenizers import T5Tokenizer
from regional.layout import Layout
from regional.reader import read_layout
from settings import MODEL_KEYS, Settings
from tools.flags import Command, Output, naming
from tools.metadata import (
    Metadata,
    check_suffix,
    check_writable,
    image_metadata,
    is_sheet,
    keep_timing,
    metadata_in,
    names_in,
    read_metadata,
    save_image,
    save_json,
    save_tensor,
)

CHUNK = 100  # layouts prepared together, in some 2 GB of memory at full size
SILENCE = 30  # seconds between the messages of an image that takes long
POCKET = "this is the built-in pocket model; FLUX.1-dev: --model black-forest-labs/FLUX.1-dev"
Labels = tuple[str, ...]  # of swept settings, each key=value


class Job(NamedTuple):
    """One image. source: its layout's file; origin: that file's name, or what an image that is
    made again recorded. files: to be written, by content; all hold the metadata.
    sheet: its sweep's contact sheet."""

    source: Path | None
    origin: str | None
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


class Tally:
    """What becomes of a run's images: counted, shown, and appended to --log. A failure ends the
    run if there is one layout; of several, it is reported and the others continue."""

    def __init__(self, command: Command):
        output = command.output
        self.counts = {"generated": 0, "kept": 0, "failed": 0}
        self.of_other_code = 0
        self.is_alone = len(layout_files(output)) == 1 or bool(command.settings.parallel)
        self.total = 0
        self.seconds = 0.0  # in which images were drawn
        self.start = time.perf_counter()
        self.first_step = None  # when the first step of an image ended, and the latest
        self.last_step = 0.0
        self.spoke = self.start
        self.bar = None
        self.log = None
        if (log := output.log) and is_first(command.settings):
            check_suffix("--log", log, (".jsonl",))
            check_output("--log", log, inputs_of(command, ()))
            check_writable(log, overwrite=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            self.log = open(log, "ab", buffering=0)  # Several processes may append records.

    @contextmanager
    def running(self, total: int) -> Iterator[None]:
        """total: images, without those that could not be planned."""
        self.total = total + self.counts["failed"]
        if self.total > 1:
            self.bar = tqdm(
                desc=self.place(),
                total=self.total,
                initial=self.done(),
                bar_format="{desc} |{bar}|",
                disable=None,
                leave=False,
            )
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.close()
            if self.log:
                self.log.close()
            if not isinstance(sys.exception(), Exception):  # it is said by itself
                found = [f"{count} {outcome}" for outcome, count in self.counts.items()]
                info(f"{', '.join(found)}, {time.perf_counter() - self.start:.1f} s")
                if self.of_other_code:
                    made = f"{self.of_other_code} images were made by another version of the code"
                    info(f"{made}; --update --same-code draws them again")

    @contextmanager
    def caught(self, jobs: Sequence[Job], metadata: Metadata | None = None) -> Iterator[None]:
        try:
            yield
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, InputError | OSError) or is_full(error)):
                raise
            for job in jobs:
                self.add("failed", job, metadata, error=error)
            if self.is_alone:
                raise
            print_error(error)

    def add(
        self, outcome: str, job: Job, metadata: Metadata | None, seconds: float = 0.0,
        warnings: Sequence[str] = (), error: BaseException | None = None,
    ) -> None:  # fmt: skip
        self.counts[outcome] += 1
        self.seconds += seconds
        self.spoke = time.perf_counter()
        file = job.files.get("image")
        if error is None:
            with tqdm.external_write_mode(nolock=True):
                print(shown(file), flush=True)
        if self.log:
            from tools.compare import settings_hash

            found = {
                "outcome": outcome,
                "file": file and str(file),
                "layout": job.source and str(job.source),
                "seed": job.seed,
                "settings": metadata and settings_hash(metadata),
                "seconds": round(seconds, 3),
                "warnings": [*warnings, *heard()],
                "error": error and str(error),
            }
            with suppress(OSError):  # A log that can't be written does not end a run.
                self.log.write(json.dumps(found).encode() + b"\n")
        if self.bar is not None:
            if outcome == "generated" and self.bar.disable:
                text = f"image {self.done()} of {self.total}: {shown(file)}, {seconds:.1f} s"
                info(f"{text}; {self.rate()}")
            self.bar.set_description_str(self.place(), refresh=False)
            self.bar.update()

    def done(self) -> int:
        return sum(self.counts.values())

    def place(self) -> str:
        """The image that is being drawn, and when all will be."""
        text = f"image {min(self.done() + 1, self.total)} of {self.total}"
        return f"{text}, {self.rate()}" if self.seconds else text

    def rate(self) -> str:
        rate = self.counts["generated"] / self.seconds
        left = tqdm.format_interval((self.total - self.done()) / rate)
        return f"{60 * rate:.1f} a minute, {left} left"

    def on_step(self, step: int, steps: int) -> None:
        """Note when a step ended; say when the run's first did and, in a log, that an image
        that takes long is being drawn."""
        if step in (1, steps) and torch.cuda.is_available():
            torch.cuda.synchronize()  # A GPU is behind.
        self.last_step = time.perf_counter()
        if self.first_step is None:
            info(f"the first step ended {self.last_step - self.start:.1f} s after the start")
        if step == 1:
            self.first_step = self.last_step
        if self.last_step - self.spoke > SILENCE and not sys.stderr.isatty():
            self.spoke = self.last_step
            place = f"{self.place()}: " if self.total > 1 else ""
            info(f"{place}step {step} of {steps}")


def heard() -> list[str]:
    """The warnings since the last call."""
    warnings = getattr(sys.stderr, "warnings", [])
    found = warnings[:]
    warnings.clear()
    return found


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
        self.warnings: list[str] = []
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if text.startswith("warning: "):
            self.warnings.append(text.removeprefix("warning: "))
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
    is_any = bool  # of a parallel run: is it true of any process?

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

    def check(self) -> None:
        if self.is_any(self.is_asked):
            raise KeyboardInterrupt


def with_exit_code(parse: Callable[[], Command], run: Callable[[Command, Stop], int]) -> int:
    """What `run` returns, or the code of its error, whose message is printed."""
    settings = Settings()
    stop = Stop()
    out = Tolerant(sys.stdout)
    errors = Tolerant(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            with stop.handled():
                command = parse()
                settings = command.settings
                return run(command, stop)
        except (InputError, OSError) as error:
            if is_first(settings):
                print_error(error)
            return 2 if isinstance(error, InputError) else 1
        except (MemoryError, RuntimeError) as error:
            if not is_full(error):
                raise
            info(f"generate.py: out of memory: {advice(error, settings)}")
            return 1
        except KeyboardInterrupt:
            info("generate.py: interrupted")
            return 130


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed within it."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def layout_files(output: Output) -> list[Path | None]:
    """Those of --layout, or an image that embeds one; None if flags are the layout."""
    files = []
    for path in output.layout:
        found = [path]
        if os.path.isdir(path):
            found = sorted([*path.glob("[!.]*.yaml"), *path.glob("[!.]*.yml")])
        if not found:
            raise InputError("--layout", path, "there is no layout (.yaml, .yml) in this folder")
        files += found
    return files or [output.config_from_metadata]


def worker_of(command: Command) -> Worker:
    """By --shard, torchrun or SLURM; --parallel uses their variables otherwise."""
    shard = command.output.shard
    if command.settings.parallel:
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


def read(command: Command, file: Path | None, swept: dict[str, Any], size: int) -> Layout:
    """A layout with what the command line overrides. size: default width and height."""
    given = command.overrides | swept
    with naming(file, given):
        if command.recorded is None:
            return read_layout(file, given, size)
        return read_layout(None, command.recorded | given, size)  # by the image `file`


def plan_jobs(command: Command, tally: Tally, size: int, pipeline: Any = None) -> list[Job]:
    """This worker's images. size: a layout's without one. InputError for what could not be
    written. pipeline: to tell which images it would make again; without it, mistakes of one
    layout among several are not reported yet."""
    output = command.output
    files = layout_files(output)
    worker = worker_of(command)
    sweep = {(): {}}
    if output.sweep:
        from tools.sheets import swept_settings

        sweep = swept_settings(output.sweep)
    count = len(sweep) * (len({*output.seed}) or 1)
    jobs = []
    for file in files:
        unread = [Job(file, None, None, None, (), {}, None)] * count
        is_last = pipeline or tally.is_alone
        with tally.caught(unread) if is_last else suppress(InputError):
            layouts = {}
            for labels, swept in sweep.items():
                layouts[labels] = read(command, file, swept, size)
            jobs += jobs_of(file, layouts, output, worker, len(files) == 1, pipeline)
    inputs = inputs_of(command, {id(job.layout): job.layout for job in jobs}.values())
    check_names(jobs, inputs)
    for sheet in {job.sheet for job in jobs} - {None}:
        check_writable(sheet, output.overwrite or is_sheet(sheet))
    jobs = jobs[worker.index :: worker.count]
    for job in jobs if tally.is_alone else ():
        for file in job.files.values():
            check_writable(file, output.overwrite or metadata_in(file) is not None)
    return jobs


def jobs_of(
    file: Path | None, layouts: dict[Labels, Layout], output: Output, worker: Worker,
    is_one: bool, pipeline: Any,
) -> list[Job]:  # fmt: skip
    """The jobs of one layout file. layouts: by what is swept."""
    seeds = list(dict.fromkeys(output.seed)) or [next(iter(layouts.values())).seed]
    if None in seeds and worker.is_shared:
        source = file or "the command line"
        raise InputError("seed", MISSING, "is missing; workers can't choose one each", source)
    images = [(sweep, seed) for sweep in layouts for seed in seeds]
    has_seeds = len(seeds) > 1
    name = file.stem if file else "picture"
    origin = file and file.name
    if output.config_from_metadata:
        origin = read_metadata(file).get("layout_file")
    shows_seed = has_seeds or bool(output.seed and not output.output)
    path_of = partial(fill, name, has_seeds=shows_seed)
    sheet_of = partial(fill, name, ("sheet",), has_seeds=False)

    def is_free(template: str) -> bool:
        """Is each image missing, or there with these settings?"""
        from tools.compare import matches

        for sweep, seed in images:
            path = path_of(sweep, seed, template)
            if not path.exists():
                continue
            if pipeline is None or seed is None:
                return False
            metadata = image_metadata(layouts[sweep], seed, pipeline, origin)
            if not matches(path, metadata):
                return False
        sheet = sheet_of(None, template)
        return not output.sweep or not sheet.exists() or is_sheet(sheet)

    template = output.output or "{name}.png"
    is_fixed = output.output or output.overwrite or output.update
    if is_one and not is_fixed and not worker.is_shared:
        template = next(filter(is_free, templates()))
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
            files["latents"] = fill(name, sweep, seed, latents, has_seeds)
        if output.metadata:
            files["metadata"] = image.with_suffix(".json")
        if output.attention_maps:
            files["maps"] = output.attention_maps / f"{image.stem}.safetensors"
        sheet = sheet_of(seed, template) if output.sweep else None
        jobs.append(Job(file, origin, layouts[sweep], seed, sweep, files, sheet))
    return jobs


def templates() -> Iterator[str]:
    """Names without --output."""
    yield "{name}.png"
    for i in itertools.count(1):
        yield f"{{name}}_{i}.png"


def fill(name: str, sweep: Labels, seed: int | None, template: str, has_seeds: bool) -> Path:
    """A template's path; what tells images apart and has no field is appended."""
    rest = [] if "{sweep}" in template else [*sweep]
    rest += [f"seed{seed}"] if has_seeds and "{seed}" not in template else []
    path = template.replace("{name}", name).replace("{seed}", f"{seed}")
    path = Path(path.replace("{sweep}", "_".join(sweep)))
    return path.with_stem("_".join([path.stem, *rest]))


def inputs_of(command: Command, layouts: Iterable[Layout]) -> dict[str, str]:
    """What a run reads, by its real path, and how it is called."""
    files = {file: "a layout" for file in layout_files(command.output) if file}
    for key in MODEL_KEYS:
        place = Path(getattr(command.settings, key) or "pocket")
        found = (place, *place.glob("*"), *place.glob("*/*"))
        files |= dict.fromkeys(found, f"a file of {flag(key)}")
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
        found = [*job.files.values(), *([job.sheet] if job.sheet else [])]
        if maps := job.files.get("maps"):  # inputs that lie where its sheets are drawn
            sheet = re.escape(os.path.join(os.path.realpath(maps.parent), maps.stem))
            found += [Path(x) for x in inputs if re.fullmatch(sheet + r"_step\d+\.png", x)]
        for path in found:
            check_output("--output", path, inputs)
        for path in map(os.path.realpath, job.files.values()):
            if path in taken:
                problem = "several images would have this name; put {name} or {seed} into it"
                raise InputError("--output", Path(path), problem)
            taken.add(path)


def is_first(settings: Settings) -> bool:
    """Does this process print and write? Of a parallel run, one does."""
    return not settings.parallel or os.environ.get("RANK", "0") == "0"


def announce(jobs: list[Job], worker: Worker, pipeline: Any) -> None:
    if worker.count > 1:
        info(f"worker {worker.index} of {worker.count}, images: {len(jobs)}")
    if seeds := dict.fromkeys(str(job.seed) for job in jobs):
        info(f"seed {', '.join(seeds)}")
    if pipeline.checkpoint.name == "pocket":
        info(POCKET)
    layouts = {id(job.layout): job.layout.resolved(pipeline.defaults) for job in jobs}
    for doubt in doubts_of([*layouts.values()], pipeline):
        warn(doubt)


def doubts_of(layouts: list[Layout], pipeline: Any) -> Iterator[str]:
    checkpoint = pipeline.checkpoint
    return doubts(layouts, checkpoint.flux, T5Tokenizer(checkpoint.t5_tokenizer))


def generate_all(
    pipeline: Any, jobs: list[Job], command: Command, tally: Tally, stop: Stop
) -> None:  # fmt: skip
    """Prepare up to CHUNK layouts at a time, then write their images."""
    if pipeline.parallel:
        stop.is_any = pipeline.parallel.is_any
    output = command.output
    worker = worker_of(command)
    announce(jobs, worker, pipeline)
    heard()  # These are of all images.
    if jobs and output.config_from_metadata:
        made = image_metadata(jobs[0].layout, jobs[0].seed, pipeline, None)
        check_weights(output.config_from_metadata, made)
    groups = itertools.groupby(jobs, lambda job: id(job.layout))
    by_layout = [list(group) for _, group in groups]
    with tally.running(len(jobs)):
        for first in range(0, len(by_layout), CHUNK):
            ready = []
            for group in by_layout[first : first + CHUNK]:
                stop.check()
                missing = unfinished(group, pipeline, output, tally)
                waiting = [job for job, _ in missing]
                with tally.caught(waiting), naming(group[0].source, command.overrides):
                    prepared = pipeline.prepare(group[0].layout) if missing else None
                    warnings = heard()
                    if prepared and tally.log:
                        warnings += doubts_of([prepared.layout], pipeline)
                    ready += [(*entry, prepared, warnings) for entry in missing]
            pipeline.drop("t5", "clip")
            if tally.total == 1:  # VAE and transformer may not fit together.
                pipeline.drop("ae")
            for job, metadata, prepared, warnings in ready:
                stop.check()
                with tally.caught([job], metadata):
                    began = time.perf_counter()
                    make(job, prepared, metadata, pipeline, command, tally, stop)
                    seconds = time.perf_counter() - began
                    tally.add("generated", job, metadata, seconds, warnings)
                    steps = tally.last_step - tally.first_step
                    keep_timing(command.settings, prepared.layout, steps)
            pipeline.drop("flux")
    if output.sweep and not tally.counts["failed"] and is_first(command.settings):
        from tools.sheets import write_sheets

        write_sheets(jobs, worker.count)


def unfinished(
    group: list[Job], pipeline: Any, output: Output, tally: Tally
) -> list[tuple[Job, Metadata]]:  # fmt: skip
    """One layout's images still to be made, with their metadata."""
    layout = group[0].layout
    has_maps = layout.resolved(pipeline.defaults).regional_steps() > 0
    missing = []
    metadata = None
    for job in group:
        image = job.files["image"]
        if "maps" in job.files and not has_maps:
            info(f"{shown(image)}: no step of it is regional, so it has no attention maps")
            del job.files["maps"]
        with tally.caught([job]):
            metadata = metadata or image_metadata(layout, job.seed, pipeline, job.origin)
            metadata = metadata | {"seed": job.seed}
            if not is_finished(job, output, metadata):
                missing.append((job, metadata))
                continue
            found = metadata_in(image) or metadata
            tally.of_other_code += found.get("source") != metadata["source"]
            tally.add("kept", job, metadata)
    return missing


def is_finished(job: Job, output: Output, metadata: Metadata) -> bool:
    """Do all files of an image exist with this metadata? InputError for others in the way."""
    from tools.compare import check_kept

    for file in job.files.values():
        check_writable(file, overwrite=True)
    if output.overwrite:
        return False
    there = [file for file in job.files.values() if file.exists()]
    kept = [file for file in there if check_kept(file, metadata, output)]
    maps = job.files.get("maps")
    if maps and maps not in kept:
        for sheet in maps.parent.glob(f"{glob.escape(maps.stem)}_step*.png"):
            check_kept(sheet, metadata, output)  # A killed run left it, or it is in the way.
    return len(kept) == len(job.files)


def check_weights(file: Path, made: Metadata) -> None:
    """Warn if an image that is to be made again was made by other weights."""
    sums = read_metadata(file).get("inputs")
    sums = sums if isinstance(sums, dict) else {}
    other = [part for part, own in made["inputs"].items() if sums.get(part, own) != own]
    if other:
        warn(f"{file} was made by other weights: {', '.join(other)}")


def make(
    job: Job, prepared: Any, metadata: Metadata, pipeline: Any, command: Command, tally: Tally,
    stop: Stop,
) -> None:  # fmt: skip
    """Denoise and decode an image, and write its job's files, it last: where it is, the others
    are, too."""
    files = job.files
    maps = None
    if "maps" in files:
        from extensions.attention_maps import AttentionMaps

        maps = AttentionMaps(pipeline.defaults.depth, pipeline.defaults.depth_single_blocks)
    steps = itertools.count(1)

    def on_step() -> None:
        tally.on_step(next(steps), prepared.layout.run_steps())
        stop.check()

    with stop.drawing():
        latents = pipeline.denoise(prepared, job.seed, [maps.extend] if maps else [], on_step)
    if tally.total == 1:
        pipeline.drop("flux")
    if not is_first(command.settings):
        return
    image = pipeline.decode(latents, prepared.layout)
    if "latents" in files:
        save_tensor("latents", latents, metadata, files["latents"])
    if maps:
        from tools.sheets import save_maps

        layout = prepared.layout
        shown = image.resize((layout.width, layout.height))  # A repainted image keeps its own size.
        save_maps(maps, files["maps"].with_suffix(""), shown, prepared.tokens.prompts, metadata)
    is_embedded = not command.output.no_metadata
    if "metadata" in files:
        if not is_embedded:  # The new .json must not describe an old image.
            files["image"].unlink(missing_ok=True)
        save_json(metadata, files["metadata"])
    save_image(image, metadata if is_embedded else None, files["image"])
