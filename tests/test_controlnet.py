"""ControlNets: against diffusers' in float64, in both families' files, in regional steps, and every mistake's sentence.

Whole runs against the published pipelines are in test_golden.py.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import test_parity
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_parity import largest_difference, random, randomized

import weights
from errors import InputError
from extensions import loading
from extensions.controlnet import ControlNet, ControlNetParams, LoadedControl, controlnets, residual_after
from extensions.loading import CONTROLNET, find_controlnet, scale_of
from extensions.pictures import control_image
from formats import components
from model.attention import Block, plain_attention
from model.transformer import Flux, FluxParams, as_it_is, text_then_image
from pipeline import Pipeline
from regional.attention import RegionalAttention, dense_attention, portable_attention
from regional.extension import Branches, Conditioning, Pass
from regional.layout import Control, Defaults, Layout, Region
from regional.mask import region_tokens
from regional.reader import read_layout
from regional.sampling import by, noise_levels, sample
from sampler.flow import image_ids, noise, pack, text_ids, unpack

diffusers = test_parity.diffusers  # the fixture
F64 = torch.float64
SIZES = {"vec_in_dim": 48, "context_in_dim": 32, "hidden_size": 64, "mlp_hidden": 256, "num_heads": 2}
BASE = FluxParams(**SIZES, depth=5, depth_single_blocks=7)
DEFAULTS = Defaults(2, 7, 64, depth=5, depth_single_blocks=7)
THEIRS = {
    "in_channels": 64, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 48, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
INPUTS = {
    "img": random(1, 15, 64), "img_ids": image_ids(80, 48), "txt": random(1, 7, 32, seed=2), "txt_ids": text_ids(7),
    "timesteps": torch.tensor([0.317]).double(), "y": random(1, 48, seed=3), "guidance": torch.tensor([3.5]).double(),
}  # fmt: skip


def net(double: int, single: int, seed: int = 5, **more: int) -> ControlNet:
    return randomized(ControlNet(ControlNetParams(**SIZES, depth=double, depth_single_blocks=single, **more)), seed)


def after_block_of(controls, step=0, steps=1):
    """What the ControlNets do after the blocks of a pass, a function (x, block) -> x."""
    seen = []
    branches = Branches(torch.zeros(15, dtype=torch.long), torch.arange(15), 7)
    extension = controlnets(controls, BASE, steps, Conditioning(INPUTS["txt"], None, INPUTS["y"]))
    *tokens, timesteps, y, guidance = INPUTS.values()
    given = Pass(*tokens, [], plain_attention, text_then_image, as_it_is, timesteps, y, guidance)
    extension(lambda given, step: seen.append(given), branches)(given, step)
    return seen[0].after_block


def at_full(control: ControlNet, tokens: torch.Tensor, scale: float = 1.0, **setting) -> LoadedControl:
    scales = torch.full((tokens.shape[1], 1), scale, dtype=F64)
    return LoadedControl(control, tokens, scales, Control(model="m", image="i", **setting))


def refuse(match, call, *args):
    with pytest.raises(InputError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "double, single, modes, hint, guided",
    [(3, 4, 6, None, True), (2, 3, None, None, True), (3, 0, None, None, True), (1, 1, None, None, False),
     (2, 0, None, 16, True)], ids=["union", "spread", "double only", "without guidance", "xlabs"],
)  # fmt: skip
def test_files_from_diffusers_give_its_residuals_and_its_velocity(
    diffusers, tmp_path, double, single, modes, hint, guided
):
    blocks = {"num_layers": double, "num_single_layers": single, "guidance_embeds": guided}
    own = {"num_mode": modes, "conditioning_embedding_channels": hint, "patch_size": 2 if hint else 1}
    theirs = randomized(diffusers.FluxControlNetModel(**THEIRS, **blocks, **own))
    blocks = {"num_layers": 5, "num_single_layers": 7, "guidance_embeds": True}
    their_flux = randomized(diffusers.FluxTransformer2DModel(**THEIRS, **blocks), seed=7)
    tiny.save(tmp_path / "control" / "model.safetensors", theirs.state_dict())
    tiny.save(tmp_path / "flux.safetensors", their_flux.state_dict())
    ours = components.load(find_controlnet(str(tmp_path / "control")), "cpu", F64, kind=CONTROLNET)
    flux = components.load(weights.pick("flux", "--flux", tmp_path / "flux.safetensors"), "cpu", F64)
    params = ours.params
    assert (params.modes, params.hint_width, params.guidance_embed) == (modes or 0, hint or 0, guided)
    x = INPUTS
    mode = 4 if modes else None
    control = random(1, 3, 48, 80, seed=4) if hint else random(1, 15, 64, seed=4)
    tokens = ours.read(control) if hint else control
    shared = {
        "timestep": x["timesteps"], "encoder_hidden_states": x["txt"], "pooled_projections": x["y"],
        "img_ids": x["img_ids"][0].double(), "txt_ids": x["txt_ids"][0].double(), "return_dict": False,
    }  # fmt: skip
    wanted_double, wanted_single = theirs(
        hidden_states=x["img"], controlnet_cond=control, conditioning_scale=0.7,
        controlnet_mode=torch.tensor([[mode]]) if modes else None,
        guidance=x["guidance"] if guided else None, **shared,
    )  # fmt: skip
    got = tiny.velocity(ours, **x, control=tokens, mode=mode)
    assert (len(got["double"]), len(got["single"])) == (double, single)
    for our, their in zip(got["double"] + got["single"], [*wanted_double, *(wanted_single or [])]):
        assert largest_difference(0.7 * our, their) < 1e-9

    wanted = their_flux(
        x["img"], controlnet_block_samples=wanted_double, controlnet_single_block_samples=wanted_single,
        guidance=x["guidance"], controlnet_blocks_repeat=hint is not None, **shared,
    )[0]  # fmt: skip
    after_block = after_block_of([at_full(ours, tokens, 0.7, mode=mode)])
    assert largest_difference(tiny.velocity(flux, **x, after_block=after_block), wanted) < 1e-9
    assert (tiny.velocity(flux, **x) - wanted).abs().max() > 1e-3


OF_TINY = SIZES | {"mlp_hidden": 192, "depth": 2}  # as tiny.FLUX
XLABS = ControlNetParams(**OF_TINY, depth_single_blocks=0, hint_width=16)
UNION = ControlNetParams(**OF_TINY, depth_single_blocks=3, modes=6)


def xlabs_names(state: tiny.State) -> tiny.State:
    return {key.replace("controlnet_x_embedder", "pos_embed_input"): tensor for key, tensor in state.items()}


def diffusers_names(state: tiny.State) -> tiny.State:
    own = {key: state[key] for key in state if key.startswith(("controlnet_", "input_hint_block"))}
    for i, conv in enumerate(["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]):
        own = {key.replace(f"hint_block.{2 * i}.", f"hint_block.{conv}."): tensor for key, tensor in own.items()}
    return own | tiny.flux_to_diffusers({key: state[key] for key in state if key not in own and "hint" not in key})


@pytest.mark.parametrize("params, names", [(XLABS, xlabs_names), (XLABS, diffusers_names), (UNION, diffusers_names)])
def test_every_spelling_is_read_without_a_config_and_is_no_transformer(tmp_path, params, names):
    state = tiny.state(ControlNet(params))
    path = tiny.save(tmp_path / "any-name.safetensors", names(state))
    for place in (path, tmp_path):
        source = find_controlnet(str(place))
        assert loading.controlnet_params(source) == params
        found = components.load(source, "cpu", torch.float32, kind=CONTROLNET).state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    message = "no FLUX.1 transformer in it: any-name.safetensors is a ControlNet"
    refuse(message, weights.pick, "flux", "--flux", path)


WRONG = [
    ("controlnet_single_blocks.1.weight", None, "controlnet_single_blocks.1.weight is missing"),
    ("controlnet_blocks.1.bias", (3,), r"x.safetensors: controlnet_blocks.1.bias has shape \(3,\)"),
    ("controlnet_blocks.2.bias", (64,), r"controlnet_blocks.2.bias, of shape \(64,\), is a key that does not belong"),
    ("controlnet_x_embedder.weight", (64, 68), r"x_embedder.weight has shape \(64, 68\), expected 64 columns; inpaint"),
    ("controlnet_blocks.0.linear.weight", (4, 4), "is a Mistoline ControlNet"),
    ("transformer_blocks.0.attn.to_q.lora_A.weight", (4, 64), "is a LoRA; those belong to --lora"),
]


@pytest.mark.parametrize("key, shape, match", WRONG)
def test_files_that_do_not_fit_are_refused(tmp_path, key, shape, match):
    state = diffusers_names(tiny.state(ControlNet(UNION)))
    state.pop(key, None)
    state |= {key: torch.zeros(shape)} if shape else {}
    refuse(match, find_controlnet, str(tiny.save(tmp_path / "x.safetensors", state)))


def test_other_parts_nothing_and_other_base_sizes_are_refused(tmp_path):
    path = tiny.save(tmp_path / "x.safetensors", tiny.flux_state())
    refuse("no FLUX.1 ControlNet in it: x.safetensors is a FLUX.1 transformer", find_controlnet, str(path))
    refuse("--controlnet .*none: there is no such file", find_controlnet, str(tmp_path / "none"))
    other = Flux(FluxParams(**SIZES | {"vec_in_dim": 40}, depth=1, depth_single_blocks=1))
    control = tiny.save(tmp_path / "a" / "c.safetensors", diffusers_names(tiny.state(ControlNet(UNION))))
    flux = tiny.save(tmp_path / "b" / "f.safetensors", tiny.state(other))
    message = "c.safetensors: its vec_in_dim is 48, that of .*f.safetensors is 40"
    refuse(message, loading.check_base, find_controlnet(str(control)), weights.pick("flux", "--flux", flux))


@pytest.mark.parametrize("count, depth", [(5, 19), (6, 19), (10, 38), (1, 4), (3, 7), (4, 3)])
def test_residuals_are_spread_in_groups_or_taken_in_turn(count, depth):
    blocks = [Block("double", i) for i in range(depth)]
    spread, in_turn = ([residual_after(block, range(count), depth, turn) for block in blocks] for turn in (False, True))
    assert spread == [i // math.ceil(depth / count) for i in range(depth)]
    assert in_turn == [i % count for i in range(depth)]


def test_several_controlnets_add_up_in_the_steps_in_which_each_acts():
    tokens = random(1, 15, 64, seed=4)
    two = at_full(net(2, 0, 6, hint_width=4), tokens, -0.25, end=0.5), at_full(net(2, 3), tokens, 0.5)
    for block in (Block("double", 3), Block("single", 6)):
        before = random(1, 22 if block.kind == "single" else 15, 64, seed=9)
        runs = ([two[0]], 0), ([two[1]], 0), (two, 0), (two, 1)
        *parts, both, later = (after_block_of(own, step, 2)(before.clone(), block) - before for own, step in runs)
        assert parts[1].abs().max() > 0.01 and torch.allclose(both, sum(parts)) and torch.equal(later, parts[1])
        assert (parts[0].abs().max() > 0.01) == (block.kind == "double")  # XLabs has none for the single blocks


ACTING = [(0, 0.5, 4, [0, 1]), (0.3, 0.7, 10, [3, 4, 5, 6]), (0.26, 1, 4, [2, 3]), (0, 0.2, 4, [])]


@pytest.mark.parametrize("start, end, steps, acting", ACTING)
def test_start_and_end_say_in_which_steps_it_acts(start, end, steps, acting):
    setting = Control(model="m", image="i", start=start, end=end)
    assert [step for step in range(steps) if setting.acts(step, steps)] == acting


@pytest.mark.parametrize("residuals", ["all", "published"])
@pytest.mark.parametrize("region, base_ratio", [(None, 0.3), (1, 0.3), (1, 0.0)])
def test_a_regional_step_and_a_plain_one_are_what_they_should_be(residuals, region, base_ratio):
    """Two steps, regional and plain, against the rule written out once more, without sorted tokens."""
    layout = Layout(
        prompt="p", width=64, height=64, steps=2, mask_inject_steps=1, base_ratio=base_ratio,
        regions=[Region(prompt="0", box=(0, 16, 64, 48)), Region(prompt="1", box=(32, 0, 64, 64))],
    ).resolved(DEFAULTS)  # fmt: skip
    setting = Control(model="m", image="i", scale=0.9, region=region, residuals=residuals)
    flux, control, image = randomized(Flux(BASE)), net(2, 3), random(1, 16, 64, seed=4)
    tokens = region_tokens(layout)
    regions = random(len(tokens.prompts), 5, 32, seed=8)
    conditioning = Conditioning(INPUTS["txt"], regions, INPUTS["y"])
    loaded = LoadedControl(control, image, scale_of(setting, layout).double(), setting)
    run = flux, layout, tokens, conditioning, 1, by(portable_attention)
    got = sample(*run, [controlnets([loaded], BASE, 2, conditioning)])

    inside = torch.tensor([region is None or x >= 2 for _ in range(4) for x in range(4)])
    img = pack(noise(64, 64, 1)).double()
    levels = noise_levels(layout, BASE)
    regional = RegionalAttention(dense_attention, tokens.bits(5), 7, 16, layout.regions[0].base_ratio)
    base = {"img_ids": image_ids(64, 64), "y": conditioning.y, "guidance": torch.tensor([3.5])}
    txt = torch.cat([regions.flatten(0, 1)[None]] + [conditioning.txt] * (base_ratio > 0), dim=1)
    passes = [(txt, {"attention": regional, "join": regional.join}), (conditioning.txt, {})]
    for step, (txt, more) in enumerate(passes):
        given = base | {"img": img, "timesteps": torch.tensor([levels[step]], dtype=torch.float32)}
        found = tiny.velocity(control, **given, txt=conditioning.txt, txt_ids=text_ids(7), control=image)
        two = base_ratio and step == 0 and residuals == "all"

        def after_block(x, block, found=found, two=two):
            x = x.clone()
            r = torch.where(inside[:, None], 0.9 * found[block.kind][block.index // 3], 0.0)
            x[:, -16:] += r
            if block.kind == "single" and x.shape[1] > 16 and two:
                x[:, -32:-16] += r
            return x

        given |= {"txt": txt, "txt_ids": text_ids(txt.shape[1]), "after_block": after_block}
        img = img + (levels[step + 1] - levels[step]) * tiny.velocity(flux, **given, **more)
    assert (got - unpack(img, 64, 64)).abs().max() < 1e-4
    assert (got - sample(*run)).abs().max() > 1e-2


RED = Image.new("RGB", (64, 32), (255, 0, 127)), (1.0, -1.0, 127 / 127.5 - 1)
DEPTH = Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)), [128 / 127.5 - 1] * 3  # of 16 bits


@pytest.mark.parametrize(
    "image, rgb, height, warning",
    [(*RED, 64, ""), (*RED, 128, "64 x 32 pixels are stretched to 128 x 128"), (*DEPTH, 128, "")],
)
def test_the_image_is_scaled_and_its_aspect_ratio_is_warned_of(tmp_path, capsys, image, rgb, height, warning):
    image.save(tmp_path / "a.png")
    found = control_image(str(tmp_path / "a.png"), None, Layout(prompt="", width=128, height=height))
    warned = capsys.readouterr().err
    assert warning in warned and bool(warned) == bool(warning)
    assert found.shape == (1, 3, height, 128) and torch.allclose(found, torch.tensor(rgb)[:, None, None], atol=1e-6)


def test_canny_is_opencvs_and_without_it_names_what_to_install(tmp_path, monkeypatch):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[10:30, 20:50] = 200, 50, 250
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = str(tmp_path / "a.png"), "canny", Layout(prompt="", width=64, height=48)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cv2", None)
        refuse("preprocess = 'canny': .*pip install opencv-python-headless", control_image, *given)
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200)
    assert set(np.unique(edges)) == {0, 255}
    assert torch.equal(control_image(*given), torch.tensor(edges / 127.5 - 1).float().expand(1, 3, 48, 64))


A = {"prompt": "a harbor at dawn", "width": 64, "height": 64, "steps": 2, "seed": 3, "max_sequence_length": 16}
UNION_CONTROL = {"model": "../models/controlnet-union", "image": "control.png", "mode": 2}
CONTROL = {"model": "../models/controlnet", "image": "control.png"}


@pytest.fixture(scope="module")
def pipeline(golden):
    return Pipeline(golden / "models" / "flux-tiny-dev", device="cpu")


@pytest.fixture
def folder(golden, tmp_path, monkeypatch):
    """Layouts are in a folder below, beside control.png."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layouts").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save("layouts/control.png")
    Path("text.png").write_text("not an image")
    (tmp_path / "models").symlink_to(golden / "models")


