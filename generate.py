"""Layouts in, images out.

    python generate.py --layout layout.yaml

With many layouts, all prompts are encoded first and each image is written once finished;
the same command resumes a run.
"""

import contextlib
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while modules load: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import msgspec

from errors import InputError, info, print_error
from formats.hub import is_repository
from pipeline import Pipeline
from regional.layout import FLUX_DEV
from settings import Settings
from tools import jobs as batch
from tools.flags import Command, parse
from tools.replay import decode, replayed


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for bad input; 1 if the machine refuses or some of many
    layouts fail; 130 for Ctrl-C or SIGTERM."""
    out = batch.Tolerant(sys.stdout)
    errors = batch.Tolerant(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        return run_with_messages(argv)


def run_with_messages(argv: list[str] | None) -> int:
    settings = Settings()
    stop = batch.Stop()
    try:
        with stop.handled():
            command = parse(argv, replayed)
            settings = command.settings
            return run(command, stop)
    except (InputError, OSError) as error:
        if batch.is_first(settings):
            print_error(error)
        return 2 if isinstance(error, InputError) else 1
    except (MemoryError, RuntimeError) as error:
        if not batch.is_full(error):
            raise
        advice = batch.advice(error, settings)
        info(f"generate.py: out of memory: {advice}")
        return 1
    except KeyboardInterrupt:
        info("generate.py: interrupted")
        return 130


def run(command: Command, stop: batch.Stop) -> int:
    settings = command.settings
    output = command.output
    dry_run = command.dry_run
    if dry_run.check or dry_run.preview or dry_run.edit or dry_run.plan is not None:
        from tools.check import run_dry

        if not batch.is_first(settings):
            return 0
        return run_dry(command, Pipeline)
    tally = batch.Tally(command)
    if is_repository(settings.model) and not output.decode:
        # Find mistakes before downloading a repository's gigabytes.
        batch.plan_jobs(command, tally, FLUX_DEV.size)
    device = batch.device_of(settings.device)
    pipeline = Pipeline(msgspec.structs.replace(settings, device=device))
    with contextlib.ExitStack() as stack:
        if pipeline.parallel:
            stack.callback(pipeline.parallel.close)
        if not batch.is_first(settings):
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if output.decode:
            decode(pipeline, output)
            return 0
        jobs = batch.plan_jobs(command, tally, pipeline.defaults.size, pipeline)
        batch.generate_all(pipeline, jobs, command, tally, stop)
    return 1 if tally.counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
