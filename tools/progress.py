"""How far a run of many images is, and a record of each."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from errors import InputError, info, shown
from tools.metadata import check_suffix, check_writable


class Progress:
    """On a terminal a bar, elsewhere a line for each image. log: a file that gets a record, a
    line of JSON, for each, at once; several processes may append to it."""

    def __init__(self, log: Path | None):
        self.file = None
        if log:
            check_suffix("--log", log, (".jsonl",))
            check_writable(log, overwrite=True)
            if log.exists() and not log.is_file():
                raise InputError("--log", log, "not a regular file")
            log.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(log, "ab", buffering=0)
        self.total = 0
        self.done = 0
        self.drawn = 0
        self.seconds = 0.0  # in which they were drawn
        self.bar = None

    def begin(self, total: int) -> None:
        self.total = total
        if total > 1:
            look = "{desc} |{bar}|"
            self.bar = tqdm(desc=self.place(), total=total, disable=None, leave=False, bar_format=look)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()

    def place(self) -> str:
        """The image that is being drawn, and when all will be."""
        text = f"image {min(self.done + 1, self.total)} of {self.total}"
        return f"{text}, {self.rate()}" if self.drawn else text

    def rate(self) -> str:
        rate = self.drawn / self.seconds
        left = tqdm.format_interval((self.total - self.done) / rate)
        return f"{60 * rate:.1f} a minute, {left} left"

    def add(
        self, outcome: str, job: Any, settings: str | None, seconds: float, warnings: list[str],
        error: BaseException | None,
    ) -> None:  # fmt: skip
        """job: tools.jobs.Job; of a layout that can't be read, None. settings: their hash."""
        if self.file:
            found = {
                "outcome": outcome,
                "file": job and str(job.files["image"]),
                "layout": job and job.source and str(job.source),
                "seed": job and job.seed,
                "settings": settings,
                "seconds": round(seconds, 3),
                "warnings": warnings,
                "error": error and str(error),
            }
            with suppress(OSError):  # A log that can't be written does not end a run.
                self.file.write(json.dumps(found).encode() + b"\n")
        if not self.total:  # still planning
            return
        self.done += 1
        if outcome == "generated":
            self.drawn += 1
            self.seconds += seconds
            if self.bar is not None and self.bar.disable:
                file = shown(job.files["image"])
                text = f"image {self.done} of {self.total}: {file}, {seconds:.1f} s"
                info(f"{text}; {self.rate()}")
        if self.bar is not None:
            self.bar.set_description_str(self.place(), refresh=False)
            self.bar.update()
