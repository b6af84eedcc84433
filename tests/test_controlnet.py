"""ControlNets: against diffusers' in float64, in both families' files, in regional steps, and every mistake's sentence.

Whole runs against the published pipelines are in test_golden.py.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import test_parity
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_parity import largest_difference, random, randomised

import generate
import weights
from errors import InputError
from extensions import loading
from extensions.control import LoadedControl, canny, control_image, controlnets, scale_of
from extensions.controlnet import ControlNet, ControlNetParams, Residuals
from model.attention import Block, plain_attention
from model.transformer import Flux, FluxParams, as_it_is, text_then_image
from pipeline import Conditioning, sample
from regional.attention import RegionalAttention, dense_attention, portable_attention
from regional.layout import Control, Layout, Region
from regional.mask import region_tokens
from regional.reader import read_layout
from regional.sampling import Branches, Pass
from sampler.flow import image_ids, noise, pack, sigmas, text_ids, unpack

diffusers = test_parity.diffusers  # the fixture
F64 = torch.float64
SIZES = {"vec_in_dim": 48, "context_in_dim": 32, "hidden_size": 64, "mlp_hidden": 256, "num_heads": 2}
BASE = FluxParams(**SIZES, depth=5, depth_single_blocks=7)
SETTING = Control(model="m", image="i")
THEIRS = {
    "in_channels": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 48,
    "axes_dims_rope": (4, 14, 14),
}


def net(double: int = 2, single: int = 0, seed: int = 5, **more: int) -> ControlNet:
    params = ControlNetParams(**SIZES, depth=double, depth_single_blocks=single, **more)
    return randomised(ControlNet(params), seed)


def inputs(rows: int = 3, columns: int = 5, words: int = 7) -> dict[str, torch.Tensor]:
    return {
        "img": random(1, rows * columns, 64),
        "img_ids": image_ids(16 * columns, 16 * rows),
        "txt": random(1, words, 32, seed=2),
        "txt_ids": text_ids(words),
        "timesteps": torch.tensor([0.317], dtype=F64),
        "y": random(1, 48, seed=3),
        "guidance": torch.tensor([3.5], dtype=F64),
    }


def after_block_of(controls, given, step=0, steps=1, streams=1):
    """What the ControlNets do after the blocks of a pass, a function (x, block) -> x."""
    seen = []
    order = torch.arange(15)
    bits = torch.zeros(15, dtype=torch.long)
    conditioning = Conditioning(given["txt"], None, given["y"])
    extension = controlnets(controls, BASE, steps, conditioning)
    forward = extension(lambda given, step: seen.append(given), Branches(bits, order, 7, streams=streams))
    tokens = given["img"], given["img_ids"], given["txt"], given["txt_ids"]
    seam = plain_attention, text_then_image, as_it_is
    forward(Pass(*tokens, [], *seam, given["timesteps"], given["y"], given["guidance"]), step)
    return seen[0].after_block


def residuals_of(net: ControlNet, timesteps, y, guidance, **more) -> Residuals:
    return net(modulation=net.modulation(timesteps, y, guidance), **more)


def at_full(control: ControlNet, tokens: torch.Tensor, scale: float = 1.0, **setting) -> LoadedControl:
    scales = torch.full((tokens.shape[1], 1), scale, dtype=F64)
    return LoadedControl(control, tokens, scales, Control(model="m", image="i", **setting))


def refuse(match, call, *args):
    with pytest.raises(InputError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# -------------------------------------------------------------------------------------------------------- diffusers'


FAMILIES = {  # double and single blocks, modes, the hint's channels, guidance
    "union": (3, 4, 6, None, True),
    "spread": (2, 3, None, None, True),
    "double_only": (3, 0, None, None, True),
    "without_guidance": (1, 1, None, None, False),
    "xlabs": (2, 0, None, 16, True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_from_diffusers_give_its_residuals_and_its_velocity(diffusers, tmp_path, family):
    double, single, modes, hint, guided = FAMILIES[family]
    theirs = randomised(
        diffusers.FluxControlNetModel(
            **THEIRS,
            num_layers=double,
            num_single_layers=single,
            guidance_embeds=guided,
            num_mode=modes,
            conditioning_embedding_channels=hint,
            patch_size=2 if hint else 1,
        )
    )
    their_flux = randomised(
        diffusers.FluxTransformer2DModel(**THEIRS, num_layers=5, num_single_layers=7, guidance_embeds=True), seed=7
    )
    tiny.save(tmp_path / "control" / "model.safetensors", theirs.state_dict())
    tiny.save(tmp_path / "flux.safetensors", their_flux.state_dict())
    source = loading.find_controlnet(str(tmp_path / "control"))
    ours = weights.load_controlnet(source, "cpu", F64)
    flux = weights.load_flux(weights.pick("flux", "--flux", tmp_path / "flux.safetensors"), "cpu", F64)
    assert (ours.params.modes, ours.params.hint_width) == (modes or 0, hint or 0)
    assert ours.params.guidance_embed is guided

    x, mode = inputs(), 4 if modes else None
    control = random(1, 3, 48, 80, seed=4) if hint else random(1, 15, 64, seed=4)
    tokens = ours.read(control) if hint else control
    ids = {"img_ids": x["img_ids"][0].double(), "txt_ids": x["txt_ids"][0].double()}
    shared = {"timestep": x["timesteps"], "encoder_hidden_states": x["txt"], "pooled_projections": x["y"], **ids}
    wanted_double, wanted_single = theirs(
        hidden_states=x["img"],
        controlnet_cond=control,
        controlnet_mode=torch.tensor([[mode]]) if modes else None,
        conditioning_scale=0.7,
        guidance=x["guidance"] if guided else None,
        return_dict=False,
        **shared,
    )
    got = residuals_of(ours, **x, control=tokens, mode=mode).each(lambda residual: 0.7 * residual)
    assert (len(got.double), len(got.single)) == (double, single)
    for our, their in zip(got.double + got.single, [*wanted_double, *(wanted_single or [])]):
        assert largest_difference(our, their) < 1e-9

    wanted = their_flux(
        x["img"],
        guidance=x["guidance"],
        controlnet_block_samples=wanted_double,
        controlnet_single_block_samples=wanted_single,
        controlnet_blocks_repeat=hint is not None,
        return_dict=False,
        **shared,
    )[0]
    after_block = after_block_of([at_full(ours, tokens, 0.7, mode=mode)], x)
    assert largest_difference(tiny.velocity(flux, **x, after_block=after_block), wanted) < 1e-9
    assert (tiny.velocity(flux, **x) - wanted).abs().max() > 1e-3


def test_canny_is_opencvs():
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:50] = 200, 50, 250
    edges = canny(pixels)
    assert np.array_equal(edges[:, :, 0], cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200))
    assert set(np.unique(edges)) == {0, 255} and edges.shape == pixels.shape
    assert np.array_equal(edges[:, :, 0], edges[:, :, 2])


# ------------------------------------------------------------------------------------------------------------- files


XLABS = ControlNetParams(
    vec_in_dim=48, context_in_dim=32, hidden_size=64, mlp_hidden=192, num_heads=2,
    depth=2, depth_single_blocks=0, hint_width=16,
)  # fmt: skip
UNION = ControlNetParams(
    vec_in_dim=48, context_in_dim=32, hidden_size=64, mlp_hidden=192, num_heads=2,
    depth=2, depth_single_blocks=3, modes=6,
)  # fmt: skip


def xlabs_names(state: tiny.State) -> tiny.State:
    return {key.replace("controlnet_x_embedder", "pos_embed_input"): tensor for key, tensor in state.items()}


def diffusers_names(state: tiny.State) -> tiny.State:
    own = {key: state[key] for key in state if key.startswith(("controlnet_", "input_hint_block"))}
    convs = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    for i, conv in enumerate(convs):
        own = {key.replace(f"hint_block.{2 * i}.", f"hint_block.{conv}."): tensor for key, tensor in own.items()}
    return own | tiny.flux_to_diffusers({key: state[key] for key in state if key not in own and "hint" not in key})


@pytest.mark.parametrize("params, names", [(XLABS, xlabs_names), (XLABS, diffusers_names), (UNION, diffusers_names)])
def test_every_spelling_is_read_without_a_config(tmp_path, params, names):
    state = tiny.state(ControlNet(params))
    path = tiny.save(tmp_path / "any-name.safetensors", names(state))
    for place in (path, tmp_path):
        source = loading.find_controlnet(str(place))
        assert weights.controlnet_params(source) == params
        found = weights.load_controlnet(source, "cpu", torch.float32).state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_a_repository_can_name_one_of_its_files(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, choices, purpose, instead):
        asked.append((repo, choices))
        return tmp_path

    monkeypatch.setattr(loading, "fetch", fetch)
    for name in ("canny", "depth"):
        tiny.save(tmp_path / f"{name}.safetensors", xlabs_names(tiny.state(ControlNet(XLABS))))
    assert loading.find_controlnet("org/name:depth.safetensors").path.name == "depth.safetensors"
    assert asked == [("org/name", [["depth.safetensors", "config.json"], ["depth.safetensors"]])]
    refuse("canny.safetensors and depth.safetensors could each be", loading.find_controlnet, "org/name")


def spoilt(change) -> tiny.State:
    state = diffusers_names(tiny.state(ControlNet(UNION)))
    change(state)
    return state


WRONG = {
    r"controlnet_single_blocks.1.weight is missing": lambda s: s.pop("controlnet_single_blocks.1.weight"),
    r"x.safetensors: controlnet_blocks.1.bias has shape \(3,\)": lambda s: s.update(
        {"controlnet_blocks.1.bias": torch.zeros(3)}
    ),
    r"controlnet_blocks.2.bias, of shape \(64,\), is a key that does not belong": lambda s: s.update(
        {"controlnet_blocks.2.bias": torch.zeros(64)}
    ),
    r"x_embedder.weight has shape \(64, 68\), expected 64 columns; inpainting": lambda s: s.update(
        {"controlnet_x_embedder.weight": torch.zeros(64, 68)}
    ),
    r"is a Mistoline ControlNet, which is not supported": lambda s: s.update(
        {"controlnet_blocks.0.linear.weight": torch.zeros(4, 4)}
    ),
    r"is a LoRA; those belong to --lora": lambda s: s.update(
        {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 64)}
    ),
}


@pytest.mark.parametrize("match", WRONG)
def test_files_that_do_not_fit_are_refused(tmp_path, match):
    path = tiny.save(tmp_path / "x.safetensors", spoilt(WRONG[match]))
    refuse(match, loading.find_controlnet, str(path))


def test_other_parts_and_nothing_are_no_controlnet(tmp_path):
    path = tiny.save(tmp_path / "x.safetensors", tiny.flux_state())
    refuse("no FLUX.1 ControlNet in it: x.safetensors is a FLUX.1 transformer", loading.find_controlnet, str(path))
    refuse("--controlnet .*none: there is no such file", loading.find_controlnet, str(tmp_path / "none"))


@pytest.mark.parametrize("names", [xlabs_names, diffusers_names])
def test_a_controlnet_is_no_transformer(tmp_path, names):
    path = tiny.save(tmp_path / "x.safetensors", names(tiny.state(ControlNet(XLABS))))
    refuse("no FLUX.1 transformer in it: x.safetensors is a ControlNet", weights.pick, "flux", "--flux", path)


def test_a_controlnet_for_another_base_size_is_refused(tmp_path):
    other = FluxParams(**SIZES | {"vec_in_dim": 40}, depth=1, depth_single_blocks=1)
    control = tiny.save(tmp_path / "a" / "c.safetensors", diffusers_names(tiny.state(ControlNet(UNION))))
    flux = tiny.save(tmp_path / "b" / "f.safetensors", tiny.state(Flux(other)))
    sources = loading.find_controlnet(str(control)), weights.pick("flux", "--flux", flux)
    refuse(
        "c.safetensors: .*wrong base size: its vec_in_dim is 48, that of .*f.safetensors", loading.check_base, *sources
    )


# --------------------------------------------------------------------------------- which blocks, steps, tokens, streams


@pytest.mark.parametrize("count, depth", [(5, 19), (6, 19), (10, 38), (1, 4), (3, 7), (4, 3)])
def test_residuals_are_spread_in_groups_or_taken_in_turn(count, depth):
    residuals = Residuals([torch.tensor(i) for i in range(count)], [])
    blocks = [Block("double", i) for i in range(depth)]
    spread = [int(residuals.after(block, depth, in_turn=False)) for block in blocks]
    assert spread == [i // math.ceil(depth / count) for i in range(depth)]
    assert [int(residuals.after(block, depth, in_turn=True)) for block in blocks] == [i % count for i in range(depth)]
    assert residuals.after(Block("single", 0), depth, in_turn=False) is None


def test_several_controlnets_add_up():
    x, tokens = inputs(), random(1, 15, 64, seed=4)
    two = [at_full(net(2, 3), tokens, 0.5), at_full(net(2, seed=6, hint_width=4), tokens, -0.25)]
    for block in (Block("double", 3), Block("single", 6)):
        before = random(1, 22 if block.kind == "single" else 15, 64, seed=9)
        parts = [after_block_of([one], x)(before.clone(), block) - before for one in two]
        both = after_block_of(two, x)(before.clone(), block) - before
        assert parts[0].abs().max() > 0.01 and torch.allclose(both, sum(parts))
        assert (parts[1].abs().max() > 0.01) == (block.kind == "double")  # XLabs has none for the single blocks


@pytest.mark.parametrize(
    "start, end, steps, acting",
    [(0, 1, 4, [0, 1, 2, 3]), (0, 0.5, 4, [0, 1]), (0.3, 0.7, 10, [3, 4, 5, 6]), (0.26, 1, 4, [2, 3]), (0, 0.2, 4, [])],
)
def test_start_and_end_say_in_which_steps_it_acts(start, end, steps, acting):
    control = at_full(net(1), random(1, 15, 64, seed=4), start=start, end=end)
    assert [i for i in range(steps) if control.setting.acts(i, steps)] == acting
    x = inputs()
    levels = sigmas(steps, 15, shift=True)
    for step, level in enumerate(levels[:-1]):
        x["timesteps"] = torch.tensor([level], dtype=torch.float32)
        after_block = after_block_of([control], x, step, steps)
        changed = after_block(torch.zeros(1, 15, 64, dtype=F64), Block("double", 0)).abs().max() > 0
        assert changed == (step in acting)


@pytest.mark.parametrize("residuals", ["all", "published"])
@pytest.mark.parametrize("region, base_ratio", [(None, 0.3), (1, 0.3), (1, 0.0)])
def test_a_regional_step_and_a_plain_one_are_what_they_are_said_to_be(residuals, region, base_ratio):
    """Two steps, regional and plain, against the rule written out once more, without sorted tokens."""
    boxes = [(0, 16, 64, 48), (32, 0, 64, 64)]
    layout = Layout(
        prompt="p", width=64, height=64, steps=2, mask_inject_steps=1, base_ratio=base_ratio,
        regions=[Region(prompt=f"{i}", box=box) for i, box in enumerate(boxes)],
    )  # fmt: skip
    setting = Control(model="m", image="i", scale=0.9, region=region, residuals=residuals)
    flux, control = randomised(Flux(BASE)), net(2, 3)
    tokens = region_tokens(layout)
    rows, last = 16, tokens.prompts
    picture = random(1, rows, 64, seed=4)
    scale = scale_of(setting, layout).double()
    conditioning = Conditioning(random(1, 7, 32, seed=2), random(len(last), 5, 32, seed=8), random(1, 48, seed=3))
    controls = [LoadedControl(control, picture, scale, setting)]
    extensions = [controlnets(controls, BASE, 2, conditioning)]
    got = sample(flux, layout, tokens, conditioning, 1, portable_attention, extensions)

    inside = torch.tensor([x >= 2 for _ in range(4) for x in range(4)]) if region == 1 else torch.ones(16) > 0
    img, levels = pack(noise(64, 64, 1)).double(), sigmas(2, rows, shift=True)
    regional = RegionalAttention(dense_attention, tokens.bits(5), 7, rows, base_ratio)
    base = {"img_ids": image_ids(64, 64), "y": conditioning.y, "guidance": torch.tensor([3.5])}
    for step, text in enumerate([conditioning.regions.flatten(0, 1)[None], conditioning.txt]):
        t = torch.tensor([levels[step]], dtype=torch.float32)
        more, streams = {}, 1
        if step == 0:
            more = {"attention": regional, "join": regional.join}
            if base_ratio:
                text, streams = torch.cat([text, conditioning.txt], dim=1), 2
        double, single = residuals_of(
            control, img=img, txt=conditioning.txt, txt_ids=text_ids(7), timesteps=t, control=picture, **base
        )

        def after_block(x, block, double=double, single=single, streams=streams):
            x = x.clone()
            r = double[block.index // 3] if block.kind == "double" else single[block.index // 3]
            r = torch.where(inside[:, None], 0.9 * r, 0.0)
            x[:, -rows:] += r
            if block.kind == "single" and x.shape[1] > rows and streams == 2 and residuals == "all":
                x[:, -2 * rows : -rows] += r
            return x

        ids = text_ids(text.shape[1])
        given = {"img": img, "txt": text, "txt_ids": ids, "timesteps": t, "after_block": after_block}
        flow = tiny.velocity(flux, **given, **base, **more)
        img = img + (levels[step + 1] - levels[step]) * flow
    assert (got - unpack(img, 64, 64)).abs().max() < 1e-4
    without = sample(flux, layout, tokens, conditioning, 1, portable_attention)
    assert (got - without).abs().max() > 1e-2


def test_published_residuals_leave_the_base_stream_alone():
    x, tokens = inputs(), random(1, 15, 64, seed=4)
    for residuals, reached in (("all", slice(-30, None)), ("published", slice(-15, None))):
        after_block = after_block_of([at_full(net(1, 1), tokens, residuals=residuals)], x, streams=2)
        added = after_block(torch.zeros(1, 40, 64, dtype=F64), Block("single", 0))[0]
        touched = added.abs().sum(-1) > 0
        assert touched[reached].all() and touched.sum() == len(added[reached])
        assert torch.equal(added[-15:], added[-30:-15]) == (residuals == "all")


def test_a_region_of_its_own_keeps_residuals_out_of_the_others():
    regions = [Region(prompt="a", box=(0, 0, 32, 48)), Region(prompt="b", box=(48, 16, 80, 48))]
    layout = Layout(prompt="p", width=80, height=48, regions=regions)
    x, tokens = inputs(), random(1, 15, 64, seed=4)
    setting = Control(model="m", image="i", region=1)
    control = LoadedControl(net(1, 1), tokens, scale_of(setting, layout).double(), setting)
    for block in (Block("double", 0), Block("single", 0)):
        added = after_block_of([control], x)(torch.zeros(1, 15, 64, dtype=F64), block)[0]
        assert (added.abs().sum(-1) > 0).nonzero().flatten().tolist() == [8, 9, 13, 14]


def test_the_order_of_tokens_does_not_matter():
    """Sorted latents, positions and control tokens give sorted residuals."""
    x, order = inputs(), torch.randperm(15, generator=torch.Generator().manual_seed(0))
    control = at_full(net(2, 1, modes=3), random(1, 15, 64, seed=4), mode=2)
    moved = x | {"img": x["img"][:, order], "img_ids": x["img_ids"][:, order]}
    want = residuals_of(control.net, **x, control=control.tokens, mode=2)
    got = residuals_of(control.net, **moved, control=control.tokens[:, order], mode=2)
    for ours, theirs in zip(got.double + got.single, want.double + want.single):
        assert torch.allclose(ours, theirs[:, order], atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_the_image_is_scaled_and_its_aspect_ratio_is_warned_of(tmp_path, capsys):
    Image.fromarray(np.array([[[255, 0, 127]]], np.uint8)).resize((64, 32)).save(tmp_path / "a.png")
    picture = control_image(str(tmp_path / "a.png"), None, Layout(prompt="", width=128, height=64))
    assert picture.shape == (1, 3, 64, 128) and not capsys.readouterr().err
    assert torch.allclose(picture[0, :, 5, 7], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))
    control_image(str(tmp_path / "a.png"), None, Layout(prompt="", width=64, height=64))
    assert "64 x 32 pixels are stretched to 64 x 64" in capsys.readouterr().err


def test_a_depth_map_of_16_bits_keeps_its_greys(tmp_path):
    Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)).save(tmp_path / "depth.png")
    picture = control_image(str(tmp_path / "depth.png"), None, Layout(prompt="", width=16, height=16))
    assert torch.allclose(picture, torch.tensor(128 / 127.5 - 1), atol=1e-6)


def test_canny_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    refuse("preprocess = canny: .*pip install opencv-python-headless", canny, np.zeros((4, 4, 3), np.uint8))


# ---------------------------------------------------------------------------------------------- layout and command line


A = {"prompt": "a harbour at dawn", "width": 64, "height": 64, "steps": 2, "seed": 3, "max_sequence_length": 16}


@pytest.fixture
def folder(golden, tmp_path, monkeypatch):
    """Runs happen here; control.png lies beside the layout, in a folder below."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layouts").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "layouts" / "control.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "models").symlink_to(golden / "models")
    return tmp_path


