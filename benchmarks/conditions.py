"""Runs under odd conditions, and signals in every phase: how does each end, and what does it leave?

    python benchmarks/conditions.py          # prints a table; exit code 1 if a run ends otherwise than it should

Linux, as root (a small file system is mounted). Runs are of the pocket model, 64 x 64 pixels. A signal, SIGTERM or
SIGINT, is sent when the phase has begun; the phase itself is made long by a server that drips, by many steps, or by a
function that sleeps. The seconds are those from the signal to the end.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GENERATE = str(ROOT / "generate.py")
FLAGS = ["--prompt", "a red circle", "--width", "64", "--height", "64", "--steps", "2", "--seed", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}


class Ended(NamedTuple):
    code: int
    message: str
    left: list[str]
    seconds: float


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def run(folder: Path, flags: list[str], shell: str = "", before: str = "", **environment: str) -> Ended:
    """A run in this folder; before, shell: what the command line begins and ends with."""
    there = files_in(folder)
    command = " ".join([before, sys.executable, GENERATE, *(f"'{flag}'" for flag in [*FLAGS, *flags]), shell])
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    message = next((line for line in lines if "Traceback" in line), lines[-1] if lines else "")
    return Ended(done.returncode, message, sorted(files_in(folder) - there), time.monotonic() - start)


def small_disk(folder: Path) -> Ended:
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", place], check=True)
    try:
        return run(place, ["--output", "a.png", "--metadata"])
    finally:
        subprocess.run(["umount", place], check=True)


def few_descriptors(folder: Path) -> Ended:
    swept = f"guidance={','.join(str(1 + i / 100) for i in range(240))}"
    ended = run(folder, ["--sweep", swept, "--output", "{sweep}.png"], before="ulimit -n 200;")
    return ended._replace(left=[f"{len(ended.left)} files"])


CONDITIONS: dict[str, tuple[Callable[[Path], Ended], int, list[str]]] = {
    # what, how it is run, the exit code, the files that it leaves
    "a full disk": (small_disk, 1, ["a.json"]),  # which is whole; the image is the last file of a job
    "a folder that is not there": (lambda f: run(f, ["--output", "gone/a.png"]), 0, ["gone/a.png"]),
    "a file in place of the folder": (lambda f: run(f, ["--output", "/dev/null/a.png"]), 2, []),
    "stdout closed": (lambda f: run(f, ["--output", "a.png"], ">&-"), 0, ["a.png"]),
    "stdout full": (lambda f: run(f, ["--output", "a.png"], "> /dev/full"), 0, ["a.png"]),
    "stdout a broken pipe": (lambda f: run(f, ["--output", "a.png"], "| true; exit ${PIPESTATUS[0]}"), 0, ["a.png"]),
    "stderr closed": (lambda f: run(f, ["--output", "a.png"], "2>&-"), 0, ["a.png"]),
    "stderr full": (lambda f: run(f, ["--output", "a.png"], "2> /dev/full"), 0, ["a.png"]),
    "an ASCII locale and a name that it lacks": (
        lambda f: run(f, ["--output", "b\u00e4r.png"], LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        0,
        ["b\u00e4r.png"],
    ),
    "200 file descriptors, a sweep of 240 images": (few_descriptors, 0, ["241 files"]),
}  # fmt: skip


PHASES = {
    # how the program is started, and the line of Python that makes the phase long
    "plan": (["--plan", "a cat", "--llm-url", "http://127.0.0.1:{port}/v1"], ""),
    "check": (["--check"], "import tools.check as m; m.report = wait"),
    "preview": (["--preview", "p.png"], "import tools.check as m; m.preview = wait"),
    "download": (["--model", "org/name"], ""),
    "loading": ([], "from formats import components as m; m.load = wait"),
    "encoding": ([], "import pipeline as m; m.encode_prompts = wait"),
    "steps": (["--steps", "5000"], ""),
    "decoding": ([], "import pipeline as m; m.Pipeline.decode = wait"),
    "writing": ([], "import tools.metadata as m; m.write = wait"),
}
STARTED = """
import sys, time
sys.path.insert(0, {root!r})
def wait(*arguments, **more):
    print("begun", file=sys.stderr, flush=True)
    for _ in range(10**9): time.sleep(0.01)
import generate
{long}
sys.exit(generate.main(sys.argv[1:]))
"""


def drip(server: socket.socket) -> None:
    """Answers each connection with a byte a second."""

    def answer(connection: socket.socket) -> None:
        try:
            connection.recv(10000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(1)
        except OSError:
            pass

    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()


def read(process: subprocess.Popen) -> str:
    """What it has written to stderr since."""
    try:
        return os.read(process.stderr.fileno(), 1 << 20).decode(errors="replace")
    except BlockingIOError:
        return ""


def signaled(phase: str, kind: signal.Signals, folder: Path, port: int) -> Ended:
    flags, long = PHASES[phase]
    flags = [flag.format(port=port) for flag in flags]
    output = [] if phase == "preview" else ["--output", "a.png"]
    code = STARTED.format(root=str(ROOT), long=long)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *FLAGS, *output, *flags], cwd=folder, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**ENVIRONMENT, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "hub")},
    )  # fmt: skip
    os.set_blocking(process.stderr.fileno(), False)
    text, waited = "", time.monotonic()
    signs = {"steps": "first step ended", "plan": None, "download": None}
    sign = signs.get(phase, "begun")
    while (sign is not None and sign not in text) and time.monotonic() - waited < 60:
        time.sleep(0.02)
        text += read(process)
    if sign is None:
        time.sleep(6)  # by then it waits for the server
    start = time.monotonic()
    process.send_signal(kind)
    try:
        code = process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    seconds = time.monotonic() - start
    text += read(process)
    lines = [line for line in text.splitlines() if line.strip()]
    left = sorted(name for name in files_in(folder) if not name.startswith("hub/"))
    return Ended(code, lines[-1] if lines else "", left, seconds)


def main() -> int:
    wrong = 0
    print("| condition | exit code | last message | left | |\n|---|---|---|---|---|")
    for what, (how, code, left) in CONDITIONS.items():
        with tempfile.TemporaryDirectory() as name:
            ended = how(Path(name))
        is_good = ended.code == code and ended.left == left and "Traceback" not in ended.message
        wrong += not is_good
        message = ended.message.replace(name, "").replace("|", "/")[:100]
        print(
            f"| {what} | {ended.code} | {message} | {' '.join(ended.left)} | {'' if is_good else 'WRONG'} |", flush=True
        )
    print("\n| signal | phase | exit code | seconds | last message | left | |\n|---|---|---|---|---|---|---|")
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=drip, args=(server,), daemon=True).start()
    for phase in PHASES:
        for kind in signal.SIGTERM, signal.SIGINT:
            with tempfile.TemporaryDirectory() as name:
                ended = signaled(phase, kind, Path(name), server.getsockname()[1])
            is_good = ended.code == 130 and ended.seconds < 2 and not ended.left
            wrong += not is_good
            cells = [kind.name, phase, ended.code, f"{ended.seconds:.2f}", ended.message[:60], " ".join(ended.left)]
            print(f"| {' | '.join(map(str, cells))} | {'' if is_good else 'WRONG'} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
