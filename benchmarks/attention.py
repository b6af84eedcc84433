"""How fast masked attention is: the kernel beside what else computes the same, in one run, on the same tokens.

    python benchmarks/attention.py          # on a CUDA GPU: FLUX.1's sizes, bfloat16
    python benchmarks/attention.py --cpu    # anywhere: a small version, float32

The rivals: `scaled_dot_product_attention` with the dense mask (the published way), compiled FlexAttention with a
BlockMask, and the portable path. The ceiling is the library's fastest unmasked attention, over the base prompt and the
picture. Everybody else gets the same tokens, sorted by their bits, and has to agree with float32 before it is timed.
On the CPU the kernel runs in Triton's interpreter, so there it has to agree but is not timed.

Each time is the median of --repeats measurements after a warm-up; in each round everybody has a turn. TFLOP/s count the
allowed pairs alone, 4 x head size x heads operations each. Memory is the peak beyond q, k, v and the output, with the
mask or the lists that a participant keeps. A participant that fails, or disagrees, has `failed: ...` in its row, and
the exit code is 1.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

if "--cpu" in sys.argv[1:]:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.failures import Failures  # noqa: E402
from model.attention import Block, apply_rope, plain_attention
from model.layers import QKNorm  # noqa: E402
from regional.attention import RegionalAttention, Tokens, allowed, portable_attention  # noqa: E402
from regional.layout import Layout, Region  # noqa: E402
from regional.mask import region_tokens  # noqa: E402
from runtime.choose import fastest_backends  # noqa: E402
from runtime.unmasked import kernel_or_library  # noqa: E402

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Setting(NamedTuple):
    device: str
    dtype: torch.dtype
    heads: int
    head_dim: int
    text_length: int
    sizes: list[tuple[int, int]]
    calls: int  # in one measurement
    error: float  # allowed, relative
    repeats: int  # measurements


GPU = Setting("cuda", torch.bfloat16, 24, 128, 512, [(1024, 1024), (1280, 768)], calls=10, error=1e-2, repeats=7)
CPU = Setting("cpu", torch.float32, 2, 32, 32, [(256, 256), (320, 192)], calls=20, error=1e-4, repeats=7)


def layouts(width: int, height: int) -> dict[str, Layout]:
    def grid(columns: int, rows: int) -> list[tuple[float, ...]]:
        return [(i / columns, j / rows, (i + 1) / columns, (j + 1) / rows) for j in range(rows) for i in range(columns)]

    overlapping = [(x, y, x + w, y + h) for x, y, w, h in (
        (0, 0, 0.5, 0.45), (0.3, 0.05, 0.4, 0.5), (0.55, 0.1, 0.4, 0.35), (0.05, 0.35, 0.35, 0.5),
        (0.25, 0.3, 0.5, 0.4), (0.6, 0.35, 0.35, 0.5), (0.1, 0.65, 0.5, 0.3), (0.45, 0.6, 0.45, 0.35),
    )]  # fmt: skip
    boxes = {
        "one box": [(0.25, 0.25, 0.75, 0.75)], "four quadrants": grid(2, 2), "three strips": grid(3, 1),
        "4 x 4 grid": grid(4, 4), "8 overlapping boxes": overlapping,
    }  # fmt: skip
    return {
        name: Layout(prompt="", width=width, height=height, regions=tuple(
            Region(prompt="", box=tuple(round(share * size) for share, size in zip(box, (width, height) * 2)))
            for box in corners
        ))
        for name, corners in boxes.items()
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ who takes part


def dense_sdpa(tokens: Tokens) -> Attend:
    mask = allowed(tokens.bits[:, None], tokens.bits[None, :])
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(tokens: Tokens) -> Attend:
    bits, length = tokens.bits, len(tokens.bits)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed(bits[i], bits[j])

    torch._dynamo.reset()  # its limit on recompilations would leave the later layouts uncompiled
    blocks = create_block_mask(mask_mod, None, None, length, length, device=bits.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


KERNEL, DENSE, FLEX, PORTABLE = "kernel (ours)", "SDPA, dense mask", "FlexAttention, compiled", "portable (ours)"
GLUON = "Gluon (ours, compiled only so far)"
CEILING = "unmasked, base prompt and picture"
BLOCK = Block("single", 0)


def our_kernel(setting: Setting) -> Callable[[Tokens], Attend]:
    return partial(kernel_or_library, dtype=setting.dtype, device=torch.device(setting.device))


def gluon(setting: Setting) -> Callable[[Tokens], Attend]:
    def make(tokens: Tokens) -> Attend:
        # Gluon is experimental, so that even the import may fail
        from benchmarks.gluon_attention import gluon_attention

        return gluon_attention(tokens, setting.dtype, torch.device(setting.device))

    return make


def participants(setting: Setting) -> dict[str, Callable[[Tokens], Attend]]:
    taking_part = {KERNEL: our_kernel(setting), DENSE: dense_sdpa, FLEX: flex}
    taking_part[PORTABLE] = portable_attention
    if setting.device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        taking_part[GLUON] = gluon(setting)
    return taking_part


# ------------------------------------------------------------------------------------------------ measuring


def seconds(call: Callable[[], Tensor], setting: Setting) -> float:
    """Of one call, in the mean of setting.calls."""
    if setting.device == "cpu":
        start = time.perf_counter()
        for _ in range(setting.calls):
            call()
        return (time.perf_counter() - start) / setting.calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(setting.calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / setting.calls


def medians(calls: dict[str, Callable[[], Tensor]], setting: Setting, failures: Failures, row: str) -> dict[str, float]:
    """Seconds of each, all taking turns; they are warm already. Those that fail are left out, and have a row, which
    begins with `row`."""
    times = {name: [] for name in calls}
    for _ in range(setting.repeats):
        for name in list(times):
            try:
                times[name].append(seconds(calls[name], setting))
            except Exception as error:
                del times[name]
                failures.add(f"{row} {name} |", error)
    return {name: statistics.median(each) for name, each in times.items()}


def extra_memory(call: Callable[[], Tensor], before: int) -> int:
    """Peak bytes of a call beyond `before` and the output. CUDA only."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.nbytes