def run(layout: dict, *flags: str) -> int:
    Path("layouts/layout.yaml").write_text(yaml.safe_dump(layout))
    model = ["--layout", "layouts/layout.yaml", "--model", "models/flux-tiny-dev", "--device", "cpu"]
    return generate.main([*model, "--output", "z.png", "--save-latents", "z.safetensors", "--overwrite", *flags])


def latents(layout: dict, *flags: str) -> torch.Tensor:
    assert run(layout, *flags) == 0
    return load_file("z.safetensors")["latents"]


FLAGS = ["--controlnet", "models/controlnet-union", "--control-image", "layouts/control.png", "--control-mode", "depth"]


def test_flags_are_the_layouts_keys_and_win_over_them(folder, capsys):
    control = {"model": "../models/controlnet-union", "image": "control.png", "mode": 2, "scale": 0.5, "end": 0.5}
    flags = [*FLAGS, "--control-scale", "0.5", "--control-end", "0.5"]
    by_layout = latents({**A, "controlnets": [control]})
    assert torch.equal(by_layout, latents(A, *flags))
    assert torch.equal(by_layout, latents({**A, "controlnets": [{**control, "scale": 3}]}, *flags))
    assert (by_layout - latents(A)).abs().max() > 1e-3
    assert (by_layout - latents({**A, "controlnets": [{**control, "mode": "canny"}]})).abs().max() > 1e-3
    assert torch.equal(latents({**A, "controlnets": [{**control, "end": 0.4}]}), latents(A))
    assert "no step of 2 lies within its start and end" in capsys.readouterr().err


