"""Layouts in, images out.

    python generate.py --layout layout.yaml

With many layouts, all prompts are encoded first and each image is written once finished;
the same command resumes a run.
"""

import contextlib
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while modules load: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import msgspec

from formats.hub import is_repository
from pipeline import Pipeline
from regional.layout import FLUX_DEV
from tools import jobs as batch
from tools.flags import Command, parse
from tools.replay import decode, replayed


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 2 for bad input; 1 if the machine refuses or some of many
    layouts fail; 130 for Ctrl-C or SIGTERM."""
    return batch.with_exit_code(lambda: parse(argv, replayed), run)


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
            stack.enter_context(batch.silence())
        if output.decode:
            decode(pipeline, output)
            return 0
        jobs = batch.plan_jobs(command, tally, pipeline.defaults.size, pipeline)
        batch.generate_all(pipeline, jobs, command, tally, stop)
    return 1 if tally.counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
