"""Images in: parity with diffusers' img2img, inpainting, Fill, control and true guidance, and what is ours alone.

Both sides get the same noise, and latents without noise: our autoencoder's mean, their `latent_dist.mode()`. Two
deviations are on purpose, and these cases are such that both agree:
- What is not repainted is kept by its velocity, the straight line from the noise to the image, not by replacing the
  latents after each step, so that every sampler works. After each step of Euler's method both are the same point.
- A latent is repainted if any of its 8 x 8 pixels is, where diffusers asks one of them; here masks end at multiples
  of 8 pixels.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate
from sampler.flow import noise, unpack

TOLERANCE = 1e-4
PROMPT = "Three high performance sports cars, red, blue and yellow, are racing side by side."
WORSE = "A city street in the rain."
CHANNELS = {"fill": 384, "canny": 128}


def make_checkpoint():
    spec = importlib.util.spec_from_file_location("make_checkpoint", GOLDEN / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(golden, tmp_path_factory) -> dict[str, Path]:
    """Small random checkpoints: dev, and with more input channels fill and canny."""
    making = make_checkpoint()
    config = making.PRESETS["tiny"]
    dev = golden / "models" / "flux-tiny-dev"
    found = {"dev": dev}
    for name, channels in CHANNELS.items():
        folder = found[name] = tmp_path_factory.mktemp(name)
        for part in dev.iterdir():
            if part.name not in ("transformer", "flux1-dev.safetensors", "model_index.json"):
                (folder / part.name).symlink_to(part)
        state = making.flux_bfl(config, f"images/{name}")
        hidden = config["heads"] * config["head_dim"]
        state["img_in.weight"] = making.rand(f"images/{name}/more", (hidden, channels), channels**-0.5)
        save_file(state, folder / f"flux1-{name}-dev.safetensors")
    return found


@pytest.fixture(scope="module")
def their_parts(models):
    """name -> the components of diffusers' pipelines, from the same files."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    making = make_checkpoint()
    config = making.PRESETS["tiny"]
    dev = models["dev"]
    shared = {
        "text_encoder": transformers.CLIPTextModel.from_pretrained(dev / "text_encoder"),
        "text_encoder_2": transformers.T5EncoderModel.from_pretrained(dev / "text_encoder_2"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(dev / "tokenizer", model_max_length=77),
        "tokenizer_2": transformers.T5TokenizerFast.from_pretrained(dev / "tokenizer_2"),
        "vae": diffusers.AutoencoderKL.from_pretrained(dev / "vae"),
    }

    def parts(name: str) -> dict:
        file = next(models[name].glob("flux1*.safetensors"))
        sizes = making.flux_config(dict(config, in_channels=CHANNELS.get(name, 64)), True, out_channels=64)
        flux = diffusers.FluxTransformer2DModel(**{k: v for k, v in sizes.items() if k[0] != "_"})
        flux.load_state_dict(making.flux_to_diffusers(load_file(file), config))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(dev / "scheduler")
        return {**shared, "transformer": flux.eval(), "scheduler": scheduler}

    made = {}
    return lambda name: made.setdefault(name, parts(name))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft colors with some noise in them."""
    x = np.linspace(0, 1, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    values = 128 + 90 * np.sin(9 * (x + y * y) + np.arange(3) + seed)
    values = values + np.random.default_rng(seed).normal(0, 12, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def box_mask(width: int, height: int, box) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@pytest.fixture
def ours(tmp_path, models):
    """ours(name, **layout): the latents of a run of generate.py, in float32."""

    def latents(name: str, *flags: str, **keys) -> Tensor:
        keys = {"prompt": PROMPT, "steps": 4, "seed": 5} | keys
        (tmp_path / "layout.yaml").write_text(yaml.safe_dump(keys))
        saved = tmp_path / "latents.safetensors"
        args = ["--model", models[name], "--layout", tmp_path / "layout.yaml", "--device", "cpu", "--overwrite"]
        args += ["--output", tmp_path / "out.png", "--save-latents", saved, *flags]
        assert generate.main([*map(str, args)]) == 0
        return load_file(saved)["latents"]

    return latents


@pytest.fixture
def theirs(monkeypatch, their_parts):
    """theirs(pipeline, name, width, height, ...): the latents of diffusers' pipeline of this name."""

    def latents(kind: str, name: str, width: int, height: int, seed: int = 5, **more) -> Tensor:
        import diffusers

        pipeline_type = getattr(diffusers, kind)
        module = importlib.import_module(pipeline_type.__module__)
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise(width, height, seed))
        distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
        monkeypatch.setattr(distribution, "sample", lambda self, generator=None: self.mode())
        encode = diffusers.AutoencoderKL.encode  # of channels-last images, group norms on a CPU lose digits
        monkeypatch.setattr(diffusers.AutoencoderKL, "encode", lambda self, x: encode(self, x.contiguous()))
        pipeline = pipeline_type(**their_parts(name))
        pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": 4, "guidance_scale": 3.5} | more
        size = {"width": width, "height": height, "output_type": "latent"}
        packed = pipeline(PROMPT, **size, **given).images
        return unpack(packed, width, height)

    return latents


