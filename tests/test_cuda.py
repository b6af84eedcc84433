"""What only a GPU can show: FLUX.1's sizes in bfloat16 as a run launches them, and whole images
against the CPU's.

Skipped without a GPU. REGIONAL_TEST_DEVICE=cpu runs the part with whole images on the CPU, to try
the tests themselves.
"""

import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tiny import maps_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from formats import components
from formats.fp8 import Fp8Linear, can_multiply, to_fp8
from formats.recognize import POCKET
from model.attention import Block
from pipeline import Pipeline
from regional.attention import RegionalAttention, portable_attention
from regional.layout import Control, Layout, Lora, Region, RegionLora
from regional.mask import region_tokens
from runtime import memory
from runtime.choose import fastest_backends
from sampler.flow import pack

ROOT = Path(__file__).parent.parent
DEVICE = os.environ.get("REGIONAL_TEST_DEVICE", "cuda")
IS_THERE = DEVICE != "cuda" or torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not IS_THERE, reason="needs a GPU")
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# -------------------------------------------------------------------------------- at FLUX.1's sizes

TEXT, HEADS, HEAD_DIM, HIDDEN = 512, 24, 128, 3072
Box = tuple[float, float, float, float]  # as fractions of the width and height


def grid(columns: int, rows: int) -> list[Box]:
    corners = [(i, j) for j in range(rows) for i in range(columns)]
    return [(i / columns, j / rows, (i + 1) / columns, (j + 1) / rows) for i, j in corners]


BOXES = {
    "whole image": grid(1, 1),
    "one box": [(0.25, 0.25, 0.75, 0.75)],
    "quadrants": grid(2, 2),
    "4 x 4 grid": grid(4, 4),
    "overlapping": [
        (0, 0, 0.5, 0.45), (0.3, 0.05, 0.7, 0.55), (0.55, 0.1, 0.95, 0.45),
        (0.05, 0.35, 0.4, 0.85), (0.25, 0.3, 0.75, 0.7),
    ],
}  # fmt: skip
PUBLISHED: dict[str, float] = {}
WEIGHTED = {"strength": 1.5, "feather": 64}
SQUARE, WIDE = (1024, 1024), (1280, 768)
LAUNCHES = [  # size, base_ratio, kind of block, what every region has
    pytest.param(SQUARE, 0.3, "double", PUBLISHED, id="double"),
    pytest.param(SQUARE, 0.3, "single", PUBLISHED, id="single"),
    pytest.param(SQUARE, 0.0, "single", PUBLISHED, id="no base branch"),
    pytest.param(WIDE, 0.3, "single", PUBLISHED, id="wide"),
    pytest.param(SQUARE, 0.3, "single", WEIGHTED, id="weighted"),
    pytest.param(SQUARE, 0.0, "double", WEIGHTED, id="weighted, no base branch"),
    pytest.param(WIDE, 0.3, "double", WEIGHTED, id="weighted, wide"),
]


def full_size(boxes: list[Box], size: tuple[int, int], every: dict[str, float]) -> Layout:
    corners = [tuple(round(a * b) for a, b in zip(box, size * 2)) for box in boxes]
    regions = tuple(Region(prompt="", box=box, **every) for box in corners)
    return Layout(prompt="", width=size[0], height=size[1], regions=regions)


@on_gpu
@torch.inference_mode()
@pytest.mark.parametrize("size, ratio, kind, every", LAUNCHES)
@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_the_kernel_errs_no_more_than_the_library_in_bfloat16(boxes, size, ratio, kind, every):
    """Against float32, at most twice the error of the library's attention over the same keys;
    always the same bits."""
    from regional.kernel import kernel_attention

    region = region_tokens(full_size(boxes, size, every)).sorted()[0]
    image, device = size[0] * size[1] // 256, torch.device(DEVICE)
    bits, block = region.bits(TEXT).to(device), Block(kind, 0)
    make = {
        "kernel": partial(kernel_attention, dtype=torch.bfloat16, device=device),
        "portable": portable_attention,
    }
    attentions = {
        name: RegionalAttention(masked, bits, TEXT, image, ratio, log_weights=region.log_weights())
        for name, masked in make.items()
    }
    base = 0 if ratio == 0 else TEXT if kind == "double" else TEXT + image
    torch.manual_seed(0)
    fused = torch.randn(1, len(bits) + base, 3, HEADS, HEAD_DIM, device=device).bfloat16()
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    exact = attentions["portable"](q.float(), k.float(), v.float(), block)
    torch.empty_like(q).fill_(float("nan"))  # what the memory of the output may hold
    found = {name: attention(q, k, v, block) for name, attention in attentions.items()}
    errors = {name: relative(out, exact) for name, out in found.items()}
    assert errors["kernel"] <= 2 * errors["portable"] < 2e-2, errors
    again = attentions["kernel"](q, k, v, block)
    assert torch.equal(again, found["kernel"])  # a race would show here


