"""Layouts in, images out.

    python generate.py --layout layout.yaml

With many layouts, all prompts are encoded first and each image is written once finished;
the same command resumes a run.
"""

import contextlib
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from errors import InputError, info, print_error
from formats.hub import is_repository
from pipeline import Pipeline
from regional.layout import FLUX_DEV, Layout
from regional.reader import read_layout
from settings import Settings
from tools import jobs as batch
from tools.flags import Command, naming, parse
from tools.metadata import run_metadata


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for bad input; 1 if the machine refuses or some of many
    layouts fail; 130 for Ctrl-C or SIGTERM."""
    streams = batch.Tolerant(sys.stdout), batch.Tolerant(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        return run_with_messages(argv)


def run_with_messages(argv: list[str] | None) -> int:
    start = time.perf_counter()
    settings = Settings()
    stop = batch.Stop()
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


def run(command: Command, stop: batch.Stop, start: float) -> int:
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
    tally = batch.tally_of(command, len(files) == 1)

    def plan(size: int, known: batch.Known | None = None) -> list[batch.Job]:
        reader = partial(read, size=size)
        return batch.plan_jobs(files, command, reader, worker, tally, known)

    jobs = None
    if is_repository(settings.model) and not output.decode:
        # Find mistakes before downloading a repository's gigabytes.
        jobs = plan(FLUX_DEV.size)
    pipeline = Pipeline(msgspec.structs.replace(settings, device=batch.device_of(settings.device)))
    known = batch.Known(pipeline.defaults, run_metadata(pipeline))
    with contextlib.ExitStack() as stack:
        if pipeline.parallel:
            stack.callback(pipeline.parallel.close)
        if not batch.is_first(settings):
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if output.decode:
            from tools.decode import decode

            decode(pipeline, output, known.run)
            return 0
        if jobs is None or len(files) == 1 or pipeline.defaults.size != FLUX_DEV.size:
            jobs = plan(pipeline.defaults.size, known)
        batch.announce(jobs, worker, pipeline.checkpoint.name == "pocket")
        with tally.running(len(jobs), start):
            batch.generate_all(pipeline, jobs, command, known.run, tally, stop, start)
        if output.sweep and not tally.counts["failed"] and batch.is_first(settings):
            from tools.sheets import write_sheets

            write_sheets(jobs, worker.count)
    return 1 if tally.counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
