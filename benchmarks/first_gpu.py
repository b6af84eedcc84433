"""All that a GPU is asked first, in one command: is it right, how fast, and in how much memory.

    python benchmarks/first_gpu.py                         # all parts, 30 minutes at most on an H100
    python benchmarks/first_gpu.py --minutes 9.5           # what fits; call it again for the rest
    python benchmarks/first_gpu.py --parts kernel --again  # one part anew
    python benchmarks/first_gpu.py --tables                # only write the tables, of what is there
    python benchmarks/first_gpu.py --device cpu            # try it without a GPU

Each part is a process of its own with a time limit; one that fails or hangs does not stop the rest.
Its output goes to PART.log in the folder --out as it comes, its end and its numbers to PART.json.
At the end, the numbers are written to tables.md there and to RESULTS.md in this folder, next to
what was predicted. It needs nothing but Python itself; the first part tells what else is missing.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RUN, RESULTS = ROOT / "benchmarks" / "run", ROOT / "benchmarks" / "RESULTS.md"
HEADING = "## On a GPU, predicted and measured"
PYTHON = [sys.executable, "-u"]
PYTEST = [*PYTHON, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
WORKERS = ["-n", "8"] if importlib.util.find_spec("xdist") else []
STEPS = [*PYTHON, "benchmarks/speed.py", "--sizes", "1024x1024", "--rounds", "5"]


class Part(NamedTuple):
    """limit: seconds until it is killed. on_cpu: what runs instead without a GPU, if anything."""

    what: str
    limit: int
    command: list[str]
    on_cpu: list[str] | None = None


PARTS = {
    "environment": Part(
        "versions, what is missing, rates of copies and products", 60, [*PYTHON, "benchmarks/environment.py"],
        [*PYTHON, "benchmarks/environment.py", "--device", "cpu"],
    ),
    "correctness": Part(
        "against float32 at FLUX.1's sizes, and against the CPU in whole images", 240,
        [*PYTEST, *WORKERS, "tests/test_cuda.py", "tests/test_kernel.py", "-k", "not compiled"],
        [*PYTEST, "tests/test_cuda.py", "-k", "not compiled"],
    ),
    "kernel": Part(
        "the kernel next to other attentions", 240, [*PYTHON, "benchmarks/attention.py", "--repeats", "5"],
        [*PYTHON, "benchmarks/attention.py", "--cpu", "--repeats", "5"],
    ),
    "steps": Part(
        "whole steps and runs in bfloat16", 300, [*STEPS, "--only", "ours", "compiled", "naive"],
        [*PYTHON, "benchmarks/speed.py", "--proxy", "--rounds", "5"],
    ),
    "fp8": Part(
        "steps in fp8, and the baseline compiled", 300,
        [*STEPS, "--no-runs", "--only", "compiled", "fp8", "naive-compiled"],
    ),
    "memory": Part("whole runs under caps of 24 and 12 GB", 480, [*PYTHON, "benchmarks/speed.py", "--caps"]),
    "compile": Part("compiled images against the CPU", 180, [*PYTEST, "tests/test_cuda.py", "-k", "compiled"]),
}  # fmt: skip


# -------------------------------------------------------------------------------- predictions

CONTEXT = 0.6  # GB of the CUDA context and the libraries' workspaces, which torch does not count


class Range(NamedTuple):
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


def about(value: float) -> Range:
    return Range(value, value)


PREDICTED = {  # by benchmarks/model.py for an H100, at 1024 x 1024; `measured` has the same keys
    "plain step, compiled, ms": about(128),
    "regional step, R = 1, compiled, ms": about(229),
    "regional step, R = 4, compiled, ms": about(250),
    "regional step, R = 16, compiled, ms": about(388),
    "whole run over plain FLUX's, R = 1": about(1.33),
    "whole run over plain FLUX's, R = 4": about(1.39),
    "whole run over plain FLUX's, R = 16": about(1.84),
    "kernel, four quadrants, TFLOP/s": Range(413, 441),
    "kernel over the library's unmasked attention": Range(0.65, 0.70),
    "memory, R = 4, compiled, GB": about(18.8),
    "memory, R = 16, compiled, GB": about(19.3),
    "run under 24 GB over one without a cap": about(1.0),
    "run under 12 GB over one without a cap": about(1.1),  # half of the blocks streamed
}


STEP_KINDS = {
    "plain": "plain step",
    **{f"regional, {n}": f"regional step, R = {n}" for n in (1, 4, 16)},
}
REGIONAL, STEPS_OF_A_RUN = 10, 24  # as in speed.py
GOALS_OF_MEMORY = {  # by what that part calls them
    "run under 24 GB over one without a cap": "M3: bfloat16 under 24 GB",
    "run under 12 GB over one without a cap": "M3: bfloat16, streamed as needed under 12 GB",
}


def measured(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The quantities of PREDICTED that the parts' numbers give; results: by the parts' names."""
    found: dict[str, float] = {}
    steps = results.get("steps", {}).get("steps", {})
    weights = results.get("steps", {}).get("weights", {}).get("compiled")
    for kind, name in STEP_KINDS.items():
        if row := steps.get(f"1024 x 1024, {kind}, compiled"):
            found[f"{name}, compiled, ms"] = row["ms"]
            memory = f"memory, R = {kind.rpartition(' ')[2]}, compiled, GB"
            if memory in PREDICTED and weights and row["extra MiB"] is not None:
                found[memory] = weights + row["extra MiB"] * 2**20 / 1e9 + CONTEXT
    plain, late = (steps.get(f"1024 x 1024, {kind}, compiled", {}).get("ms") for kind in ("plain", "late"))
    for n in 1, 4, 16:
        regional = found.get(f"regional step, R = {n}, compiled, ms")
        if plain and late and regional:
            run = REGIONAL * regional + (STEPS_OF_A_RUN - REGIONAL) * late
            found[f"whole run over plain FLUX's, R = {n}"] = run / (STEPS_OF_A_RUN * plain)
    goals = results.get("memory", {}).get("goals", {})
    for key, goal in GOALS_OF_MEMORY.items():
        if (value := goals.get(f"{goal}, of bfloat16's time without")) is not None:
            found[key] = value
    rates = results.get("kernel", {}).get("rates", {})
    quadrants = "1024 x 1024, four quadrants"
    ours = rates.get(f"{quadrants}, kernel (ours)")
    library = rates.get(f"{quadrants}, unmasked, base prompt and picture")
    if ours:
        found["kernel, four quadrants, TFLOP/s"] = ours
    if ours and library:
        found["kernel over the library's unmasked attention"] = ours / library
    return found


