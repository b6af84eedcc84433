"""What the keys of images and negative prompts mean beyond diffusers: regions inside of what is repainted, pixels that
are kept, steps, samplers, guidance by region, and every way to run. test_images.py has the parity with diffusers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import save_file
from test_images import PROMPT, WORSE, models, picture  # noqa: F401, models is a fixture
from tiny import maps_of
from torch import Tensor

from extensions.repaint import repainted
from model.transformer import Flux
from pipeline import Pipeline
from regional.layout import FLUX_DEV, Control, Layout, Region, RegionLora, Repaint, Start

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 96, 64
BORDER = WIDTH // 16  # latent columns of the left half
LEFT = Region(prompt="A red sports car on the coast road.", box=(0, 0, 48, 64))
RIGHT = Region(prompt="A blue racing car.", box=(48, 0, 96, 64))
GUIDED = {"negative_prompt": WORSE, "true_cfg_scale": 3.0}


@pytest.fixture(scope="module")
def made(models) -> dict[str, Pipeline]:  # noqa: F811
    return {name: Pipeline(str(models[name]), device="cpu") for name in models}


@pytest.fixture
def file(tmp_path) -> str:
    picture(WIDTH, HEIGHT).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def layout(*regions: Region, **keys) -> Layout:
    size = {"width": WIDTH, "height": HEIGHT, "max_sequence_length": 32}
    given = {"steps": 4, "mask_inject_steps": 2, "base_ratio": 0.3, **size} | keys
    return Layout(prompt=PROMPT, regions=regions, **given)


def latents(pipeline: Pipeline, given: Layout, *extensions) -> Tensor:
    return pipeline.denoise(pipeline.prepare(given), 1, extensions)


def encoded(pipeline: Pipeline, file: str) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].contiguous()
    with torch.inference_mode():
        return pipeline.parts.get("ae").encode(pixels.float() / 127.5 - 1)


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


# ------------------------------------------------------------------------------- without the keys


def test_without_the_keys_nothing_of_them_is_imported(golden, tmp_path):
    """So a layout without them keeps its bits; test_golden.py has these."""
    args = ["--model", golden / "models" / "flux-tiny-dev", "--layout", golden / "regional_1box_bg" / "layout.yaml"]
    args = [*map(str, args), "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    code = f"import sys, generate; assert generate.main({args}) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "regional.sampling" in done.stdout.split() and "extensions." not in done.stdout


def test_at_denoise_1_an_image_changes_no_bit(made, file):
    plain = latents(made["dev"], layout(LEFT, RIGHT))
    assert torch.equal(latents(made["dev"], layout(LEFT, RIGHT, image=Start(file=file, denoise=1.0))), plain)
    assert not torch.equal(latents(made["dev"], layout(LEFT, RIGHT, image=Start(file=file, denoise=0.7))), plain)


@pytest.mark.parametrize("regions", [(), (LEFT, RIGHT)], ids=["plain", "regional"])
def test_repainting_everything_is_starting_from_the_image_to_the_bit(made, file, regions):
    start = Start(file=file, denoise=0.7)
    everything = Repaint(box=(0, 0, "100%", "100%"))
    found = [latents(made["dev"], layout(*regions, image=x)) for x in (start, replace(start, repaint=everything))]
    assert torch.equal(*found)


# ------------------------------------------------------------------------------- what is kept

AREAS = {
    "box": (Repaint(box=(16, 8, 56, 40)), (slice(1, 5), slice(2, 7))),
    "unaligned": (Repaint(box=(18, 9, 50, 39)), (slice(1, 5), slice(2, 7))),  # every latent of which a pixel is
    "regions": (Repaint(regions=(1,)), (slice(0, 8), slice(6, 12))),
}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("area", AREAS)
def test_outside_of_what_is_repainted_the_latents_are_the_images(made, file, area, sampler):
    given, (rows, columns) = AREAS[area]
    start = Start(file=file, denoise=0.8, repaint=given)
    found = latents(made["dev"], layout(LEFT, RIGHT, image=start, steps=5, sampler=sampler))
    image = encoded(made["dev"], file)
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[rows, columns] = True
    changed = (found - image).abs().amax(dim=(0, 1))
    assert changed[~inside].max() < 1e-5 and changed[inside].min() > 1e-2


def test_regions_inside_of_what_is_repainted_have_their_own_prompts(made, file):
    """Every region's prompt acts, in its own half."""
    upper, lower = (replace(LEFT, box=(16, *rows)) for rows in ((0, 80, 32), (32, 80, 64)))
    start = Start(file=file, repaint=Repaint(box=(16, 0, 80, 64)))
    alone = {"base_ratio": 0.0, "mask_inject_steps": "100%", "image": start}
    first = latents(made["dev"], layout(upper, lower, **alone))
    other = latents(made["dev"], layout(upper, replace(lower, prompt="A house."), **alone))
    assert torch.equal(first[:, :, :4], other[:, :, :4])
    assert apart(first[:, :, 4:, 2:10], other[:, :, 4:, 2:10]) > 0.1
    assert apart(first[..., :2], other[..., :2]) == 0 < apart(first, encoded(made["dev"], file))