@on_gpu
@torch.inference_mode()
@pytest.mark.parametrize("length", [4608, 3917])
def test_the_attentions_of_the_library_agree_on_slices(length):
    """What the base branch gives it: q and k sliced along the tokens, v a view of the fused
    projection."""
    torch.manual_seed(0)
    fused = torch.randn(1, 10752, 3, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    piece = slice(2048, 2048 + length)
    q, k, v = q.contiguous()[:, :, piece], k.contiguous()[:, :, piece], v[:, :, piece]
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    backends = fastest_backends(q)
    assert backends and SDPBackend.MATH not in backends
    for backend in backends:
        with sdpa_kernel(backend):
            assert relative(F.scaled_dot_product_attention(q, k, v), exact) < 1e-2, backend


@on_gpu
@torch.inference_mode()
@pytest.mark.parametrize("rows", [16, 77, 4608, 10752])
def test_fp8_products_are_those_of_the_rounded_numbers(rows):
    device = torch.device("cuda", torch.cuda.current_device())
    multiplies = can_multiply(device)
    assert multiplies == (torch.cuda.get_device_capability() >= (8, 9))
    torch.manual_seed(0)
    outputs = 7 * HIDDEN  # of linear1, whose two parts are called apart
    weight = torch.randn(outputs, HIDDEN, device=device).bfloat16() / HIDDEN**0.5
    layer = Fp8Linear(HIDDEN, outputs, multiplies).to(device)
    layer.weight.data, layer.scale.data = to_fp8(weight)
    layer.bias.data = torch.randn(outputs, device=device).bfloat16()
    x = torch.randn(1, rows, HIDDEN, device=device).bfloat16()
    numbers, scale = to_fp8(x[0]) if multiplies else (x[0], 1.0)
    exact = (numbers.float() * scale) @ (layer.weight.float() * layer.scale).T + layer.bias.float()
    for part in slice(None), slice(0, 3 * HIDDEN), slice(3 * HIDDEN, None):
        assert relative(layer(x, rows=part)[0], exact[:, part]) < 5e-3


# ---------------------------------------------------------------- images of the pocket model

ADAPTERS = POCKET.parent / "adapters"
SIDE, BORDER = 256, 16  # pixels; the latent column between the two regions of ISOLATED
LEFT = Region(prompt="a red circle on a white background", box=(0, 0, 128, 256))
RIGHT = Region(prompt="a blue square on a white background", box=(128, 0, 256, 256))
OVER = Region(prompt="a green star on a white background", box=(96, 64, 240, 240))
BARRED = RegionLora(file=str(ADAPTERS / "barred.safetensors"), plain_steps=True)


def layout(*regions: Region, **keys) -> Layout:
    given = {"steps": 4, "mask_inject_steps": 2, "background_prompt": "a white background"} | keys
    prompt = "a red circle, a blue square on a white background"
    return Layout(prompt=prompt, width=SIDE, height=SIDE, regions=regions or (LEFT, OVER), **given)


def with_lora(region: Region) -> Region:
    return msgspec.structs.replace(region, loras=(BARRED,))


@pytest.fixture(scope="module")
def edges(tmp_path_factory) -> tuple[Control]:
    """The pocket ControlNet, on the left region alone, with an outline to follow."""
    image = Image.new("RGB", (SIDE, SIDE))
    ImageDraw.Draw(image).ellipse((24, 80, 104, 180), outline="white", width=3)
    path = tmp_path_factory.mktemp("control") / "edges.png"
    image.save(path)
    return (Control(model=str(ADAPTERS / "edges"), image=str(path), scale=1.0, region=0),)


def pipeline(device: str = DEVICE, dtype: str = "float32", **how) -> Pipeline:
    return Pipeline("pocket", device=device, dtype=dtype, **how)


def latents(given: Layout, made: Pipeline) -> Tensor:
    return made.denoise(made.prepare(given), 1).cpu()


@cache
def on_cpu(**how) -> Pipeline:
    return pipeline(device="cpu", **how)


@cache
def default_on_cpu() -> Tensor:
    return latents(layout(), on_cpu())


FP8_LIMIT = 0.5  # 8 bits have three behind the point, and the pocket model has short sums
HOW = {
    "float32": ({}, 2e-3),
    "portable": ({"attention": "portable"}, 2e-3),
    "dense": ({"attention": "dense"}, 2e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 0.1),
    "fp8": ({"dtype": "bfloat16", "quantize": "fp8"}, FP8_LIMIT),
}
COMPILED = {
    "float32": ({}, 5e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 0.1),
    "fp8": ({"dtype": "bfloat16", "quantize": "fp8"}, FP8_LIMIT),
}


@pytest.mark.parametrize("how, limit", HOW.values(), ids=HOW)
def test_an_image_is_that_of_the_cpu(how, limit):
    assert relative(latents(layout(), pipeline(**how)), default_on_cpu()) < limit


@on_gpu
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how, limit", COMPILED.values(), ids=COMPILED)
def test_a_compiled_image_is_that_of_the_cpu(how, limit):
    assert relative(latents(layout(), pipeline(compile=True, **how)), default_on_cpu()) < limit


SETTINGS = {
    "plain": layout(method="plain"),
    "composition": layout(method="rpg"),
    "no base branch": layout(base_ratio=0.0),
    "one image stream": layout(base_stream="shared"),
    "unmasked image attention": layout(image_attention="open"),
    "intervals": layout(double_inject_interval=2, single_inject_interval=2),
    "soft and strong": layout(
        msgspec.structs.replace(LEFT, feather=48),
        msgspec.structs.replace(OVER, strength=4.0, feather=48),
    ),
    "a LoRA on the whole image": layout(loras=(Lora(file=BARRED.file),)),
    "a region's LoRA": layout(with_lora(LEFT), OVER),
}


@pytest.mark.parametrize("dtype, limit", [("float32", 2e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_settings_act_as_on_the_cpu(given, dtype, limit):
    found, expected = latents(given, pipeline(dtype=dtype)), latents(given, on_cpu())
    assert relative(found, expected) < limit
    assert relative(expected, default_on_cpu()) > 0.25


@pytest.mark.parametrize("dtype, limit", [("float32", 2e-3), ("bfloat16", 0.1)])
def test_a_controlnet_acts_as_on_the_cpu(edges, dtype, limit):
    given = layout(controlnets=edges)
    expected = latents(given, on_cpu())
    assert relative(latents(given, pipeline(dtype=dtype)), expected) < limit
    assert relative(expected, default_on_cpu()) > 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_region_changes_nothing_outside_itself_to_the_bit(edges, dtype):
    def isolated(*regions: Region, **keys) -> Layout:
        return layout(*regions, steps=2, mask_inject_steps="100%", base_ratio=0.0, **keys)

    made = pipeline(dtype=dtype)
    first = latents(isolated(LEFT, RIGHT), made)
    for other in (
        isolated(msgspec.structs.replace(LEFT, prompt="a pink heart"), RIGHT),
        isolated(with_lora(LEFT), RIGHT),
        isolated(LEFT, RIGHT, controlnets=edges),
    ):
        found = latents(other, made)
        assert torch.equal(found[..., BORDER:], first[..., BORDER:])
        assert relative(found[..., :BORDER], first[..., :BORDER]) > 0.1


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_attention_maps_are_those_of_the_cpu(dtype, limit):
    found = []
    for made in pipeline(dtype=dtype), on_cpu():
        maps = maps_of(made)
        made.denoise(made.prepare(layout()), 1, [maps.extend])
        found.append(maps.maps)
    assert found[0].shape == found[1].shape
    assert (found[0] - found[1]).abs().max() < limit < found[1].max()


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_encoders_and_autoencoder_compute_what_they_do_on_the_cpu(dtype, limit):
    """T5, CLIP, and the VAE both ways."""
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = default_on_cpu()
    found, expected = (
        [*made.prepare(layout(method="rpg")).conditioning[:3], encoded(made, image)]
        for made in (pipeline(dtype=dtype), on_cpu())
    )
    for x, exact in zip(found, expected):
        assert x.shape == exact.shape and relative(x, exact) < limit
    images = [np.asarray(made.decode(z), dtype=float) for made in (pipeline(dtype=dtype), on_cpu())]
    assert np.abs(np.subtract(*images)).max() <= (1 if dtype == "float32" else 32)


@torch.inference_mode()
def encoded(made: Pipeline, image: Tensor) -> Tensor:
    vae = made.parts.get("ae")
    return pack(vae.encode(image.to(made.device, made.dtype))).float().cpu()


# -------------------------------------------------------------------------------- memory, processes


STREAMED = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "quantize": "fp8"},
}
COMPILED_TOO = [
    *(pytest.param(how, id=name) for name, how in STREAMED.items()),
    pytest.param({"compile": True}, id="compiled", marks=on_gpu),
]


def assert_same_bits(made: Pipeline, resident: Tensor) -> None:
    for _ in range(3):  # a copy that comes too late or too early would show in one of them
        assert torch.equal(latents(layout(), made), resident)


@pytest.mark.parametrize("how", COMPILED_TOO)
def test_streamed_blocks_are_the_same_bits(how):
    resident = latents(layout(), pipeline(offload="none", **how))
    assert_same_bits(pipeline(offload="blocks", **how), resident)


def blocks_streamed(made: Pipeline) -> int:
    """How many of the transformer's blocks are on the GPU only in turn. Its modulation layers,
    which may be too, have a weight and a bias alone."""
    streamed = made.parts.loaded["flux"].streamed
    return sum(len(module) > 2 for each in streamed for module in each.weights)


@on_gpu
@pytest.mark.parametrize("fraction", [0.1, 0.7], ids=lambda fraction: f"{fraction:.0%} fits")
@pytest.mark.parametrize("how", STREAMED.values(), ids=STREAMED)
def test_what_does_not_fit_is_streamed_and_the_same_bits(how, fraction, monkeypatch):
    """By `--offload auto` with so much free memory that a fraction of the weights fits."""
    resident = latents(layout(), pipeline(offload="none", **how))
    made = pipeline(**how)
    given = made.prepare(layout()).layout
    source, size = made.checkpoint.flux, 1 if made.fp8 else made.dtype.itemsize
    parameters = sum(np.prod(tensor.shape) for tensor in source.tensors.values())
    hidden = components.flux_params(source).hidden_size
    free = memory.working_bytes(hidden, given, made.dtype, made.fp8)
    free += int(fraction * parameters * size)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert_same_bits(made, resident)
    assert blocks_streamed(made) > 0


@on_gpu
def test_nothing_is_left_on_the_gpu():
    made = pipeline(offload="blocks")
    latents(layout(), made)
    made.drop("t5", "clip", "flux", "ae")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < 64 * 2**20


@on_gpu
def test_free_memory_is_what_this_process_can_take(capsys):
    """Of the 4 GiB that it may have, so that what other processes take of the GPU meanwhile makes
    no difference."""
    device, gib = torch.device("cuda", torch.cuda.current_device()), 2**30
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(4 * gib / total, device)
    try:
        before = memory.free_memory(device)
        taken = torch.empty(gib, dtype=torch.uint8, device=device)
        assert before <= 4 * gib and before - memory.free_memory(device) == taken.nbytes
        made = pipeline()
        latents(layout(), made)
        assert "GB are free" in capsys.readouterr().err and blocks_streamed(made) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_the_image_of_one(tmp_path):
    """One image, shared out by torchrun and NCCL."""
    file, image = tmp_path / "latents.safetensors", tmp_path / "a.png"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", ROOT / "generate.py"]
    flags = ["--parallel", "ulysses", "--layout", ROOT / "layout.yaml"]
    flags += ["--dtype", "float32", "--steps", "4"]
    found = []
    for start, more in (command, flags), ([sys.executable, ROOT / "generate.py"], flags[2:]):
        run = [*map(str, [*start, *more, "--output", image, "--save-latents", file, "--overwrite"])]
        done = subprocess.run(run, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(load_file(file)["latents"])
    assert relative(*found) < 2e-3