def written(**changes) -> Path:
    path = Path("layouts/layout.yaml")
    path.write_text(yaml.safe_dump(A | changes))
    return path


@pytest.fixture
def latents(folder, pipeline):
    """latents(*controls, **keys): by the layout A with these ControlNets and keys."""

    def latents(*controls: dict, **keys) -> torch.Tensor:
        layout = read_layout(written(**keys, controlnets=list(controls)), {})
        return pipeline.denoise(pipeline.prepare(layout), 3)

    return latents


FLAGS = ["--controlnet", "models/controlnet-union", "--control-image", "layouts/control.png"]


def test_flags_are_the_layouts_keys_and_win_over_them(latents, run, capsys):
    control = UNION_CONTROL | {"scale": 0.5, "end": 0.5}
    by_layout = latents(control)
    layout = written(controlnets=[control | {"scale": 3}])
    more = ["--control-mode", "depth", "--control-scale", 0.5, "--control-end", 0.5]
    ran = run("--layout", layout, *FLAGS, *more, "--output", "z.png", "--save-latents", "z.safetensors")
    assert ran.code == 0 and torch.equal(by_layout, load_file("z.safetensors")["latents"])
    (recorded,) = json.loads(Image.open("z.png").text["layout"])["controlnets"]
    assert recorded | {"model": "./models/controlnet-union", "mode": "depth", "scale": 0.5, "region": None} == recorded
    without = latents()
    assert (by_layout - without).abs().max() > 1e-3
    assert (by_layout - latents(control | {"mode": "canny"})).abs().max() > 1e-3
    assert torch.equal(latents(control | {"end": 0.4}), without)
    assert "none of the 2 steps lies between start and end" in capsys.readouterr().err


