"""Which device, precision and attention functions a run uses."""

import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from errors import MISSING, InputError, info, warn
from formats.recognize import Source
from model.fp8 import why_not
from model.transformer import Flux
from regional.attention import MaskedAttention, Tokens, dense_attention, portable_attention
from regional.layout import Layout
from settings import Settings


def choose_device(settings: Settings) -> torch.device:
    """The device of the settings; auto: the first that there is. InputError for what it cannot do."""
    name = settings.device
    has_mps = torch.backends.mps.is_available()
    available = {"cuda": torch.cuda.is_available(), "mps": has_mps, "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name.partition(":")[0]):
        problem = "this machine, or this build of torch, has no such device"
        raise InputError("--device", name, problem)
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is None:  # torch.cuda's memory functions need it.
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # Triton launches on the current one.
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if settings.compile and not any(map(shutil.which, compilers)):
        problem = "torch.compile needs a C++ compiler, and there is none here; leave it out"
        raise InputError("--compile", MISSING, problem)
    if settings.offload == "blocks" and device.type == "mps":
        problem = "Apple's GPUs already share the host's memory; leave it out"
        raise InputError("--offload", "blocks", problem)
    return device


def choose_fp8(quantize: str, flux: Source, device: torch.device) -> bool:
    """Whether the transformer's weights are kept in FP8. auto: those of an FP8 file, where the GPU
    has FP8 matmul support; a warning tells why it has not."""
    if quantize == "fp8" and device.type == "mps":
        raise InputError("--quantize", "fp8", "Apple's GPUs have no float8; leave it out")
    weight = re.compile(r".*blocks\.\d+\..*\.weight$")
    dtypes = [tensor.dtype for key, tensor in flux.tensors.items() if weight.match(key)]
    stored = dtypes.count("F8_E4M3") > len(dtypes) / 2
    wanted = quantize == "fp8" or quantize == "auto" and stored and device.type == "cuda"
    problem = why_not(device) if wanted else ""
    if problem:
        instead = f"the weights of {flux.path} are upcast when they are loaded"
        if quantize == "fp8":
            instead = "each call upcasts the weights, which saves memory but no time"
        warn(f"{device} does not multiply in FP8 ({problem}): {instead}")
    return wanted and (quantize == "fp8" or not problem)


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, verbose: bool = False
) -> Callable[[Tokens], MaskedAttention]:
    """What makes the masked attention of the regional steps."""
    asked = name
    if name == "kernel" or name == "auto" and device.type == "cuda":
        try:
            from regional import kernel
            from runtime.unmasked import kernel_or_library
        except ImportError as error:
            problem = f"Triton is missing here ({error}); try --attention portable"
            raise InputError("--attention", name, problem) from error
    if name == "auto":
        name = "kernel" if device.type == "cuda" and kernel.runs_on(device) else "portable"
    if verbose:
        info(f"masked attention: {name}")
    if name != "kernel":
        return {"portable": portable_attention, "dense": dense_attention}[name]
    interpreted = kernel.INTERPRETED and device.type == "cpu" and dtype == torch.float32
    if not kernel.runs_on(device) and not interpreted:
        how = "in Triton's interpreter, TRITON_INTERPRET=1, it runs on the CPU in float32"
        problem = "the kernel needs an NVIDIA GPU from Ampere on; try --attention portable"
        raise InputError("--attention", "kernel", f"{problem} ({how}, slowly)")
    if device.type == "cuda" and (lacking := lacks_for_triton()):
        problem = f"Triton compiles its launcher with {lacking}, which this machine lacks"
        advice = "install it, or try --attention portable"
        raise InputError("--attention", asked, f"{problem}; {advice}")
    return partial(kernel_or_library, dtype=dtype, device=device)


def lacks_for_triton() -> str:
    """What Triton needs at a launch and this machine does not have; empty if all is there."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "a C compiler"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if header.exists() else f"Python's headers ({header})"


def library_attention(
    flux: Flux, layout: Layout, txt: Tensor, verbose: bool
) -> AbstractContextManager:  # fmt: skip
    """Makes torch prefer, on a GPU, the unmasked attention that is fastest for this image."""
    backends = []
    if txt.device.type == "cuda":
        heads = flux.params.num_heads
        length = txt.shape[1] + layout.width * layout.height // 256
        shape = (1, heads, length, flux.params.hidden_size // heads)
        backends = timed_backends(shape, txt.dtype, txt.device)
    if verbose:
        names = ", then ".join(backend.name for backend in backends)
        info(f"unmasked attention: {names or 'as torch chooses'}")
    backends = backends and [*backends, SDPBackend.MATH]
    return sdpa_kernel(backends, set_priority=True) if backends else nullcontext()


@lru_cache
def timed_backends(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[SDPBackend]:  # fmt: skip
    return fastest_backends(torch.randn(shape, device=device).to(dtype))


def fastest_backends(q: Tensor) -> list[SDPBackend]:
    """torch's SDPA backends that work for q (B, heads, L, head_dim) on its device, fastest first.

    Not MATH, which stores all L x L scores, nor cuDNN's where torch has it switched off, or up to
    9.15.0, which reads out of bounds if L is not a multiple of 128 (pytorch issue 169849).
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    seconds = {}
    if torch.backends.cuda.cudnn_sdp_enabled() and (torch.backends.cudnn.version() or 0) > 91500:
        backends.append(SDPBackend.CUDNN_ATTENTION)
    for backend in backends:
        timer = Timer("F.scaled_dot_product_attention(q, q, q)", globals={"F": F, "q": q})
        try:
            with sdpa_kernel(backend):
                seconds[backend] = timer.timeit(10).median
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # This GPU, or this build of torch, does not have it.
            continue
    return sorted(seconds, key=seconds.get)