def test_the_picture_tells_its_controlnets(folder):
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    assert run(A, *FLAGS, "--preprocess", "canny") == 0
    (control,) = json.loads(Image.open("z.png").text["layout"])["controlnets"]
    assert control["model"] == "models/controlnet-union" and control["mode"] == "depth"
    assert (control["preprocess"], control["scale"], control["region"]) == ("canny", 0.7, None)


def test_one_model_may_act_twice_and_a_scale_of_0_is_none_at_all(folder):
    control = {"model": "../models/controlnet", "image": "control.png", "scale": 0.25}
    twice, once = (
        latents({**A, "controlnets": [control] * 2}),
        latents({**A, "controlnets": [{**control, "scale": 0.5}]}),
    )
    assert torch.allclose(twice, once, atol=1e-5)
    assert torch.equal(latents({**A, "controlnets": [{**control, "scale": 0}]}), latents(A))


@pytest.mark.parametrize("method", ["regional", "rpg", "plain"])
def test_every_method_takes_a_controlnet_for_one_region(folder, method):
    regions = [{"prompt": "a boat", "box": [0, 0, 32, 64]}, {"prompt": "a tower", "box": [32, 0, 64, 64]}]
    layout = {**A, "method": method, "mask_inject_steps": 1, "regions": regions}
    control = {"model": "../models/controlnet", "image": "control.png"}
    everywhere, one, none = (
        latents({**layout, "controlnets": controls}) for controls in ([control], [{**control, "region": 0}], [])
    )
    for a, b in ((everywhere, one), (one, none), (everywhere, none)):
        assert (a - b).abs().max() > 1e-3


