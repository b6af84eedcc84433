"""--compile: one set of graphs for all blocks and layouts, and the same images within rounding."""

import json
import shutil
from functools import partial

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import generate
import pipeline
from formats.recognize import POCKET
from model.transformer import Flux
from regional.attention import RegionalAttention, portable_attention
from regional.layout import Layout, Region, RegionLora
from regional.mask import region_tokens
from runtime.offload import Streamed
from sampler.flow import image_ids, text_ids

TEXT = 6


@pytest.fixture
def without_inductor(monkeypatch):
    """Dynamo and its guards as they are, but nothing that needs a C++ compiler behind them."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def velocity(flux: Flux, side: int, regions: int) -> torch.Tensor:
    """A step of an image of side x side tokens, in columns of regions. (4 x 4 are half a head's
    numbers, and torch.compile takes equal sizes of the first call for the same one.)"""
    torch.manual_seed(0)
    length, hooks, pixels = TEXT, {}, 16 * side
    if regions:
        edges = [pixels * i // regions for i in range(regions + 1)]
        columns = tuple(Region(prompt="", box=(x0, 0, x1, pixels)) for x0, x1 in zip(edges, edges[1:]))
        bits = region_tokens(Layout(prompt="", width=pixels, height=pixels, regions=columns)).bits(TEXT)
        attention = RegionalAttention(portable_attention, bits, TEXT, side * side, 0.3)
        length, hooks = TEXT * (regions + 1), {"attention": attention, "join": attention.join}
    img, txt, y, one = torch.randn(1, side * side, 64), torch.randn(1, length, 32), torch.randn(1, 48), torch.ones(1)
    return tiny.velocity(flux, img, image_ids(pixels, pixels), txt, text_ids(length), one, y, one, **hooks)


def eager_and_compiled(streamed: tuple[int, ...] = ()) -> tuple[Flux, Flux]:
    torch.manual_seed(0)
    eager, compiled = (Flux(tiny.FLUX).requires_grad_(False) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    blocks = [*compiled.double_blocks, *compiled.single_blocks]
    if streamed:
        Streamed([blocks[i] for i in streamed], torch.device("cpu"), pin=True)
    compiled.compile_blocks()
    return eager, compiled


@torch.inference_mode()
@pytest.mark.parametrize("streamed", [(), (0, 2, 4)])
def test_new_layouts_and_sizes_compile_nothing_new(without_inductor, streamed):
    """Streamed blocks neither: their weights lie elsewhere in each of their turns, those of others never do."""
    eager, compiled = eager_and_compiled(streamed)
    for side, regions in (5, 0), (5, 2):
        torch.testing.assert_close(velocity(compiled, side, regions), velocity(eager, side, regions))
    graphs = counters["stats"]["unique_graphs"]
    # two halves of two kinds of blocks; and as its rows lie elsewhere in memory, the last one's second half once more
    assert 4 <= graphs <= 6
    for side, regions in (5, 3), (7, 0), (6, 2):
        torch.testing.assert_close(velocity(compiled, side, regions), velocity(eager, side, regions))
    assert counters["stats"]["unique_graphs"] == graphs and counters["frames"]["ok"] == graphs
    assert not counters["graph_break"]


@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_run_in_slices_are_forward_to_the_bit(without_inductor, compiled):
    flux = eager_and_compiled()[compiled]
    modulation = flux.modulation(torch.ones(1), torch.randn(1, 48), torch.ones(1))
    inputs = torch.randn(1, 25, 64), image_ids(80, 80), torch.randn(1, TEXT, 32), text_ids(TEXT)
    whole = flux(*inputs, modulation)
    for at in (0, 1, 2, 4, 5):  # of 2 double and 3 single blocks
        hidden = flux.blocks(flux.embed(*inputs), modulation, last=at)
        assert torch.equal(flux.decode(flux.blocks(hidden, modulation, first=at), modulation), whole)
    assert bool(counters["frames"]["ok"]) == compiled


def generated(folder, *flags):
    """The latents of a run, or of what an image records."""
    out = ["--output", folder / "a.png", "--overwrite", "--save-latents", folder / "a.safetensors"]
    assert generate.main([str(arg) for arg in ("--device", "cpu", *out, *flags)]) == 0
    return load_file(folder / "a.safetensors")["latents"]


def test_a_compiled_image_says_so_and_is_made_again_so(golden, tmp_path, without_inductor):
    model, layout = golden / "models" / "flux-tiny-dev", golden / "regional_3boxes_full" / "layout.yaml"
    flags = "--model", model, "--layout", layout, "--steps", 2
    eager = generated(tmp_path, *flags)
    assert not counters["frames"]["ok"]
    compiled = generated(tmp_path, *flags, "--compile", "--metadata")
    assert counters["frames"]["ok"] >= 4 and (compiled - eager).abs().max() < 1e-4
    assert json.loads((tmp_path / "a.json").read_text())["compile"] is True
    (tmp_path / "a.png").rename(tmp_path / "compiled.png")
    for flags, frames in ((), range(4, 9)), (("--no-compile",), [0]):
        torch._dynamo.reset()
        counters.clear()
        again = generated(tmp_path, "--config-from-metadata", tmp_path / "compiled.png", "--trust-metadata", *flags)
        assert torch.equal(again, compiled) and counters["frames"]["ok"] in frames


def test_regions_with_loras_run_uncompiled(without_inductor, capsys):
    """Their hooks would be compiled anew for every block; it is said."""
    lora = {"file": str(POCKET.parent / "adapters" / "barred.safetensors")}
    own = RegionLora(**lora)
    regions = (Region(prompt="a red circle", box=(0, 0, 64, 128), loras=(own,)),)
    layout = Layout(prompt="a red circle", width=128, height=128, steps=2, mask_inject_steps=1, regions=regions)
    found = []
    for compile in False, True:
        drawing = pipeline.Pipeline("pocket", device="cpu", compile=compile)
        found.append(drawing.denoise(drawing.prepare(layout), 1))
    assert torch.equal(*found) and "this layout's blocks run uncompiled" in capsys.readouterr().err
    assert not counters["frames"]["ok"]


def test_without_a_compiler_it_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert generate.main(["--prompt", "x", "--compile", "--output", str(tmp_path / "a.png")]) == 2
    assert "--compile: torch.compile needs a C++ compiler" in capsys.readouterr().err
