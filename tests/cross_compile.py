"""Compile the kernels for GPUs that need not be present, as they are launched on them.

Prints what the compiler made of each, a list of JSON objects. It runs with Triton 3.6 to 3.9, which
bring ptxas and the disassembler along.

    python tests/cross_compile.py
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import gluon_attention  # noqa: E402
from regional.kernel import (  # noqa: E402
    HEADS_TOGETHER,
    Launch,
    blend_kernel,
    launch_for,
    regional_kernel,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {
    "o": None, "base": None, "query_bits": "i64", "key_bits": "i64",
    "base_row": "i32", "base_weight": "fp32", "queries": "i32", "keys": "i32",
    "as_key": "i32", "as_query": "i32", "log_weight": "fp32", "regional": None, "regional_row": "i32",
}  # fmt: skip
# A barrier of some warps alone gives the number of threads too
WHOLE_BARRIER = re.compile(r"BAR\.SYNC\S* \w+\s*$")
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDL", "STL")


def compile_kernel(capability: int, dtype: torch.dtype, head_dim: int, base: bool, weighted: bool = False) -> dict:
    """Compile the regional kernel as `attend` launches it on such a GPU; see `described`."""
    launch = launch_for(dtype, divmod(capability, 10))
    launch = launch.weighted() if weighted else launch
    constants = {
        "D": head_dim, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BASE": base, "TMA": launch.tma,
        "WEIGHTED": weighted, "HEADS": HEADS_TOGETHER, "MIXED_STAGES": launch.mixed_stages,
    }  # fmt: skip
    signature, attributes = {}, {}
    for i, name in enumerate(regional_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q", "k", "v") and launch.tma:
            rows = launch.block_m if name == "q" else launch.block_n
            signature[name] = f"tensordesc<{TYPES[dtype]}[1, 1, {rows}, {head_dim}]>"
        elif name in ("q", "k", "v") or name in POINTERS:
            signature[name] = "*" + (POINTERS.get(name) or TYPES[dtype])
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        is_stride = name.endswith(("_b", "_h", "_l"))
        if signature[name].startswith("*") or is_stride:  # these are multiples of 16
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(
        ASTSource(regional_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )
    deep = tiles_in_flight(compiled.metadata.shared, launch, dtype, head_dim)
    return {
        "capability": capability, "dtype": TYPES[dtype], "head_dim": head_dim, "base": base,
        "weighted": weighted, **launch._asdict(), "tiles_in_flight": deep, **described(compiled),
    }  # fmt: skip


def compile_blend(capability: int, dtype: torch.dtype) -> dict:
    """Compile the kernel that blends the library's results, as `blend` launches it; see `described`."""
    constants = {"D": 128, "ROWS": 64, "BASE": True}
    signature, attributes = {}, {}
    for i, name in enumerate(blend_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*" + (POINTERS[name] or TYPES[dtype])
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name.endswith(("_b", "_h", "_l")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(blend_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True},
    )
    return {"capability": capability, "dtype": TYPES[dtype], **described(compiled)}


def compile_gluon(dtype: torch.dtype, base: bool) -> dict:
    """Compile the Gluon kernel for Hopper as `gluon_attention` launches it; see `described`."""
    head_dim = 128
    kernel = gluon_attention.gluon_kernel
    constants = {
        "BASE": base, "HEADS": HEADS_TOGETHER, "STAGES": gluon_attention.STAGES,
        "PRODUCER_REGISTERS": gluon_attention.PRODUCER_REGISTERS,
        "CONSUMER_REGISTERS": gluon_attention.CONSUMER_REGISTERS,
    }  # fmt: skip
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q", "k", "v"):
            rows = gluon_attention.HALF if name == "q" else gluon_attention.BLOCK_N
            layout = gluon_attention.shared_layout(rows, head_dim, dtype)
            signature[name] = f"tensordesc<{TYPES[dtype]}[{rows}, {head_dim}],{layout!r}>"
        elif name in POINTERS:
            signature[name] = "*" + (POINTERS[name] or TYPES[dtype])
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        is_stride = name.endswith(("_b", "_h", "_l")) and not name.endswith(("rows_b", "rows_h"))
        if signature[name].startswith("*") or is_stride:
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    return {"dtype": TYPES[dtype], "base": base, **described(compiled)}


def tiles_in_flight(shared: int, launch: Launch, dtype: torch.dtype, head_dim: int) -> int:
    """How many tiles of K and V fit into the shared memory that the kernel takes.

    Next to them it holds q's tile where it comes by TMA; pointers load it into registers.
    """
    row = head_dim * dtype.itemsize
    q_tile = launch.block_m * row if launch.tma else 0
    return (shared - q_tile) // (2 * launch.block_n * row)


def described(compiled) -> dict:
    """What ptxas and the disassembler tell of a compiled kernel.

    registers: of a thread. stack and shared: bytes. How often each of INSTRUCTIONS occurs. loops
    and barriers: the instructions, and among them the barriers that all warps of a program wait at,
    of one iteration of each loop that multiplies matrices: the full tiles', the partial tiles'.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = run("nvdisasm", cubin.name)
    found = loops(sass)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        **{x: len(re.findall(rf"\b{x}\b", sass)) for x in INSTRUCTIONS},
        "loops": [len(loop) for loop in found],
        "barriers": [sum(bool(WHOLE_BARRIER.search(x)) for x in loop) for loop in found],
    }


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that multiplies matrices, in the order of the code."""
    instructions, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loop = instructions[labels[back[1]] :]
                if any("MMA" in x for x in loop):
                    found.append(loop)
    return found[:2]  # what follows are the barriers' waiting loops, which jump back from after the end


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    launched = [
        *itertools.product([90], [torch.bfloat16, torch.float16, torch.float32], [32, 64, 128], [True]),
        *itertools.product([90], [torch.bfloat16], [128], [False]),
        *itertools.product([80, 89, 100, 120], [torch.bfloat16], [128], [True]),
        *itertools.product([89, 90], [torch.bfloat16], [128], [True], [True]),
    ]
    gluon = [compile_gluon(dtype, True) for dtype in (torch.bfloat16, torch.float16)]
    regional = [compile_kernel(*each) for each in launched]
    blend = [compile_blend(capability, torch.bfloat16) for capability in (80, 89, 90, 100, 120)]
    json.dump({"regional": regional, "blend": blend, "gluon": gluon}, sys.stdout, indent=1)