# -------------------------------------------------------------------------------- what a log says


def number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def rows_of(log: str) -> list[list[str]]:
    """The cells of every row of the tables in a log."""
    lines = (line.strip() for line in log.splitlines())
    rows = (line.strip("|").split("|") for line in lines if line.startswith("| "))
    return [[cell.strip() for cell in row] for row in rows]


def read_environment(log: str) -> dict[str, Any]:
    lines = [line for line in log.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def read_tests(log: str) -> dict[str, Any]:
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", log)
    counts = {what: int(count) for count, what in found}
    return {"tests": counts, "failed": re.findall(r"^(?:FAILED|ERROR) (\S.*)$", log, re.MULTILINE)}


def read_rates(log: str) -> dict[str, Any]:
    """Useful TFLOP/s, by size, layout and attention."""
    rates, failed = {}, []
    for row in rows_of(log):
        if any(cell.startswith("failed: ") for cell in row):
            failed.append(" | ".join(row))
        elif len(row) >= 5 and (rate := number(row[4])) is not None:
            layout = row[1].rpartition(", ")[0]  # without its number of tokens
            rates[f"{row[0]}, {layout}, {row[2]}"] = rate
    return {"rates": rates, "failed": failed}


def read_steps(log: str) -> dict[str, Any]:
    """Milliseconds and extra memory of each step, GB of weights, and the ratios of the targets."""
    steps, goals, failed, missed = {}, {}, [], []
    for row in rows_of(log):
        if any(cell.startswith("failed: ") for cell in row):
            failed.append(" | ".join(row))
        elif len(row) >= 6 and re.fullmatch(r"\d+ x \d+", row[0]):
            steps[", ".join(row[:3])] = {"ms": number(row[3]), "extra MiB": number(row[4])}
        elif len(row) == 5 and row[4] in ("aim met", "met", "missed"):
            goals[row[0]] = number(row[1])
            missed += [row[0]] if row[4] == "missed" else []
    sizes = re.findall(r"^([\w-]+): ([\d.]+) GB of weights$", log, re.MULTILINE)
    weights = {name: float(size) for name, size in sizes}
    return {"steps": steps, "goals": goals, "weights": weights, "failed": failed, "missed": missed}


READERS = {
    "environment": read_environment, "correctness": read_tests, "kernel": read_rates, "steps": read_steps,
    "fp8": read_steps, "memory": read_steps, "compile": read_tests,
}  # fmt: skip


# -------------------------------------------------------------------------------- running


def run_part(command: list[str], limit: float, log: Path, env: dict[str, str]) -> tuple[str, int | None]:
    """Run a command until its end or the limit; gives `ok`, `failed` or `timed out`, and its exit
    code."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timed out", None
        finally:  # also after Ctrl-C; and what it started ends with it
            end_group(process)
    return "failed" if code else "ok", code


def end_group(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment_of(device: str, temporary: str) -> dict[str, str]:
    """What a part is started with."""
    env = os.environ | {"TMPDIR": temporary}
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(RUN / "inductor"))  # which several parts share
    if device == "cpu":
        env["REGIONAL_TEST_DEVICE"] = "cpu"
    return env


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Where a part may write 24 GB of weights, in memory if it has room; gone with the part,
    however that ends."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 40e9
    return tempfile.TemporaryDirectory(dir=memory if roomy else None)


def write(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run_parts(parts: dict[str, Part], out: Path, minutes: float, device: str, again: bool) -> list[str]:
    """Run those that have no result in `out` yet, or all of them `again`; gives the names of those
    that are left, because they might not end within the minutes."""
    start, left = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        result = out / f"{name}.json"
        command = part.on_cpu if device == "cpu" else part.command
        if command is None:
            print(f"===== {name}: needs a GPU", flush=True)
        elif result.exists() and not again:
            print(f"===== {name}: {json.loads(result.read_text())['status']} before", flush=True)
        elif time.monotonic() - start + part.limit > 60 * minutes:
            print(f"===== {name}: left for the next call, may take {part.limit} s", flush=True)
            left.append(name)
        else:
            print(f"===== {name}: {part.what}, {part.limit} s at most", flush=True)
            found = outcome(name, command, part.limit, out, device)
            write(result, json.dumps(found, indent=1) + "\n")
    return left


def outcome(name: str, command: list[str], limit: float, out: Path, device: str) -> dict[str, Any]:
    """Run one part; gives what its JSON holds, and prints the end of its log."""
    log, began = out / f"{name}.log", time.monotonic()
    with temporary_folder() as temporary:
        status, code = run_part(command, limit, log, environment_of(device, temporary))
    seconds, text = round(time.monotonic() - began, 1), log.read_text(errors="replace")
    print("\n".join(text.splitlines()[-40:]), flush=True)
    print(f"===== {name}: {status}, exit code {code}, {seconds} s", flush=True)
    return {
        "part": name, "status": status, "exit_code": code, "seconds": seconds,
        "command": command[1:], "device": device, "commit": commit(), "results": read(name, text),
    }  # fmt: skip


def read(name: str, log: str) -> dict[str, Any]:
    """A part's numbers, and the rows of its tables as they are."""
    reader = READERS.get(name)
    tables = [line for line in log.splitlines() if line.startswith("|")]
    return (reader(log) if reader else {}) | {"tables": tables}


# -------------------------------------------------------------------------------- tables


def recorded(out: Path) -> dict[str, dict[str, Any]]:
    """The JSON of each part that has one, in the order of PARTS."""
    files = {name: out / f"{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def section(parts: dict[str, dict[str, Any]]) -> str:
    """The section of RESULTS.md."""
    environment = parts.get("environment", {}).get("results", {})
    keys = ("GPU", "driver", "torch", "triton", "CUDA", "cuDNN")
    machine = ", ".join(f"{key} {environment[key]}" for key in keys if key in environment)
    lines = [HEADING, "", machine or "Not yet run, because no GPU was at hand.", ""]
    lines += ["```sh", "python benchmarks/first_gpu.py", "```", ""]
    lines += [
        "At 1024 x 1024. The predictions are for an H100. Memory has 0.6 GB that torch does not count.",
        "",
    ]
    lines += ["| | predicted | measured | measured / predicted |", "|---|---|---|---|"]
    found = measured({name: part["results"] for name, part in parts.items()})
    for key, prediction in PREDICTED.items():
        value = found.get(key)
        cells = ["not yet", ""]
        if value is not None:
            cells = [f"{value:.4g}", f"{value / prediction.middle:.2f}"]
        lines.append(f"| {key} | {prediction} | {' | '.join(cells)} |")
    if parts:
        lines += ["", "| part | | s | |", "|---|---|---|---|"]
    for name, part in parts.items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {note_of(part['results'])} |")
    for name, part in parts.items():
        if tables := part["results"].get("tables"):
            command = " ".join(part["command"][1:])
            what = PARTS[name].what
            lines += [
                "",
                f"{what[0].upper()}{what[1:]} (`{command}`, commit {part['commit'][:10]}):",
            ]
            lines += separated(tables)
    return "\n".join(lines) + "\n"


def note_of(results: dict[str, Any]) -> str:
    """What a part counted; a missed target, too, makes its exit code 1."""
    if "tests" in results:
        return ", ".join(f"{count} {what}" for what, count in results["tests"].items())
    counts = {"rows failed": results.get("failed"), "targets missed": results.get("missed")}
    return ", ".join(f"{what}: {len(names)}" for what, names in counts.items() if names)


def separated(rows: list[str]) -> list[str]:
    """Rows of several tables, with an empty line before each table: before the row above a line of
    dashes."""
    found: list[str] = []
    for i, row in enumerate(rows):
        if i + 1 < len(rows) and rows[i + 1].startswith("|---"):
            found.append("")
        found.append(row)
    return found


def with_section(text: str, new: str) -> str:
    """RESULTS.md with its section, the one under HEADING, in place of the old one; or at its
    end."""
    before, there, rest = text.partition(f"{HEADING}\n")
    _, next_heading, after = rest.partition("\n## ") if there else ("", "", "")
    return before.rstrip() + "\n\n" + new + (f"\n## {after}" if next_heading else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUN / "first_gpu")
    parser.add_argument(
        "--minutes",
        type=float,
        default=30,
        help="of this call; parts that might take longer are left",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=", ".join(PARTS),
    )
    parser.add_argument("--again", action="store_true", help="also the parts that have a result")
    parser.add_argument("--tables", action="store_true", help="only write the tables to RESULTS.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    left = []
    if not args.tables:
        parts = {name: PARTS[name] for name in PARTS if name in args.parts}
        left = run_parts(parts, args.out, args.minutes, args.device, args.again)
    found = recorded(args.out)
    on_gpu = {name: part for name, part in found.items() if part["device"] == "cuda"}
    if not args.tables:
        write(args.out / "tables.md", section(found))
    if on_gpu or args.tables:
        write(RESULTS, with_section(RESULTS.read_text(), section(on_gpu)))
    print("\n| part | | s |\n|---|---|---|")
    for name in args.parts:
        part = found.get(name, {"status": "not run", "seconds": ""})
        print(f"| {name} | {part['status']} | {part['seconds']} |")
    asked = [part for name, part in found.items() if name in args.parts]
    return int(bool(left) or any(part["status"] != "ok" for part in asked))


if __name__ == "__main__":
    sys.exit(main())
