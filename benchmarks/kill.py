"""What is left of a run that is killed, and does the next one put it right? Counted over random moments.

    python benchmarks/kill.py            # 60 kills, over 1, 2 and 3 workers; exit code 1 if anything was ever wrong
    python benchmarks/kill.py --kills 6

Each kill (SIGKILL, which no program can catch) has a run of its own: 24 images of 64 x 64, 2 steps, by the pocket
model, of one layout, of four, or of a sweep, by 1, 2 or 3 workers; in half of the runs with latents, side-cars and
attention maps. Half of the kills come at a random moment, for all workers or one of them, and every file takes 20 ms
to write, so that they meet half-written ones. The others come just before a random file operation: a worker kills
itself before it opens a file to write, renames or removes one. After the second run there must be every file of an
undisturbed run, byte for byte, and no other; images that were there at the kill must not have been written again.
"""

import argparse
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # workers are forked: no thread may have been started before
sys.path.insert(0, str(Path(__file__).parent.parent))
import yaml  # noqa: E402

import generate  # noqa: E402
import weights  # noqa: E402
from tools import metadata, sheets  # noqa: E402

IMAGES = 24
WORKERS = (1, 2, 3)
SLOW = 0.02  # seconds
BOXES = [[0, 0, 32, 64], [32, 0, 64, 64], [0, 0, 64, 32], [16, 16, 48, 48]]
LAYOUT = {
    "prompt": "a striped red heart, a dotted blue circle on a white background",
    "background_prompt": "a white background",
    "width": 64,
    "height": 64,
    "steps": 2,
    "mask_inject_steps": 1,
    "max_sequence_length": 32,
}
PROMPTS = ["a striped red heart on a white background", "a dotted blue circle on a white background"]


class Kind(NamedTuple):
    """One kind of run: of how many layouts, by how many workers; with latents, side-cars and maps; as a sweep; whether
    the kill comes before a file operation; how many images."""

    layouts: int
    workers: int
    beside: bool
    sweep: bool
    at_operation: bool
    images: int

    @property
    def files(self) -> tuple:
        """What decides which files there are in the end. Several workers make no sheet of a sweep."""
        return self.layouts, self.beside, self.sweep, self.sweep and self.workers > 1


class Kill(NamedTuple):
    """One kill: how many images were there, how many half-written files, and what was wrong at the end."""

    kind: Kind
    finished: int
    unfinished: int
    wrong: list[str]


def write_layouts(folder: Path) -> None:
    for i in range(4):
        regions = [{"prompt": PROMPTS[j % 2], "box": box} for j, box in enumerate(BOXES[: i + 1])]
        (folder / f"scene{i}.yaml").write_text(yaml.safe_dump({**LAYOUT, "regions": regions}))


def start(kind: Kind, folder: Path, output: Path, before: int = 0, slow: bool = False) -> list[int]:
    """A process for each worker, forked from this one with everything imported; their ids. before: the file operation
    before which the first worker kills itself."""
    output.mkdir(exist_ok=True)
    flags = ["--layout", *(str(folder / f"scene{i}.yaml") for i in range(kind.layouts)), "--device", "cpu"]
    swept = ["--sweep", "base_ratio=0,0.3"] if kind.sweep else []
    seeds = kind.images // kind.layouts // (1 + kind.sweep)
    name = "{name}_{sweep}_{seed}" if kind.sweep else "{name}_{seed}"
    flags += [*swept, "--seed", *map(str, range(seeds)), "--output", str(output / f"{name}.png")]
    if kind.beside:
        flags += ["--metadata", "--save-latents", str(output / f"{name}.safetensors")]
        flags += ["--attention-maps", str(output / "maps")]
    return [
        fork([*flags, "--shard", f"{i}/{kind.workers}"], slow, folder, before * (i == 0)) for i in range(kind.workers)
    ]


def fork(flags: list[str], slow: bool, folder: Path, before: int) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
        if slow:
            metadata.write = sheets.write = slowly
        count_operations(folder, before)
        code = generate.main(flags)
        (folder / "operations").write_text(str(operations))
    finally:
        os._exit(code)


operations = 0  # of this process, on files within the folder


