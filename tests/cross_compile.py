"""Compile the kernel for GPUs that need not be there, as it is launched on them.

Prints what the compiler made of it, a list of JSON objects. ptxas and the disassembler come with Triton.

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

sys.path.insert(0, str(Path(__file__).parents[1]))
from regional.kernel import launch_for, regional_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {
    "o": None, "base": None, "query_bits": "i64", "key_bits": "i64",
    "base_row": "i32", "base_weight": "fp32", "queries": "i32", "keys": "i32",
    "as_key": "i32", "as_query": "i32", "log_weight": "fp32",
}  # fmt: skip
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDL", "STL")


def compile_kernel(capability: int, dtype: torch.dtype, head_dim: int, base: bool, weighted: bool = False) -> dict:
    """Registers, spilled bytes, shared memory, how often each of INSTRUCTIONS occurs, and the length of the loops."""
    launch = launch_for(dtype, divmod(capability, 10))
    launch = launch.weighted() if weighted else launch
    constants = {
        "D": head_dim, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BASE": base, "TMA": launch.tma,
        "WEIGHTED": weighted,
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
        if signature[name].startswith("*") or is_stride:  # what a launch finds to be a multiple of 16
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(regional_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = run("nvdisasm", cubin.name)
    return {
        "capability": capability, "dtype": TYPES[dtype], "head_dim": head_dim, "base": base, "weighted": weighted,
        **launch._asdict(),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared, **{x: len(re.findall(rf"\b{x}\b", sass)) for x in INSTRUCTIONS},
        "loops": loops(sass),
    }  # fmt: skip


def loops(sass: str) -> list[int]:
    """How many instructions each loop has that multiplies matrices: the full tiles', the mixed tiles'."""
    instructions, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels and any("MMA" in x for x in instructions[labels[back[1]] :]):
                found.append(len(instructions) - labels[back[1]])
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
    json.dump([compile_kernel(*each) for each in launched], sys.stdout, indent=1)