def gpu_kernel(call: Callable[[], Tensor]) -> str:
    """The name of the GPU kernel that a call spends most time in, which tells the backend that torch took."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    longest = max(profile.key_averages(), key=lambda event: event.device_time_total, default=None)
    return f"`{longest.key[:80]}`" if longest else "not told"


def random_qkv(length: int, setting: Setting) -> list[Tensor]:
    """q, k, v as views of one fused projection, as the model has them."""
    fused = torch.randn(1, length, 3, setting.heads, setting.head_dim, device=setting.device)
    return list(fused.to(setting.dtype).permute(2, 0, 3, 1, 4))


def check(name: str, out: Tensor, expected: Tensor, setting: Setting) -> None:
    error = float((out.float() - expected).norm() / expected.norm())
    if not error < setting.error:
        raise ValueError(f"the relative error of {name} is {error:.1e}, more than {setting.error:.0e}")


# ------------------------------------------------------------------------------------------------ tables


class Case(NamedTuple):
    """One layout's tokens: q, k, v of a masked attention, what it has to give, in float32, and how many pairs of them
    are allowed; and q, k, v of the base prompt and the picture, which is unmasked."""

    row: str
    tokens: Tokens
    qkv: list[Tensor]
    expected: Tensor
    pairs: int
    plain: list[Tensor]


def case_of(width: int, height: int, name: str, layout: Layout, setting: Setting) -> Case:
    bits = region_tokens(layout).sorted()[0].bits(setting.text_length).to(setting.device)
    weight = torch.zeros(len(bits), dtype=torch.float64, device=setting.device)
    tokens = Tokens(bits, torch.zeros_like(bits), weight)
    values, counts = (x.cpu() for x in bits.unique(return_counts=True))
    pairs = int(counts @ allowed(values[:, None], values[None, :]).long() @ counts)
    qkv = random_qkv(len(bits), setting)
    expected = portable_attention(tokens)(*(x.float() for x in qkv))
    plain = random_qkv(setting.text_length + width * height // 256, setting)
    return Case(f"| {width} x {height} | {name}, {len(bits)} tokens |", tokens, qkv, expected, pairs, plain)


def ceiling(case: Case) -> tuple[Callable[[], Tensor], str]:
    """The library's fastest unmasked attention, warm, and its name."""
    backend = fastest_backends(case.plain[0])[0]

    def unmasked() -> Tensor:
        with sdpa_kernel(backend):
            return plain_attention(*case.plain, BLOCK)

    unmasked()
    return unmasked, backend.name


def compare(case: Case, setting: Setting, failures: Failures) -> dict[str, float]:
    """One layout: prints a row for each participant, gives useful TFLOP/s of those that did not fail."""
    calls, notes = {}, {}
    with failures.caught(f"{case.row} {CEILING} |"):
        calls[CEILING], backend = ceiling(case)
        notes[CEILING] = f"| {backend}"
    for name, make in participants(setting).items():
        with failures.caught(f"{case.row} {name} |"):
            before = torch.cuda.memory_allocated() if setting.device == "cuda" else 0
            attend = make(case.tokens)
            call = partial(attend, *case.qkv)
            check(name, call(), case.expected, setting)
            if setting.device == "cuda":
                notes[name] = f"{extra_memory(call, before) / 2**20:.1f} | {gpu_kernel(call)}"
            if setting.device == "cuda" or name != KERNEL:  # in Triton's interpreter it is not timed
                calls[name] = call
    rates = {}
    for name, time_ in medians(calls, setting, failures, case.row).items():
        pairs = case.plain[0].shape[2] ** 2 if name == CEILING else case.pairs
        rates[name] = 4 * setting.head_dim * setting.heads * pairs / time_ / 1e12
        print(f"{case.row} {name} | {time_ * 1e3:.3f} | {rates[name]:.3g} | {notes.get(name, '|')} |", flush=True)
    return rates