def count_operations(folder: Path, before: int) -> None:
    """From now on file operations are counted; the process kills itself just before this one, if not 0."""
    os.chdir(folder)

    def hook(event: str, arguments: tuple) -> None:
        global operations
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in ("os.rename", "os.remove"):
            if str(arguments[0]).startswith(str(folder)):
                operations += 1
                if operations == before:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def slowly(path: Path, save: Callable, write: Callable = metadata.write) -> None:
    """metadata.write, with a file that lies there half-written for a while."""

    def save_slowly(file: Path) -> None:
        save(file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        time.sleep(SLOW)
        file.write_bytes(whole)

    write(path, save_slowly)


def ended(workers: list[int]) -> list[int]:
    """Waits for them all; their exit codes, -9 of those that were killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]


def files_in(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


class Run(NamedTuple):
    """An undisturbed run: its files, seconds and file operations."""

    files: dict[str, bytes]
    seconds: float
    operations: int


def undisturbed(kind: Kind, folder: Path) -> Run:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        began = time.perf_counter()
        codes = ended(start(kind, folder, Path(output)))
        seconds = time.perf_counter() - began
        if any(codes):
            raise SystemExit(f"an undisturbed run ended with {codes}:\n{(folder / 'log').read_text()}")
        found = {name: file.read_bytes() for name, file in files_in(Path(output)).items()}
        return Run(found, seconds, int((folder / "operations").read_text()))


def kill(kind: Kind, folder: Path, good: Run, draw: random.Random) -> Kill:
    """One run, one kill, and a second run of the same."""
    wrong = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output = Path(name)
        if kind.at_operation:
            workers = start(kind, folder, output, before=draw.randint(1, good.operations))
        else:
            workers = start(kind, folder, output, slow=True)
            time.sleep(draw.random() * (good.seconds + SLOW * len(good.files) / kind.workers))
            for pid in workers if draw.random() < 0.5 else [draw.choice(workers)]:
                os.kill(pid, signal.SIGKILL)  # one that has ended already is a zombie: nothing happens
        ended(workers)
        everything = files_in(output)
        there = {key: file for key, file in everything.items() if not file.name.startswith(".")}
        broken = [key for key, file in there.items() if file.read_bytes() != good.files.get(key)]
        wrong += [f"{key} is not whole after the kill" for key in broken]
        images = {
            key: file.stat().st_mtime_ns for key, file in there.items() if "maps" not in key and key.endswith(".png")
        }
        images = {key: at for key, at in images.items() if "sheet" not in key}

        if any(codes := ended(start(kind, folder, output))):
            wrong.append(f"the second run ended with {codes}: {(folder / 'log').read_text()[-1000:]}")
        found = {key: file.read_bytes() for key, file in files_in(output).items()}
        wrong += [f"{key} is missing" for key in good.files.keys() - found.keys()]
        wrong += [f"{key} is left over" for key in found.keys() - good.files.keys()]
        wrong += [f"{key} is not that of an undisturbed run" for key in found if found[key] != good.files.get(key)]
        again = [key for key, at in images.items() if key in found and (output / key).stat().st_mtime_ns != at]
        wrong += [f"{key} was made twice" for key in again]
    return Kill(kind, len(images), len(everything) - len(there), wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--images", type=int, default=IMAGES, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw, began = random.Random(args.seed), time.perf_counter()
    choices = itertools.product(((4, False), (1, False), (1, True)), WORKERS, (True, False), (True, False))
    kinds = [Kind(n, workers, beside, swept, early, args.images) for (n, swept), workers, beside, early in choices]
    draw.shuffle(kinds)
    kinds = sorted(kinds, key=lambda kind: kinds.index(kind) // 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_layouts(folder)
        weights.find()  # imports what torch imports late
        runs: dict[Kind, Run] = {}
        contents: dict[tuple, dict[str, bytes]] = {}
        kills = []
        for i in range(args.kills):
            kind = kinds[i % len(kinds)]
            if kind not in runs:
                runs[kind] = undisturbed(kind, folder)
                if contents.setdefault(kind.files, runs[kind].files) != runs[kind].files:
                    raise SystemExit(f"undisturbed, {kind.workers} workers make other files than one does")
            kills.append(kill(kind, folder, runs[kind], draw))
            for text in kills[-1].wrong:
                print(f"kill {i}, {kind}: {text}", flush=True)
    for count in WORKERS:
        own = [k for k in kills if k.kind.workers == count]
        finished = sorted(k.finished for k in own)
        if own:
            print(
                f"{count} workers: {len(own)} kills, {sum(k.kind.at_operation for k in own)} of them before a file "
                f"operation; finished images when killed: {finished[0]} to {finished[-1]}, "
                f"median {statistics.median(finished):g}; half-written files: {sum(k.unfinished for k in own)}; "
                f"wrong: {sum(bool(k.wrong) for k in own)}"
            )
    wrong = sum(bool(k.wrong) for k in kills)
    print(f"{len(kills)} kills, {wrong} with anything wrong afterwards, {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