def test_an_xlabs_controlnet_reads_the_picture_itself(folder):
    flux = weights.flux_params(weights.find("models/flux-tiny-dev").flux)
    sizes = {key: getattr(flux, key) for key in SIZES}
    state = randomised(ControlNet(ControlNetParams(**sizes, depth=2, depth_single_blocks=0, hint_width=16)))
    state = {key: tensor.float() for key, tensor in state.state_dict().items()}
    tiny.save(folder / "xlabs.safetensors", xlabs_names(state))
    regions = [{"prompt": "a boat", "box": [16, 0, 48, 64]}]
    control = {"model": "../xlabs.safetensors", "image": "control.png"}
    layout = {**A, "regions": regions, "mask_inject_steps": 1}
    with_it, without = latents({**layout, "controlnets": [control]}), latents(layout)
    assert (with_it - without).abs().max() > 1e-3


CONTROL = {"model": "../models/controlnet", "image": "control.png"}
UNION_CONTROL = {"model": "../models/controlnet-union", "image": "control.png"}
MISTAKES = {
    r"controlnets\[0\].image is missing": {"model": "m"},
    r"controlnets\[0\].image = layouts/none.png: there is no such file": {**CONTROL, "image": "none.png"},
    r"controlnets\[0\].image = layouts/../text.png: not a picture": {**CONTROL, "image": "../text.png"},
    r"controlnets\[0\].model = ./layouts/none: there is no such": {**CONTROL, "model": "none"},
    r"controlnets\[0\].scal = 1: no such key, did you mean scale": {**CONTROL, "scal": 1},
    r"controlnets\[0\].scale = inf: expected float <= 100": {**CONTROL, "scale": math.inf},
    r"controlnets\[0\].scale = nan: expected float >= -100": {**CONTROL, "scale": math.nan},
    r"controlnets\[0\].start = 0.5: not before its end, 0.5": {**CONTROL, "start": 0.5, "end": 0.5},
    r"controlnets\[0\].end = 1.5: expected `?float`? <= 1.0": {**CONTROL, "end": 1.5},
    r"controlnets\[0\].start = -1: expected `?float`? >= 0.0": {**CONTROL, "start": -1},
    r"controlnets\[0\].start = nan": {**CONTROL, "start": math.nan},
    r"controlnets\[0\].region = 1: the layout has 1 region": {**CONTROL, "region": 1},
    r"controlnets\[0\].residuals = 'some': invalid enum value": {**CONTROL, "residuals": "some"},
    r"controlnets\[0\].preprocess = 'blur'": {**CONTROL, "preprocess": "blur"},
    r"controlnets\[0\].mode = 'edges': expected a number, or one of canny": {**UNION_CONTROL, "mode": "edges"},
    r"controlnets\[0\].mode = -1: expected": {**UNION_CONTROL, "mode": -1},
    r"controlnets\[0\].mode is missing: .*safetensors is a union of 10 modes": UNION_CONTROL,
    r"controlnets\[0\].mode = 10: .*safetensors has 10 modes, counted from 0": {**UNION_CONTROL, "mode": 10},
    r"controlnets\[0\].mode = canny: .*safetensors has no modes": {**CONTROL, "mode": "canny"},
}