def both_branches(width: int, height: int, layout: Layout, setting: Setting, failures: Failures) -> None:
    """What regional attention costs in all, in the single blocks, beside plain attention; as generate.py runs it."""
    region = region_tokens(layout).sorted()[0]
    text, image = setting.text_length, width * height // 256
    bits = region.bits(text).to(setting.device)
    name, masked_attention = (KERNEL, our_kernel(setting))
    if setting.device == "cpu":
        name, masked_attention = PORTABLE, portable_attention
    attention = RegionalAttention(masked_attention, bits, text, image, base_ratio=0.3)
    q, k, v = random_qkv(len(bits) + text + image, setting)
    plain = random_qkv(text + image, setting)
    calls = {"both": lambda: attention(q, k, v, BLOCK), "plain": lambda: plain_attention(*plain, BLOCK)}
    with sdpa_kernel([*fastest_backends(plain[0]), SDPBackend.MATH], set_priority=True):
        for call in calls.values():
            call()
        times = medians(calls, setting, failures, "| both branches |")
    if len(times) < len(calls):
        return
    print(
        f"\nFour quadrants at {width} x {height}, base branch, masked branch by the {name} and blend: "
        f"{times['both'] * 1e3:.3f} ms, {times['both'] / times['plain']:.2f} times plain attention.",
        flush=True,
    )


def norm_and_rope(setting: Setting, failures: Failures) -> None:
    """QK-RMSNorm and RoPE of one single block: is there room for a kernel of our own beside compiled PyTorch?"""
    width, height = setting.sizes[0]
    length, hidden = setting.text_length + width * height // 256, setting.heads * setting.head_dim
    norm = QKNorm(setting.head_dim).to(setting.device, setting.dtype)
    qkv = torch.randn(1, length, 3 * hidden, device=setting.device).to(setting.dtype)
    pe = torch.randn(1, length, setting.head_dim // 2, 2, device=setting.device)

    def eager() -> tuple[Tensor, Tensor]:
        q, k, _ = norm(qkv, setting.heads)
        return apply_rope(q, pe), apply_rope(k, pe)

    compiled = torch.compile(eager, dynamic=False)
    q_and_k = qkv[..., : 2 * hidden].contiguous()
    calls = {"eager": eager, "compiled": compiled, "copying q and k": q_and_k.clone}
    for call in calls.values():
        call()
    times = medians(calls, setting, failures, "| norm and RoPE |")
    each = ", ".join(f"{name} {time_ * 1e3:.3f} ms" for name, time_ in times.items())
    print(f"\nQK-RMSNorm and RoPE over {length} tokens: {each} (the floor: as many bytes read and written).")


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a small version of it on the CPU")
    parser.add_argument("--repeats", type=int, default=GPU.repeats, help="measurements of each, at least 5")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error("--repeats: a median of fewer than 5 says little")
    setting = (CPU if args.cpu else GPU)._replace(repeats=args.repeats)
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    if args.cpu:
        print(f"{torch.get_num_threads()} threads of {platform.machine()}, {versions}\n")
    else:
        cudnn = torch.backends.cudnn.version()
        print(f"{torch.cuda.get_device_name()}, {versions}, CUDA {torch.version.cuda}, cuDNN {cudnn}\n")
    return run(setting)


def run(setting: Setting) -> int:
    """All tables; gives the exit code."""
    print("| picture | tokens | attention | ms | TFLOP/s | extra MiB | most time in |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failures, rates = Failures(), {}
    for width, height in setting.sizes:
        for name, layout in layouts(width, height).items():
            with failures.caught(f"| {width} x {height} | {name} |"):
                case = case_of(width, height, name, layout, setting)
                rates[width, name] = compare(case, setting, failures)
    width, height = setting.sizes[0]
    with failures.caught("| both branches |"):
        both_branches(width, height, layouts(width, height)["four quadrants"], setting, failures)
    with failures.caught("| norm and RoPE |"):
        norm_and_rope(setting, failures)
    if setting.device == "cuda":
        report(rates.get((width, "four quadrants"), {}), rates.get((width, "4 x 4 grid"), {}))
    return failures.exit_code()


def report(quadrants: dict[str, float], grid: dict[str, float]) -> None:
    """The targets, at the first size, where nobody that they need failed."""
    print("\n| at four quadrants | measured | target | aim |\n|---|---|---|---|")
    for what, rates, rival, target, aim in (
        ("kernel over SDPA with the dense mask", quadrants, DENSE, 3, 6),
        ("kernel over FlexAttention", quadrants, FLEX, 1, 1.15),
        ("useful TFLOP/s over the library's unmasked", quadrants, CEILING, 0.6, 0.75),
        ("4 x 4 grid's time over quadrants'", grid, KERNEL, 1.15, 1.05),
    ):
        if KERNEL in quadrants and rival in rates:
            print(f"| {what} | {quadrants[KERNEL] / rates[rival]:.2f} | {target} | {aim} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