def test_one_model_may_act_twice_and_a_scale_of_0_is_none_at_all(latents):
    quarter = CONTROL | {"scale": 0.25}
    assert torch.allclose(latents(quarter, quarter), latents(CONTROL | {"scale": 0.5}), atol=1e-5)
    assert torch.equal(latents(CONTROL | {"scale": 0}), latents())


@pytest.mark.parametrize("method", ["regional", "rpg", "plain"])
def test_every_method_takes_a_controlnet_for_one_region(latents, method):
    regions = [{"prompt": "a boat", "box": [0, 0, 32, 64]}, {"prompt": "a tower", "box": [32, 0, 64, 64]}]
    keys = {"method": method, "mask_inject_steps": 1, "regions": regions}
    found = [latents(CONTROL, **keys), latents(CONTROL | {"region": 0}, **keys), latents(**keys)]
    for a, b in zip(found, found[1:] + found[:1]):
        assert (a - b).abs().max() > 1e-3


def test_an_xlabs_controlnet_reads_the_image_itself(latents, pipeline):
    flux = components.flux_params(pipeline.checkpoint.flux)
    sizes = {key: getattr(flux, key) for key in SIZES}
    control = ControlNet(ControlNetParams(**sizes, depth=2, depth_single_blocks=0, hint_width=16))
    tiny.save(Path("xlabs.safetensors"), xlabs_names(randomized(control).float().state_dict()))
    control = {"model": "../xlabs.safetensors", "image": "control.png"}
    keys = {"regions": [{"prompt": "a boat", "box": [16, 0, 48, 64]}], "mask_inject_steps": 1}
    assert (latents(control, **keys) - latents(**keys)).abs().max() > 1e-3