@pytest.mark.parametrize("match", MISTAKES)
def test_each_mistake_gets_one_sentence(folder, capsys, match):
    layout = {**A, "regions": [{"prompt": "a boat", "box": [0, 0, 32, 32]}], "controlnets": [MISTAKES[match]]}
    assert run(layout) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate.py:")]
    assert line.startswith("generate.py: layouts/layout.yaml: ") and line.endswith(".")
    with pytest.raises(InputError, match=match):
        raise InputError(line)


FLAG_MISTAKES = {
    "the command line: --control-image = none.png: there is no such file": ["--control-image", "none.png"],
    "the command line: --control-start = 0.9: not before its end, 0.5": [
        "--control-start",
        ".9",
        "--control-end",
        ".5",
    ],
    "the command line: --control-scale = nan: expected float >= -100": ["--control-scale", "nan"],
    "the command line: --control-mode = 'edges': expected a number": ["--control-mode", "edges"],
    "--control-mode = 10: models/controlnet-union/": ["--control-mode", "10"],
    "--controlnet = none: there is no such file": ["--controlnet", "none"],
    "--controlnet = models/lora: no FLUX.1 ControlNet in it": ["--controlnet", "models/lora"],
}


@pytest.mark.parametrize("message", FLAG_MISTAKES)
def test_mistakes_in_flags_name_the_flag(folder, capsys, message):
    assert run(A, *FLAGS, *FLAG_MISTAKES[message]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [FLAGS[:2], FLAGS[2:4], ["--control-scale", "1"], ["--preprocess", "canny"]])
def test_half_a_controlnet_is_refused(folder, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        run(A, *flags)
    assert caught.value.code == 2
    assert "needs both --controlnet and --control-image" in capsys.readouterr().err


def test_repositories_stay_as_they_are_and_paths_start_at_the_layout(folder):
    controls = [{**CONTROL, "model": "org/name:a.safetensors"}, CONTROL]
    Path("layouts/layout.yaml").write_text(yaml.safe_dump({**A, "controlnets": controls}))
    hub, local = read_layout(Path("layouts/layout.yaml"), {}).controlnets
    assert (hub.model, local.model) == ("org/name:a.safetensors", "layouts/../models/controlnet")
    assert local.image == "layouts/control.png"
