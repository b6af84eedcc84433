"""What this machine has: versions, compilers, packages that are missing, and how fast it copies and
multiplies.

    python benchmarks/environment.py [--device cpu]

Prints what it finds, and as the last line all of it as JSON. The exit code is 1 where something is
missing without which the code does not run; the line says what. Only torch's own packages are
needed to get that far.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEEDED = (
    "torch", "triton", "numpy", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "einops", "PIL",
    "yaml", "tqdm", "msgspec", "pytest",
)  # fmt: skip
USED_WHERE_PRESENT = ("xdist", "diffusers", "transformers", "gguf", "matplotlib")
GIB = 2**30


def absent(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if not importlib.util.find_spec(module)]


def machine() -> dict[str, Any]:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "C compiler": shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang"),
        "C++ compiler": shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"),
        "Python.h": header.exists(),  # Triton's launchers are built with it
        "temporary folder, free GB": round(shutil.disk_usage(tempfile.gettempdir()).free / 1e9, 1),
        "missing": absent(NEEDED),
        "not there, and left out": absent(USED_WHERE_PRESENT),
    }


def versions() -> dict[str, Any]:
    import torch

    found = {"torch": torch.__version__}
    for module in "triton", "numpy":
        if importlib.util.find_spec(module):
            found[module] = importlib.import_module(module).__version__
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {
            "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(), "GPU": device.name,
            "GPUs": torch.cuda.device_count(), "multiprocessors": device.multi_processor_count,
            "GPU memory, GB": round(device.total_memory / 1e9, 1),
        }  # fmt: skip
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        found["driver"] = done.stdout.partition("\n")[0]
    return found


def rates() -> dict[str, float]:
    """Of GPU 0: GB/s of copies, TFLOP/s of a large product."""
    import torch

    def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    source = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda").bfloat16()
    pinned = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    pageable = torch.ones(GIB // 4, dtype=torch.uint8)
    times = {
        "on the GPU": seconds(lambda: target.copy_(source)),
        "pinned": seconds(lambda: target.copy_(pinned, non_blocking=True)),
        "pageable": seconds(lambda: target[: GIB // 4].copy_(pageable)),
        "product": seconds(lambda: square @ square),
    }
    return {
        "copy on the GPU, GB/s": 2 * GIB / 1e9 / times["on the GPU"],  # read and written
        "from pinned memory, GB/s": GIB / 1e9 / times["pinned"],
        "from pageable memory, GB/s": GIB / 4e9 / times["pageable"],
        "product of 8192 x 8192 in bfloat16, TFLOP/s": 2 * 8192**3 / 1e12 / times["product"],
    }


def problems(found: dict[str, Any], device: str) -> list[str]:
    """What keeps the code from running here, a sentence each."""
    said = [f"The package {module} is missing." for module in found["missing"]]
    if said:
        return said
    if device == "cuda" and "GPU" not in found:
        said.append("There is no CUDA GPU, or this build of torch has no CUDA.")
    if not found["C compiler"] or not found["Python.h"]:
        said.append("A C compiler or Python.h is missing, and Triton needs both.")
    command = [sys.executable, "-c", "import weights, generate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said.append(f"The program can't be imported: {done.stderr.strip().splitlines()[-1]}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    found = machine()
    if "torch" not in found["missing"]:
        found |= versions()
    if "GPU" in found and args.device == "cuda":
        found |= {what: round(rate, 1) for what, rate in rates().items()}
    found["problems"] = problems(found, args.device)
    for key, value in found.items():
        print(f"{key}: {value}", flush=True)
    print(json.dumps(found))
    return int(bool(found["problems"]))


if __name__ == "__main__":
    sys.exit(main())