MISTAKES = {
    r"image: missing": {"image": None},
    r"image = layouts/none.png: there is no such file": {"image": "none.png"},
    r"image = layouts/../text.png: not an image": {"image": "../text.png"},
    r"model ./layouts/none: there is no such": {"model": "none"},
    r"scal = 1: no such key, did you mean scale": {"scal": 1},
    r"scale = nan: expected float >= -100": {"scale": math.nan},
    r"start = 0.5: not before its end, 0.5": {"start": 0.5, "end": 0.5},
    r"region = 1: the layout has 1 region": {"region": 1},
    r"mode = 'edges': expected .*a number": {"mode": "edges"},
    r"mode = -1: expected": {"mode": -1},
    r"mode: .*safetensors expects one of its modes, 0 to 9": {"mode": None},
    r"mode = 10: .*safetensors expects one of its modes, 0 to 9": {"mode": 10},
    r"mode = 0: .*safetensors expects no mode": {"model": "../models/controlnet", "mode": "canny"},
}


@pytest.mark.parametrize("match", MISTAKES)
def test_each_mistake_gets_one_sentence(latents, match):
    control = {key: x for key, x in (UNION_CONTROL | MISTAKES[match]).items() if x is not None}
    regions = [{"prompt": "a boat", "box": [0, 0, 32, 32]}]
    refuse(rf"controlnets\[0\].{match}", lambda: latents(control, regions=regions))


