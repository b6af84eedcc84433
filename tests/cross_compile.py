"""Compile the kernels for GPUs that need not be present, as they are launched on them.

Prints what the compiler made of each, lists of JSON objects, and a line that sums it up. It runs
with Triton 3.6 to 3.9, which bring ptxas and the disassembler along.

    python tests/cross_compile.py
"""

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
from regional.kernel import HEADS_TOGETHER, Launch, launch_for, regional_kernel  # noqa: E402
from runtime.unmasked import blend_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {
    "query_bits": "i64", "key_bits": "i64", "base_row": "i32", "base_weight": "fp32",
    "queries": "i32", "keys": "i32", "as_key": "i32", "as_query": "i32", "log_weight": "fp32",
    "row": "i32",
}  # fmt: skip
HALVES = torch.bfloat16, torch.float16
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDL", "STL")
# A barrier of some warps alone gives the number of threads too.
WHOLE_BARRIER = re.compile(r"BAR\.SYNC\S* \w+\s*$")


def described(source, kernel, capability: int, dtype: torch.dtype, given: dict, **options: int) -> dict:
    """Compile a kernel, and tell what ptxas and the disassembler say of it.

    given: the values of its constants and the types of its TMA descriptors. registers: of a thread.
    stack and shared: bytes. How often each of INSTRUCTIONS occurs. loops and barriers: the
    instructions, and among them the barriers that all warps of a program wait at, of one iteration
    of each loop that multiplies matrices: the full tiles', the partial tiles'.
    """
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = given.get(name)
        if isinstance(kind, str):
            signature[name] = kind
        elif kind is not None:
            signature[name] = "constexpr"
            constants[name] = kind
        elif name in (*"qkvo", "base", "regional") or name in POINTERS:
            signature[name] = "*" + POINTERS.get(name, TYPES[dtype])
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        is_stride = name.endswith(("_b", "_h", "_l")) and not name.endswith(("rows_b", "rows_h"))
        if signature[name].startswith("*") or is_stride:  # these are multiples of 16
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        source(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = run("nvdisasm", cubin.name)
    found = loops(sass)
    return {
        "capability": capability, "dtype": TYPES[dtype],
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        **{x: len(re.findall(rf"\b{x}\b", sass)) for x in INSTRUCTIONS},
        "loops": [len(loop) for loop in found],
        "barriers": [sum(bool(WHOLE_BARRIER.search(x)) for x in loop) for loop in found],
    }  # fmt: skip


def compile_kernel(
    capability: int, dtype: torch.dtype, head_dim: int = 128, base: bool = True, weighted: bool = False
) -> dict:
    """The regional kernel as `attend` launches it on such a GPU."""
    launch = launch_for(dtype, divmod(capability, 10), weighted)
    given = {
        "D": head_dim, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BASE": base,
        "TMA": launch.tma, "WEIGHTED": weighted, "HEADS": HEADS_TOGETHER,
        "MIXED_STAGES": launch.mixed_stages,
    }  # fmt: skip
    if launch.tma:
        for name, rows in ("q", launch.block_m), ("k", launch.block_n), ("v", launch.block_n):
            given[name] = f"tensordesc<{TYPES[dtype]}[1, 1, {rows}, {head_dim}]>"
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    told = described(ASTSource, regional_kernel, capability, dtype, given, **options)
    deep = tiles_in_flight(told["shared"], launch, dtype, head_dim)
    about = {"head_dim": head_dim, "base": base, "weighted": weighted, "tiles_in_flight": deep}
    return told | about | launch._asdict()


def compile_blend(capability: int) -> dict:
    """The kernel that blends the library's results, as `blend` launches it."""
    given = {"D": 128, "ROWS": 64, "BASE": True}
    return described(ASTSource, blend_kernel, capability, torch.bfloat16, given)


def compile_gluon(dtype: torch.dtype) -> dict:
    """The Gluon kernel for Hopper as `gluon_attention` launches it."""
    names = "STAGES", "PRODUCER_REGISTERS", "CONSUMER_REGISTERS"
    given = {"BASE": True, "HEADS": HEADS_TOGETHER}
    given |= {name: getattr(gluon_attention, name) for name in names}
    for name in "qkv":
        rows = gluon_attention.HALF if name == "q" else gluon_attention.BLOCK_N
        layout = gluon_attention.shared_layout(rows, 128, dtype)
        given[name] = f"tensordesc<{TYPES[dtype]}[{rows}, 128],{layout!r}>"
    return described(GluonASTSource, gluon_attention.gluon_kernel, 90, dtype, given, num_warps=4)


def tiles_in_flight(shared: int, launch: Launch, dtype: torch.dtype, head_dim: int) -> int:
    """How many tiles of K and V fit into the shared memory that the kernel takes.

    Next to them it holds q's tile where it comes by TMA; pointers load it into registers.
    """
    row = head_dim * dtype.itemsize
    q_tile = launch.block_m * row if launch.tma else 0
    return (shared - q_tile) // (2 * launch.block_n * row)


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
    bf16 = torch.bfloat16
    launched = [
        (90, bf16, 32), (90, bf16, 64), (90, bf16), (90, torch.float16), (90, torch.float32),
        (90, bf16, 128, False), (80, bf16), (89, bf16), (100, bf16), (120, bf16),
        (89, bf16, 128, True, True), (90, bf16, 128, True, True),
    ]  # fmt: skip
    made = {
        "regional": [compile_kernel(*each) for each in launched],
        "blend": [compile_blend(capability) for capability in (80, 89, 90, 100, 120)],
        "gluon": [compile_gluon(dtype) for dtype in HALVES],
    }
    json.dump(made, sys.stdout, indent=1)
    spilling = [sum(each["stack"] > 0 for each in kernels) for kernels in made.values()]
    count = sum(map(len, made.values()))
    print(f"\n{count} kernels compiled, {sum(spilling)} spill registers", file=sys.stderr)
