"""Layouts in, images out.

    python generate.py --layout layout.yaml

With many layouts, all prompts are encoded first and each image is written once finished;
the same command resumes a run.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from errors import InputError, info, print_error, shown
from formats.hub import is_repository
from pipeline import Pipeline, Prepared
from regional.layout import FLUX_DEV, Layout
from regional.reader import read_layout
from settings import Settings
from tools import jobs as batch
from tools.flags import Command, naming, parse
from tools.jobs import Job, Stop
from tools.metadata import Metadata, keep_timing

CHUNK = 100  # layouts prepared together, in some 2 GB of memory at full size


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for bad input; 1 if the machine refuses or some of many
    layouts fail; 130 for Ctrl-C or SIGTERM."""
    streams = batch.Tolerant(sys.stdout), batch.Tolerant(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        return run_with_messages(argv)


def run_with_messages(argv: list[str] | None) -> int:
    start = time.perf_counter()
    settings = Settings()
    stop = Stop()
    try:
        with stop.handled():
            command = parse(argv)
            settings = command.settings
            return run(command, stop, start)
    except (InputError, OSError) as error:
        if batch.is_first(settings):
            print_error(error)
        return 2 if isinstance(error, InputError) else 1
    except (MemoryError, RuntimeError) as error:
        if not batch.is_full(error):
            raise
        info(f"generate.py: out of memory: {batch.advice(error, settings)}")
        return 1
    except KeyboardInterrupt:
        info("generate.py: interrupted")
        return 130


def run(command: Command, stop: Stop, start: float) -> int:
    settings, overrides, output, dry_run, recorded = command

    def read(file: Path | None, swept: dict[str, Any], size: int) -> Layout:
        given = overrides | swept
        with naming(file, given):
            if recorded is None:
                return read_layout(file, given, size)
            return read_layout(None, recorded | given, size)  # by the image `file`

    if dry_run.check or dry_run.preview or dry_run.plan is not None:
        from tools.check import run_dry

        return run_dry(command, read) if batch.is_first(settings) else 0
    files = batch.layout_files(output)
    worker = batch.worker_of(output.shard, bool(settings.parallel))
    failures = batch.Failures(is_alone=len(files) == 1 or bool(settings.parallel))

    def plan(size: int) -> list[Job]:
        return batch.plan_jobs(files, command, partial(read, size=size), worker, failures)

    # Find mistakes before downloading a repository's gigabytes.
    jobs = plan(FLUX_DEV.size) if is_repository(settings.model) else None
    pipeline = Pipeline(msgspec.structs.replace(settings, device=batch.device_of(settings.device)))
    with contextlib.ExitStack() as stack:
        if pipeline.parallel:
            stack.callback(pipeline.parallel.close)
        if not batch.is_first(settings):
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if jobs is None or pipeline.defaults.size != FLUX_DEV.size:
            jobs = plan(pipeline.defaults.size)
        batch.announce(jobs, worker, pipeline)
        generate_all(pipeline, jobs, command, failures, stop, start)
        if output.sweep and not failures.count and batch.is_first(settings):
            from tools.sheets import write_sheets

            write_sheets(jobs, worker.count)
    return 1 if failures.count else 0


def generate_all(
    pipeline: Pipeline, jobs: list[Job], command: Command, failures: batch.Failures, stop: Stop,
    start: float,
) -> None:  # fmt: skip
    """Prepare up to CHUNK layouts at a time, then write their images."""
    ends: list[float] = []
    is_any = pipeline.parallel.is_any if pipeline.parallel else bool

    def check() -> None:
        if is_any(stop.is_asked):
            raise KeyboardInterrupt

    def on_step() -> None:
        batch.report_step(ends, start)
        check()

    by_layout = [list(group) for _, group in itertools.groupby(jobs, lambda job: id(job.layout))]
    for first in range(0, len(by_layout), CHUNK):
        ready = []
        for group in by_layout[first : first + CHUNK]:
            check()
            with failures.caught(), naming(group[0].source, command.overrides):
                missing = batch.unfinished(group, pipeline, command.output)
                if missing:
                    prepared = pipeline.prepare(group[0].layout)
                    ready += [(job, prepared, metadata) for job, metadata in missing]
        pipeline.drop("t5", "clip")
        if len(jobs) == 1:  # VAE and transformer may not fit together.
            pipeline.drop("ae")
        for job, prepared, metadata in ready:
            check()
            with failures.caught():
                make(job, prepared, metadata, pipeline, command, stop, on_step, len(jobs) == 1)
                keep_timing(command.settings, prepared.layout, ends)
        pipeline.drop("flux")


def make(
    job: Job, prepared: Prepared, metadata: Metadata, pipeline: Pipeline, command: Command,
    stop: Stop, on_step: Callable[[], None], is_alone: bool,
) -> None:  # fmt: skip
    """Denoise, decode and write an image and its job's other files."""
    maps = None
    if "maps" in job.files:
        from extensions.attention_maps import AttentionMaps

        maps = AttentionMaps(pipeline.defaults.depth, pipeline.defaults.depth_single_blocks)
    with stop.drawing():
        latents = pipeline.denoise(prepared, job.seed, [maps.extend] if maps else [], on_step)
    if is_alone:
        pipeline.drop("flux")
    if not batch.is_first(command.settings):
        return
    image = pipeline.decode(latents)
    batch.save(job, image, latents, maps, prepared.tokens, metadata, not command.output.no_metadata)
    print(shown(job.files["image"]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