FLAG_MISTAKES = {
    "--control-image none.png: there is no such file": ("--control-image", "none.png"),
    "--control-start 0.9: not before its end, 0.5": ("--control-start", ".9", "--control-end", ".5"),
    "--control-mode edges: expected a union's mode, a number or canny": ("--control-mode", "edges"),
    "--control-mode 10: models/controlnet-union/": ("--control-mode", "10"),
    "--controlnet models/lora: no FLUX.1 ControlNet in it": ("--controlnet", "models/lora"),
}


@pytest.mark.parametrize("message", FLAG_MISTAKES)
def test_mistakes_in_flags_name_the_flag(folder, run, message):
    ran = run("--layout", written(), *FLAGS, "--control-mode", 2, *FLAG_MISTAKES[message])
    assert ran.code == 2 and message in ran.errors[-1]


@pytest.mark.parametrize(
    "flags", [FLAGS[:2], [*FLAGS[2:], "--control-scale", "1"], ["--control-scale", "1"], ["--preprocess", "canny"]]
)
def test_half_a_controlnet_is_refused(folder, run, flags):
    ran = run("--layout", written(), *flags)
    assert ran.code == 2 and "needs both --controlnet and --control-image" in ran.errors[-1]


def test_repositories_stay_as_they_are_and_paths_start_at_the_layout(folder):
    controls = [CONTROL | {"model": "org/name:a.safetensors"}, CONTROL]
    hub, local = read_layout(written(controlnets=controls), {}).controlnets
    assert (hub.model, local.model) == ("org/name:a.safetensors", "layouts/../models/controlnet")
    assert local.image == "layouts/control.png"