def compare(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max())
    print(f"difference {difference:.1e} of {float(expected.abs().max()):.1f}")
    assert difference < TOLERANCE


@pytest.mark.parametrize(
    "size, steps, denoise", [((128, 128), 4, 0.6), ((160, 96), 5, 0.5), ((96, 144), 7, 0.95), ((64, 64), 3, 0.1)]
)
def test_starting_from_an_image_is_diffusers_img2img(ours, theirs, tmp_path, size, steps, denoise):
    image = picture(*size)
    image.save(tmp_path / "in.png")
    found = ours("dev", steps=steps, image={"file": "in.png", "denoise": denoise})
    expected = theirs("FluxImg2ImgPipeline", "dev", *size, image=image, strength=denoise, num_inference_steps=steps)
    compare(found, expected)


CASES = [
    ((128, 128), (32, 32, 96, 80), 4, 1.0),
    ((160, 96), (8, 0, 72, 96), 5, 0.7),
    ((96, 144), (24, 56, 40, 136), 6, 0.5),
]


@pytest.mark.parametrize("size, box, steps, denoise", CASES)
def test_repainting_is_diffusers_inpainting(ours, theirs, tmp_path, size, box, steps, denoise):
    image = picture(*size)
    image.save(tmp_path / "in.png")
    box_mask(*size, box).save(tmp_path / "mask.png")
    start = {"file": "in.png", "denoise": denoise}
    found = ours("dev", steps=steps, image=start | {"repaint": {"mask": "mask.png"}})
    assert torch.equal(found, ours("dev", steps=steps, image=start | {"repaint": {"box": [*box]}}))
    more = {"image": image, "mask_image": box_mask(*size, box), "strength": denoise, "num_inference_steps": steps}
    compare(found, theirs("FluxInpaintPipeline", "dev", *size, **more))


@pytest.mark.parametrize("size, box, steps, denoise", CASES)
def test_fill_is_diffusers_fill(ours, theirs, tmp_path, size, box, steps, denoise):
    """The mask need not end at a multiple of 8: Fill sees every pixel of it."""
    x0, y0, x1, y1 = box
    box = (x0 + 3, y0, x1, y1 - 1)
    image = picture(*size)
    image.save(tmp_path / "in.png")
    start = {"file": "in.png", "denoise": denoise, "repaint": {"box": [*box]}}
    found = ours("fill", steps=steps, guidance=30.0, image=start)
    more = {"image": image, "mask_image": box_mask(*size, box), "strength": denoise}
    more |= {"num_inference_steps": steps, "guidance_scale": 30.0}
    compare(found, theirs("FluxFillPipeline", "fill", *size, **more))


@pytest.mark.parametrize("size, steps, guidance", [((128, 128), 4, 10.0), ((160, 96), 3, 30.0), ((96, 144), 6, 3.5)])
def test_canny_and_depth_are_diffusers_control(ours, theirs, tmp_path, size, steps, guidance):
    image = picture(*size)
    image.save(tmp_path / "edges.png")
    keys = {"width": size[0], "height": size[1], "steps": steps, "guidance": guidance}
    found = ours("canny", **keys, control_image="edges.png")
    more = {"control_image": image, "num_inference_steps": steps, "guidance_scale": guidance}
    compare(found, theirs("FluxControlPipeline", "canny", *size, **more))


@pytest.mark.parametrize(
    "size, steps, scale, worse", [((128, 128), 4, 2.0, WORSE), ((160, 96), 3, 4.5, ""), ((96, 144), 6, 1.5, WORSE)]
)
def test_negative_prompts_are_diffusers_true_guidance(ours, theirs, size, steps, scale, worse):
    keys = {"width": size[0], "height": size[1], "steps": steps, "negative_prompt": worse, "true_cfg_scale": scale}
    more = {"num_inference_steps": steps, "negative_prompt": worse, "true_cfg_scale": scale}
    expected = theirs("FluxPipeline", "dev", *size, **more)
    compare(ours("dev", **keys), expected)
    compare(ours("dev", **keys, cfg_batch=True), expected)


def test_all_of_it_at_once_is_diffusers(ours, theirs, tmp_path):
    """Repainting with a negative prompt."""
    size = (128, 96)
    box = (40, 16, 128, 80)
    image = picture(*size)
    image.save(tmp_path / "in.png")
    guided = {"negative_prompt": WORSE, "true_cfg_scale": 3.0}
    found = ours("dev", image={"file": "in.png", "denoise": 0.75, "repaint": {"box": [*box]}}, **guided)
    more = {"image": image, "mask_image": box_mask(*size, box), "strength": 0.75}
    compare(found, theirs("FluxInpaintPipeline", "dev", *size, **more, **guided))
