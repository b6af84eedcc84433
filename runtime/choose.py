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
from formats.fp8 import why_not
from formats.recognize import Source
from model.transformer import Flux
from regional.attention import MaskedAttention, Tokens, dense_attention, portable_attention
from regional.layout import Layout
from settings import Settings


def choose_device(settings: Settings) -> torch.device:
    """InputError for what it can't do."""
    name = settings.device
    libraries = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    available = [key for key, library in libraries.items() if library.is_available()]
    name = available[0] if name == "auto" else name
    if name.partition(":")[0] not in available:
        raise InputError("--device", name, "this machine or build of torch lacks it")
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is None:  # torch.cuda's memory functions need it.
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # Triton launches on the current one.
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if settings.compile and not any(map(shutil.which, compilers)):
        raise InputError("--compile", MISSING, "torch.compile needs a C++ compiler; leave it out")
    if settings.offload == "blocks" and device.type == "mps":
        raise InputError("--offload", "blocks", "Apple's GPUs share the host's memory already")
    return device


def choose_fp8(quantize: str, flux: Source, device: torch.device) -> bool:
    """Are the transformer's weights in FP8? auto: an FP8 file's, if a GPU multiplies it."""
    asked = quantize == "fp8"
    if asked and device.type == "mps":
        raise InputError("--quantize", "fp8", "Apple's GPUs have no float8; leave it out")
    weight = re.compile(r".*blocks\.\d+\..*\.weight$")
    dtypes = [x.dtype for key, x in flux.tensors.items() if weight.match(key)]
    stored = dtypes.count("F8_E4M3") > len(dtypes) / 2
    if not asked and not (quantize == "auto" and stored and device.type == "cuda"):
        return False
    problem = why_not(device)
    if problem:
        instead = f"the weights of {flux.path} are upcast when they are loaded"
        if asked:
            instead = "each call upcasts the weights, which saves memory but no time"
        warn(f"{device} does not multiply in FP8 ({problem}): {instead}")
    return asked or not problem


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, verbose: bool = False
) -> Callable[[Tokens], MaskedAttention]:
    """What makes the masked attention of the regional steps."""
    refusal = partial(InputError, "--attention", name)
    advice = "try --attention portable"
    on_gpu = device.type == "cuda"
    name = "portable" if name == "auto" and not on_gpu else name
    if name in ("auto", "kernel"):
        try:
            from regional import kernel
            from runtime.unmasked import kernel_or_library
        except ImportError as error:
            raise refusal(f"Triton is missing here ({error}); {advice}") from error
        runs = kernel.runs_on(device)
        name = "portable" if name == "auto" and not runs else "kernel"
    if verbose:
        info(f"masked attention: {name}")
    if name != "kernel":
        return {"portable": portable_attention, "dense": dense_attention}[name]
    problem = lacks_for_triton() if on_gpu else ""
    can_interpret = device.type == "cpu" and dtype == torch.float32
    if not runs and not (can_interpret and kernel.INTERPRETED):
        problem = "an NVIDIA GPU from Ampere on, or TRITON_INTERPRET=1 and float32 on the CPU"
    if problem:
        raise refusal(f"the kernel needs {problem}; {advice}")
    return partial(kernel_or_library, dtype=dtype, device=device)


def lacks_for_triton() -> str:
    """What Triton needs at a launch and this machine lacks; empty if nothing."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "a C compiler"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if header.exists() else f"Python's headers ({header})"


def library_attention(
    flux: Flux, layout: Layout, txt: Tensor, verbose: bool
) -> AbstractContextManager:  # fmt: skip
    """Makes torch prefer what is fastest for this image on a GPU."""
    backends = []
    if txt.device.type == "cuda":
        heads = flux.params.num_heads
        length = txt.shape[1] + layout.width * layout.height // 256
        shape = (1, heads, length, flux.params.hidden_size // heads)
        backends = timed_backends(shape, txt.dtype, txt.device)
    if verbose:
        names = ", then ".join(backend.name for backend in backends)
        info(f"unmasked attention: {names or 'as torch chooses'}")
    if not backends:
        return nullcontext()
    return sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True)


@lru_cache
def timed_backends(shape: tuple, dtype: torch.dtype, device: torch.device) -> list[SDPBackend]:
    return fastest_backends(torch.randn(shape, device=device).to(dtype))


def fastest_backends(q: Tensor) -> list[SDPBackend]:
    """torch's SDPA backends that work for q (B, heads, L, head_dim), fastest first: not MATH,
    which stores L x L scores, nor cuDNN's up to 9.15.0, which reads out of bounds unless L is a
    multiple of 128 (pytorch issue 169849)."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    cudnn = torch.backends.cudnn.version() or 0
    if torch.backends.cuda.cudnn_sdp_enabled() and cudnn > 91500:
        backends.append(SDPBackend.CUDNN_ATTENTION)
    seconds = {}
    for backend in backends:
        timer = Timer("F.scaled_dot_product_attention(q, q, q)", globals={"F": F, "q": q})
        try:
            with sdpa_kernel(backend):
                seconds[backend] = timer.timeit(10).median
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # This GPU or this build of torch lacks it.
            continue
    return sorted(seconds, key=seconds.get)
