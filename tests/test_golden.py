"""Whole runs against the published pipelines: latents that they made on small random checkpoints, see fixtures/golden.

The checkpoints are remade by make_checkpoint.py, every bit the same; each case's latents come from the published
regional code (or plain diffusers) and from transformers' text encoders, none of which is ours.
"""

import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import load_file

import generate

pytestmark = pytest.mark.published
LATENTS = load_file(GOLDEN / "latents.safetensors")


def run(golden, case, tmp_path, *more):
    model = golden / "models" / ("flux-tiny-schnell" if "schnell" in case else "flux-tiny-dev")
    out = tmp_path / "image.png"
    args = ["--model", model, "--layout", golden / case / "layout.yaml", "--device", "cpu", "--output", out]
    args += ["--dtype", "bfloat16" if case.endswith("bf16") else "float32", *more]
    assert generate.main([str(a) for a in [*args, "--save-latents", tmp_path / "latents.safetensors"]]) == 0
    return load_file(tmp_path / "latents.safetensors")["latents"], np.asarray(Image.open(out))


EXACT = [case for case in LATENTS if not case.endswith("bf16")]


WAYS = [(case, "--attention", name) for case in EXACT for name in ("portable", "dense")]
WAYS.append(("regional_intervals_2_3", "--offload", "blocks"))


@pytest.mark.parametrize("case, flags", [(case, flags) for case, *flags in WAYS], ids=[" ".join(x) for x in WAYS])
def test_latents_are_those_of_the_published_pipeline(golden, case, flags, tmp_path):
    latents, image = run(golden, case, tmp_path, *flags)
    assert latents.shape == LATENTS[case].shape
    assert (latents - LATENTS[case]).abs().max() < 1e-4
    if (GOLDEN / case / "image.png").exists():
        theirs = np.asarray(Image.open(GOLDEN / case / "image.png").convert("RGB")).astype(int)
        assert np.abs(image - theirs).max() <= 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_latents_are_those_of_the_published_pipeline(golden, tmp_path):
    """By Inductor; the first run compiles for both kinds of sequence."""
    torch._dynamo.reset()
    latents, _ = run(golden, "regional_1box_bg", tmp_path, "--compile")
    assert (latents - LATENTS["regional_1box_bg"]).abs().max() < 1e-4


def test_both_checkpoint_layouts_give_the_same_image(golden, tmp_path):
    case, model = "regional_3boxes_full", golden / "models" / "flux-tiny-dev"
    latents, _ = run(golden, case, tmp_path, "--flux", model / "transformer", "--ae", model / "vae")
    assert (latents - LATENTS[case]).abs().max() < 1e-4


def test_bfloat16_is_closer_to_the_exact_result_than_the_published_bfloat16(golden, tmp_path):
    """The published pipelines round guidance 3500 to 3504 and the time step likewise; here both are exact."""
    exact = LATENTS["plain_dev_128"]
    ours, _ = run(golden, "plain_dev_128_bf16", tmp_path)
    published = LATENTS["plain_dev_128_bf16"]
    assert (ours - exact).square().mean() < 0.5 * (published - exact).square().mean()
    assert (ours - published).square().mean().sqrt() < 0.06 * published.std()
