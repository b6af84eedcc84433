"""benchmarks/first_gpu.py: parts that fail or hang do not stop the rest; what is done is not done
again; its tables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import environment, first_gpu, speed
from benchmarks.first_gpu import Part

HANGS = """
import os, subprocess, sys, time
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""
WRITES = "import sys, tempfile; open(sys.argv[1], 'w').write(tempfile.mkstemp()[1]); raise SystemExit(3)"


def part(text: str, *args: object, limit: int = 30) -> Part:
    script = [sys.executable, "-u", "-c", text, *map(str, args)]
    return Part("a part", limit, script, script)


def results(out: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}


def is_running(pid: str) -> bool:
    """Is this process there, and not only its exit code?"""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_fails_does_not_stop_the_rest(tmp_path, capsys):
    """Without a GPU those that need one are left out. Temporary files are gone with their part."""
    parts = {
        "bad": part(WRITES, tmp_path / "name"),
        "good": part("import os; print('| a | 1 |'); print(os.environ['REGIONAL_TEST_DEVICE'])"),
        "gpu": part("")._replace(on_cpu=None),
    }
    assert first_gpu.run_parts(parts, tmp_path, 10, "cpu", False) == []
    found = results(tmp_path)
    outcomes = {name: (each["status"], each["exit_code"]) for name, each in found.items()}
    assert outcomes == {"bad": ("failed", 3), "good": ("ok", 0)}
    assert found["good"]["results"]["tables"] == ["| a | 1 |"]
    assert (tmp_path / "good.log").read_text() == "| a | 1 |\ncpu\n"
    printed = capsys.readouterr().out
    assert "===== good: ok, exit code 0" in printed and "gpu: needs a GPU" in printed
    assert not os.path.exists((tmp_path / "name").read_text())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path):
    pids = tmp_path / "pids"
    parts = {"hangs": part(HANGS, pids, limit=3), "next": part("print('here')")}
    assert first_gpu.run_parts(parts, tmp_path, 10, "cuda", False) == []
    found = results(tmp_path)
    assert found["hangs"]["status"] == "timed out" and found["hangs"]["exit_code"] is None
    assert (tmp_path / "hangs.log").read_text() == "begun\n"  # what it printed until then is kept
    assert found["next"]["status"] == "ok"
    deadline = time.monotonic() + 60
    while any(map(is_running, pids.read_text().split())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_that_is_done_is_not_run_again_unless_asked(tmp_path):
    parts = {"once": part("import sys; open(sys.argv[1], 'a').write('x')", tmp_path / "count")}
    for again, expected in (False, "x"), (False, "x"), (True, "xx"):
        first_gpu.run_parts(parts, tmp_path, 10, "cuda", again)
        assert (tmp_path / "count").read_text() == expected


def test_parts_that_might_not_end_in_time_are_left_for_the_next_call(tmp_path):
    parts = {name: part("", limit=limit) for name, limit in {"short": 20, "long": 90, "also short": 20}.items()}
    assert first_gpu.run_parts(parts, tmp_path, 1, "cuda", False) == ["long"]
    assert set(results(tmp_path)) == {"short", "also short"}
    assert first_gpu.run_parts(parts, tmp_path, 2, "cuda", False) == []
    assert set(results(tmp_path)) == set(parts)


def test_all_parts_end_within_the_time_that_is_lent():
    parts = first_gpu.PARTS.values()
    assert max(each.limit for each in parts) < 600 and sum(each.limit for each in parts) <= 30 * 60
    assert first_gpu.READERS.keys() == first_gpu.PARTS.keys()
    for each in parts:
        files = [word for word in each.command + (each.on_cpu or []) if word.endswith(".py")]
        assert files and all((first_gpu.ROOT / file).exists() for file in files if not os.path.isabs(file))


KERNEL = """| picture | tokens | attention | ms | TFLOP/s | extra MiB | most time in |
|---|---|---|---|---|---|---|
| 1024 x 1024 | four quadrants, 6144 tokens | unmasked, base prompt and picture | 0.414 | 630 | | CUDNN_ATTENTION |
| 1024 x 1024 | four quadrants, 6144 tokens | kernel (ours) | 0.29 | 409.5 | 1.2 | `regional_kernel` |
| 1024 x 1024 | four quadrants, 6144 tokens | SDPA, dense mask | failed: RuntimeError: no kernel |
"""
STEPS = """compiled: 17.35 GB of weights

| picture | step | | ms | extra MiB | differs from the first by |
|---|---|---|---|---|---|
| 1024 x 1024 | plain | compiled | 140.1 | 500 |  |
| 1024 x 1024 | late | compiled | 140.0 | 500 |  |
| 1024 x 1024 | regional, 4 | compiled | 250.0 | 800 | 1e-02 |
| 1024 x 1024 | regional, 16 | compiled | failed: OutOfMemoryError: CUDA out of memory |

| | measured | floor | aim | |
|---|---|---|---|---|
| G6: compiled / own plain, R = 4 | 1.38 | <= 1.5 | <= 1.4 | aim met |
| G9: compiled, late step / plain step | 1.03 | <= 1.02 | <= 1 | missed |
"""
MEMORY = "| M3: bfloat16 under 24 GB, of bfloat16's time without | 1.02 | it runs | <= 1.1 | aim met |\n"
TESTS = """....F                         [100%]
FAILED tests/test_cuda.py::test_x[a b] - AssertionError: 0.3
1 failed, 90 passed, 3 skipped in 100.0s
"""
LOGS = {"kernel": KERNEL, "steps": STEPS, "memory": MEMORY, "compile": TESTS}


def test_the_numbers_of_a_log_are_read():
    assert [len(first_gpu.read(name, log)["failed"]) for name, log in LOGS.items()] == [1, 1, 0, 1]
    assert first_gpu.read_environment('GPU: H100\n{"GPU": "H100"}\n') == {"GPU": "H100"}
    for reader in first_gpu.READERS.values():  # the log of a part that was killed at once
        assert not any(reader("").values())


@pytest.fixture
def results_file(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "RESULTS.md"
    file.write_text("# Results\n\nBefore.\n\n## Loading\n\nAfter.\n")
    monkeypatch.setattr(first_gpu, "RESULTS", file)
    return file


def test_the_tables_say_what_was_predicted_and_measured(tmp_path, results_file):
    found = {"status": "ok", "exit_code": 0, "seconds": 1.0, "command": ["-u", "x.py"], "device": "cuda"}
    for name, log in LOGS.items():
        found |= {"part": name, "commit": "0123456789abcdef", "results": first_gpu.read(name, log)}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    before = results_file.read_text()
    for _ in range(2):  # the second time in place of the first
        assert first_gpu.main(["--tables", "--out", str(tmp_path)]) == 0
        text = results_file.read_text()
        assert text.startswith(f"{before}\n") and text.count(first_gpu.HEADING) == 1
    for row in (
        "| plain step, compiled, ms | 128 | 140.1 | 1.09 |",
        "| regional step, R = 16, compiled, ms | 388 | not yet |  |",
        "| whole run over plain FLUX's, R = 4 | 1.39 | 1.326 | 0.95 |",  # (10 x 250 + 14 x 140) / 24 / 140.1
        "| kernel, four quadrants, TFLOP/s | 413 to 441 | 409.5 | 0.96 |",
        "| kernel over the library's unmasked attention | 0.65 to 0.7 | 0.65 | 0.96 |",
        "| memory, R = 4, compiled, GB | 18.8 | 18.79 | 1.00 |",
        "| run under 24 GB over one without a cap | 1 | 1.02 | 1.02 |",
        "| compile | ok | 1.0 | 1 failed, 90 passed, 3 skipped |",
        "| steps | ok | 1.0 | rows failed: 1, targets missed: 1 |",
        "| 1024 x 1024 | regional, 4 | compiled | 250.0 | 800 | 1e-02 |",
    ):
        assert row in text.splitlines(), row
    text = f"# Results\n\n{first_gpu.HEADING}\n\nOld.\n\n## Loading\n\nAfter.\n"
    assert first_gpu.with_section(text, f"{first_gpu.HEADING}\n\nNew.\n") == text.replace("Old", "New")


def test_every_prediction_can_be_measured():
    """From the rows and targets that the benchmarks print."""
    kinds = "plain", "late", "regional, 1", "regional, 4", "regional, 16"
    rows = [f"| 1024 x 1024 | {kind} | compiled | 100.0 | 800 |  |" for kind in kinds]
    caps = [f"| M3: {cap.what} under {cap.gigabytes} GB, of {cap.rival}'s time without" for cap in speed.CAPS]
    logs = LOGS | {"steps": "\n".join(["compiled: 17.35 GB of weights", *rows])}
    logs["memory"] = "\n".join(f"{cap} | 1.1 | it runs | <= 1 | met |" for cap in caps)
    found = first_gpu.measured({name: first_gpu.read(name, log) for name, log in logs.items()})
    assert found.keys() == first_gpu.PREDICTED.keys()
    assert (first_gpu.REGIONAL, first_gpu.STEPS_OF_A_RUN) == (speed.REGIONAL, speed.REGIONAL + speed.LATE)


def test_results_of_a_cpu_are_not_written_as_those_of_a_gpu(tmp_path, results_file, monkeypatch):
    before = results_file.read_text()
    monkeypatch.setattr(first_gpu, "PARTS", {"steps": part(f"print({STEPS!r})")})
    assert first_gpu.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert results_file.read_text() == before
    assert "| plain step, compiled, ms | 128 | 140.1 | 1.09 |" in (tmp_path / "out" / "tables.md").read_text()


def test_what_is_missing_is_named(monkeypatch, capsys):
    """Also of packages: -S has none, and the runner must start to say so."""
    monkeypatch.setattr(environment, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["environment.py", "--device", "cpu"])
    assert environment.main() == 1
    out = capsys.readouterr().out
    assert "The package no_such_package is missing." in out
    assert first_gpu.read_environment(out)["missing"] == ["no_such_package"]
    command = [sys.executable, "-I", "-S", first_gpu.ROOT / "benchmarks" / "first_gpu.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--tables" in done.stdout, done.stderr
