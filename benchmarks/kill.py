"""What is left of a run that is killed, and does the next one put it right? Counted over random moments.

    python benchmarks/kill.py            # 50 kills, over 1, 2 and 3 workers; exit code 1 if anything was ever wrong
    python benchmarks/kill.py --kills 6

Each kill (SIGKILL, which no program can catch) has a run of its own: 40 pictures of 64 x 64, 2 steps, by the pocket
model, made of one layout or of four, by 1, 2 or 3 workers. The moment is random within the time that a run takes;
then all workers are killed, or one of them. In half of the runs latents and side-cars are written too, and in half
every file takes 20 ms to write, so that kills meet half-written ones. After the second run there must be every file of
an undisturbed run, byte for byte, and no other; those that were whole at the kill must not have been written again.
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
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # workers are forked: no thread may have been started before
sys.path.insert(0, str(Path(__file__).parent.parent))
import yaml  # noqa: E402

import generate  # noqa: E402
import weights  # noqa: E402
from tools import metadata as outputs  # noqa: E402

IMAGES = 40
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
    """One kind of run: of how many layouts, by how many workers, with latents and side-cars, on a
    slow disk, of how many images."""

    layouts: int
    workers: int
    beside: bool = True
    slow: bool = False
    images: int = IMAGES


class Kill(NamedTuple):
    """One kill: after how much of a run, what was there, how many half-written files, and what was wrong at the end."""

    kind: Kind
    moment: float
    finished: int
    unfinished: int
    wrong: list[str]


def write_layouts(folder: Path) -> None:
    for i in range(4):
        regions = [{"prompt": PROMPTS[j % 2], "box": box} for j, box in enumerate(BOXES[: i + 1])]
        (folder / f"scene{i}.yaml").write_text(yaml.safe_dump({**LAYOUT, "regions": regions}))


def start(kind: Kind, folder: Path, output: Path) -> list[int]:
    """A process for each worker, forked from this one with everything imported; their ids."""
    output.mkdir(exist_ok=True)
    flags = ["--layout", *(str(folder / f"scene{i}.yaml") for i in range(kind.layouts)), "--device", "cpu"]
    flags += ["--seed", *map(str, range(kind.images // kind.layouts)), "--output", str(output / "{name}_{seed}.png")]
    flags += ["--metadata", "--save-latents", str(output / "{name}_{seed}.safetensors")] if kind.beside else []
    return [fork([*flags, "--shard", f"{i}/{kind.workers}"], kind.slow, folder / "log") for i in range(kind.workers)]


def fork(flags: list[str], slow: bool, log: Path) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
        if slow:
            outputs.write = slowly
        code = generate.main(flags)
    finally:
        os._exit(code)


def slowly(path: Path, save: outputs.Callable, write: outputs.Callable = outputs.write) -> None:
    """outputs.write, with a file that lies there half-written for a while."""

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


def undisturbed(kind: Kind, folder: Path) -> tuple[dict[str, bytes], float]:
    """The files of a run, and the seconds that it takes."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        began = time.perf_counter()
        codes = ended(start(kind, folder, Path(output)))
        seconds = time.perf_counter() - began
        if any(codes):
            raise SystemExit(f"an undisturbed run ended with {codes}:\n{(folder / 'log').read_text()}")
        return {file.name: file.read_bytes() for file in Path(output).iterdir()}, seconds


def kill(kind: Kind, folder: Path, expected: dict[str, bytes], seconds: float, draw: random.Random) -> Kill:
    """One run, one kill, and a second run of the same."""
    moment, wrong = draw.random(), []
    with tempfile.TemporaryDirectory(dir=folder) as output:
        workers = start(kind, folder, Path(output))
        time.sleep(moment * seconds)
        for pid in workers if draw.random() < 0.5 else [draw.choice(workers)]:
            os.kill(pid, signal.SIGKILL)  # one that has ended already is a zombie: nothing happens
        ended(workers)
        there = {file.name: file for file in Path(output).iterdir() if not file.name.startswith(".")}
        unfinished = len(list(Path(output).iterdir())) - len(there)
        broken = [name for name, file in there.items() if file.read_bytes() != expected.get(name)]
        wrong += [f"{name} is not whole after the kill" for name in broken]
        pictures = {name: file.stat().st_mtime_ns for name, file in there.items() if name.endswith(".png")}
        if kind.beside:  # a picture without what belongs beside it is not finished
            stems = {Path(name).stem for name in there if name.endswith(".json")}
            pictures = {name: at for name, at in pictures.items() if Path(name).stem in stems}

        if any(codes := ended(start(kind, folder, Path(output)))):
            wrong.append(f"the second run ended with {codes}: {(folder / 'log').read_text()[-1000:]}")
        found = {file.name: file.read_bytes() for file in Path(output).iterdir()}
        wrong += [f"{name} is missing" for name in expected.keys() - found.keys()]
        wrong += [f"{name} is left over" for name in found.keys() - expected.keys()]
        wrong += [f"{name} is not that of an undisturbed run" for name in found if found[name] != expected.get(name)]
        left = {name: at for name, at in pictures.items() if name in found}
        again = [name for name, at in left.items() if (Path(output) / name).stat().st_mtime_ns != at]
        wrong += [f"{name} was made twice" for name in again]
    return Kill(kind, moment, len(pictures), unfinished, wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=IMAGES, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw, began = random.Random(args.seed), time.perf_counter()
    kinds = [Kind(*choice, args.images) for choice in itertools.product((4, 1), WORKERS, (False, True), (False, True))]
    draw.shuffle(kinds)
    kinds = list(itertools.chain(*zip(*([kind for kind in kinds if kind.workers == n] for n in WORKERS))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_layouts(folder)
        weights.find()  # imports what torch imports late
        files, seconds, kills = {}, {}, []
        for layouts, workers in (1, 1), *((4, count) for count in WORKERS):
            found, seconds[workers] = undisturbed(Kind(layouts, workers, images=args.images), folder)
            if files.setdefault(layouts, found) != found:
                raise SystemExit(f"undisturbed, {workers} workers make other files than one does")
        for i in range(args.kills):
            kind = kinds[i % len(kinds)]
            wanted = {n: data for n, data in files[kind.layouts].items() if kind.beside or n.endswith(".png")}
            waits = kind.slow * SLOW * len(wanted) / kind.workers
            kills.append(kill(kind, folder, wanted, seconds[kind.workers] + waits, draw))
            for text in kills[-1].wrong:
                print(f"kill {i}, {kind}, after {kills[-1].moment:.0%} of the run: {text}", flush=True)
    for count in WORKERS:
        own = [k for k in kills if k.kind.workers == count]
        finished = sorted(k.finished for k in own)
        if own:
            print(
                f"{count} workers: {len(own)} kills; finished pictures when killed: {finished[0]} to {finished[-1]}, "
                f"median {statistics.median(finished):g}; "
                f"{sum(0 < f < args.images for f in finished)} kills between the first and the last picture; "
                f"half-written files: {sum(k.unfinished for k in own)}; "
                f"wrong: {sum(bool(k.wrong) for k in own)}"
            )
    wrong = sum(bool(k.wrong) for k in kills)
    print(f"{len(kills)} kills, {wrong} with anything wrong afterwards, {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