SIZES = [(96, 64), (101, 67), (33, 250), (200, 130)]


KEPT = [("png", size, feather) for size in SIZES for feather in (0, 7, 20)]


@pytest.mark.parametrize("form, size, feather", [*KEPT, ("webp", SIZES[1], 7)], ids=str)
def test_pixels_outside_are_the_inputs_byte_for_byte(made, tmp_path, size, form, feather):
    """At sizes that are no multiples of 16, too: the result has the image's, and what is drawn is resized to it."""
    width, height = size
    picture(width, height).save(tmp_path / f"in.{form}", lossless=True)
    image = Start(file=str(tmp_path / f"in.{form}"), repaint=Repaint(box=("25%", "25%", "75%", "60%"), feather=feather))
    given = Layout(prompt=PROMPT, steps=1, image=image)
    prepared = made["dev"].prepare(given)
    noise = torch.randn(1, 16, prepared.layout.height // 8, prepared.layout.width // 8)
    out = made["dev"].decode(noise, prepared.layout)
    assert out.size == size and out.mode == "RGB"
    before, after = (np.asarray(x).astype(int) for x in (Image.open(image.file), out))
    changed = np.abs(before - after).max(axis=2)
    rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
    x0, y0, x1, y1 = 0.25 * width, 0.25 * height, 0.75 * width, 0.6 * height
    more = feather * max(width / prepared.layout.width, height / prepared.layout.height) + 1.5
    more = feather if size == (WIDTH, HEIGHT) else more  # resizing mixes neighbors
    assert x0 - more <= columns.min() and columns.max() <= x1 + more
    assert y0 - more <= rows.min() and rows.max() <= y1 + more
    assert changed[int(y0) + 2 : int(y1) - 2, int(x0) + 2 : int(x1) - 2].astype(bool).mean() > 0.9


@pytest.mark.parametrize("feather", [0, 1, 2, 3, 8, 15.9])
def test_what_is_repainted_is_1_inside_and_falls_to_0_over_its_feather(feather):
    keys = {"width": 64, "height": 32}
    area = Repaint(box=(20, 10, 40, 20), feather=feather)
    found = repainted(Layout(prompt="x", **keys, image=Start(file="x", repaint=area)))
    assert found.shape == (32, 64) and (found[10:20, 20:40] == 1).all()
    row = found[15, 39:]
    assert (np.diff(row) <= 0).all() and not row[int(feather) + 1 :].any() and row[int(feather / 2) * 2] > 0
    assert np.array_equal(found[:, ::-1][:, 4:], found[:, :-4])  # the same at both sides


# ------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("denoise, inject, run, regional", [(0.5, "50%", 4, 2), (0.5, 3, 4, 3), (0.3, 5, 3, 3)])
def test_regional_steps_are_counted_among_the_steps_that_are_run(made, file, denoise, inject, run, regional):
    start = Start(file=file, denoise=denoise)
    given = layout(LEFT, RIGHT, steps=8, mask_inject_steps=inject, image=start)
    seen = []

    def count(forward, branches):
        return lambda given, step: (seen.append((step, branches.base_ratio is not None)), forward(given, step))[1]

    latents(made["dev"], given, count)
    assert seen == [(step, step < regional) for step in range(run)]


@pytest.mark.parametrize(
    "steps, denoise, run", [(10, 1.0, 10), (10, 0.6, 6), (10, None, 6), (7, 0.5, 4), (4, 1e-17, 1), (1, 0.01, 1)]
)
def test_the_steps_that_are_run_by_diffusers_formula_but_at_least_one(steps, denoise, run):
    given = layout(steps=steps, image=Start(file="x", denoise=denoise)).filled(FLUX_DEV)
    assert given.run_steps() == run
    repaints = Repaint(regions=(0,))
    assert replace(given, image=Start(file="x", repaint=repaints)).run_steps() == steps


# ------------------------------------------------------------------------------- true guidance


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """The batch of each call of the transformer."""
    seen = []
    forward = Flux.forward
    monkeypatch.setattr(Flux, "forward", lambda self, img, *x: seen.append(len(img)) or forward(self, img, *x))
    return seen


def random_lora(folder: Path) -> str:
    """Of a region, of a block's modulation too."""
    hidden = 128
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, rows in ("double_blocks.0.img_attn.qkv", 3 * hidden), ("single_blocks.1.modulation.lin", 3 * hidden):
        state[f"diffusion_model.{name}.lora_A.weight"] = 0.1 * torch.randn(4, hidden, generator=generator)
        state[f"diffusion_model.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    save_file(state, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


WAYS = ["plain", "regional", "rpg", "no base branch", "controlnet", "lora", "canny", "fill", "repaint", "heun"]


@pytest.mark.parametrize("way", WAYS)
def test_in_a_batch_true_guidance_is_the_same_in_half_the_passes(made, golden, tmp_path, file, forwards, way):
    keys = {"regions": (replace(LEFT, negative_prompt="A house."), RIGHT), **GUIDED}
    keys |= {
        "plain": {"regions": ()},
        "rpg": {"method": "rpg"},
        "no base branch": {"base_ratio": 0.0},
        "controlnet": {"controlnets": (Control(model=str(golden / "models" / "controlnet"), image=file),)},
        "canny": {"control_image": file},
        "fill": {"image": Start(file=file, repaint=Repaint(box=(16, 0, 80, 48)))},
        "repaint": {"image": Start(file=file, denoise=0.8, repaint=Repaint(box=(16, 0, 80, 48)))},
        "heun": {"sampler": "heun"},
    }.get(way, {})
    if way == "lora":
        own = RegionLora(file=random_lora(tmp_path), plain_steps=True)
        keys["regions"] = (replace(LEFT, loras=(own,)), RIGHT)
    pipeline = made[way if way in made else "dev"]
    regions = keys.pop("regions")
    without = latents(pipeline, layout(*regions, **keys | {"true_cfg_scale": 1.0}))
    count = len(forwards)
    found = latents(pipeline, layout(*regions, **keys))
    assert forwards == [1] * 3 * count
    together = latents(pipeline, layout(*regions, **keys, cfg_batch=True))
    assert forwards[3 * count :] == [2] * count
    assert apart(found, together) < 1e-4 < 0.1 < apart(found, without)


def test_a_prompts_own_velocity_is_left_where_the_negative_prompt_is_the_same(made):
    """Then guidance changes nothing, whatever its scale: the negative regions are the regions'."""
    regions = (replace(LEFT, negative_prompt=LEFT.prompt), replace(RIGHT, negative_prompt=RIGHT.prompt))
    keys = {"base_ratio": 0.3, "mask_inject_steps": 4}
    for method in "regional", "rpg":
        plain = latents(made["dev"], layout(LEFT, RIGHT, method=method, **keys))
        keys_of = {"negative_prompt": PROMPT, "true_cfg_scale": 5.0, "method": method}
        assert apart(plain, latents(made["dev"], layout(*regions, **keys, **keys_of))) < 1e-4


@pytest.mark.parametrize("method", ["regional", "rpg"])
def test_a_regions_negative_prompt_acts_in_its_region_alone_to_the_bit(made, method):
    keys = GUIDED | {"base_ratio": 0.0, "mask_inject_steps": "100%", "method": method}
    if method == "rpg":  # each pass sees the whole image, so only one step is apart
        keys["steps"] = 1
    first = latents(made["dev"], layout(LEFT, RIGHT, **keys))
    other = latents(made["dev"], layout(replace(LEFT, negative_prompt="A house."), RIGHT, **keys))
    assert torch.equal(first[..., BORDER:], other[..., BORDER:])
    assert apart(first[..., :BORDER], other[..., :BORDER]) > 0.1
    same = latents(made["dev"], layout(replace(LEFT, negative_prompt=WORSE), RIGHT, **keys))
    assert torch.equal(first, same)  # without its own it has the layout's


def test_the_background_has_the_layouts_negative_prompt(made):
    """As a region in its place has."""
    left = replace(LEFT, negative_prompt="A house.")
    keys = GUIDED | {"base_ratio": 0.0}
    rest = replace(RIGHT, prompt="a photo")
    assert apart(latents(made["dev"], layout(left, **keys)), latents(made["dev"], layout(left, rest, **keys))) < 1e-4


def test_a_controlnets_residuals_are_computed_once_for_both_prompts(made, golden, file, spy):
    from extensions.controlnet import ControlNet

    calls = spy(ControlNet, "forward")
    control = Control(model=str(golden / "models" / "controlnet"), image=file)
    for model, more in ("dev", {}), ("canny", {"control_image": file}):
        calls.clear()
        latents(made[model], layout(LEFT, RIGHT, controlnets=(control,), **GUIDED, **more))
        assert len(calls) == 4


@pytest.mark.parametrize("in_batch", [False, True])
def test_attention_maps_are_of_the_prompt_and_not_the_negative_one(made, in_batch):
    """In the first step, where the image is the same as without guidance."""
    found = []
    for keys in {}, GUIDED | {"cfg_batch": in_batch}:
        maps = maps_of(made["dev"])
        latents(made["dev"], layout(LEFT, RIGHT, **keys), maps.extend)
        found.append(maps.maps)
    assert found[0].shape == found[1].shape and apart(found[0][0], found[1][0]) < 1e-5
    assert apart(found[0][1], found[1][1]) > 1e-4


# ------------------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("how", [{"offload": "blocks"}, {"attention": "dense"}], ids=str)
def test_offloading_and_other_attention_give_the_same(models, made, file, how):  # noqa: F811
    start = Start(file=file, denoise=0.8, repaint=Repaint(box=(16, 0, 80, 48)))
    for more in {}, {"cfg_batch": True}:
        given = layout(LEFT, RIGHT, image=start, **GUIDED, **more)
        other = Pipeline(str(models["dev"]), device="cpu", **how)
        assert apart(latents(other, given), latents(made["dev"], given)) < (1e-4 if "attention" in how else 1e-30)


def test_with_fp8_weights_it_runs_near_the_exact_result(models, made, file):  # noqa: F811
    start = Start(file=file, denoise=0.8, repaint=Repaint(box=(16, 0, 80, 48)))
    for name, more in ("dev", GUIDED), ("fill", {}):
        given = layout(LEFT, RIGHT, image=start, steps=2, mask_inject_steps=1, **more)
        found = latents(Pipeline(str(models[name]), device="cpu", quantize="fp8"), given)
        exact = latents(made[name], given)
        assert 1e-3 < (found - exact).norm() / exact.norm() < 0.5
        assert apart(encoded(made["dev"], file)[..., :2], found[..., :2]) < 1e-5 or name != "dev"


def test_the_kernel_gives_the_same_in_a_batch(models, made):  # noqa: F811
    pytest.importorskip("triton", reason="the kernel is Triton's")
    small = {"width": 32, "height": 16, "steps": 1, "mask_inject_steps": 1, "max_sequence_length": 4}
    regions = (replace(LEFT, box=(0, 0, 16, 16)), replace(RIGHT, box=(16, 0, 32, 16)))
    given = layout(*regions, **small, double_blocks=(0,), single_blocks=(), cfg_batch=True, **GUIDED)
    kernel = Pipeline(str(models["dev"]), device="cpu", attention="kernel")
    assert apart(latents(kernel, given), latents(made["dev"], given)) < 1e-4


def test_what_is_counted_on_in_memory_is_twice_as_much_in_a_batch():
    from runtime.memory import working_bytes

    resolved = [layout(LEFT, **GUIDED, cfg_batch=x).resolved(FLUX_DEV) for x in (False, True)]
    one, two = (working_bytes(3072, x, torch.bfloat16, False) for x in resolved)
    assert two == 2 * one
