"""FLUX.1 Redux: SigLIP and the projector against transformers' and diffusers', whole runs against their pipelines, what
image prompts of the layout and of regions do, and every mistake's sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import test_parity
import tiny
import torch
from huggingface_hub import constants
from PIL import Image
from test_parity import largest_difference, random, randomized
from torch import Tensor, nn

import weights
from errors import InputError
from extensions.loading import PROJECTOR, SIGLIP, find_redux, siglip_params
from extensions.redux import Projector, ProjectorParams
from extensions.siglip import Siglip, SiglipParams, pixels_of
from formats import components, hub
from formats.recognize import pick
from pipeline import Pipeline
from regional.layout import ImagePrompt, Layout, Region
from runtime.memory import working_bytes
from tools.metadata import fingerprint

diffusers = test_parity.diffusers  # the fixtures
transformers = test_parity.transformers
ROOT = Path(__file__).parent.parent
F64 = torch.float64
VISION = SiglipParams(hidden_size=48, mlp_hidden=80, num_heads=3, num_layers=2, patch_size=14, image_size=45)
TO_GOLDEN = ProjectorParams(width=48, hidden_size=96, context_in_dim=64)
SIZES = {  # as transformers calls them; of the first, 3 pixels at two sides are in no patch
    "tokens of 48": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": 45, "patch_size": 14,
    },
    "tokens of 72": {
        "hidden_size": 72, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 8,
    },
}  # fmt: skip
LEFT = Region(prompt="a boat", box=(0, 0, 32, 64))
RIGHT = Region(prompt="a tower", box=(32, 0, 64, 64))
A = {"prompt": "a harbor at dawn", "width": 64, "height": 64, "steps": 2, "max_sequence_length": 16}
REGIONAL = A | {"mask_inject_steps": 1, "regions": (LEFT, RIGHT)}


def refuse(match, call, *args):
    with pytest.raises(InputError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def named(module: nn.Module, prefix: str = "vision_model.") -> tiny.State:
    return {prefix + key: tensor for key, tensor in module.state_dict().items()}


def config_of(p: SiglipParams) -> dict[str, int]:
    return {"num_attention_heads": p.num_heads, "image_size": p.image_size}


def save_redux(folder: Path, context: int = 64) -> Path:
    """A small random Redux in the official folders."""
    vision = randomized(Siglip(VISION), 1).float()
    projector = randomized(Projector(TO_GOLDEN._replace(context_in_dim=context)), 2).float()
    tiny.save(folder / "image_encoder" / "model.safetensors", named(vision), config=config_of(VISION))
    tiny.save(folder / "image_embedder" / "diffusion_pytorch_model.safetensors", projector.state_dict(), config={})
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """redux/, and two images, a.png and b.png, of other sizes and shapes."""
    folder = tmp_path_factory.mktemp("redux")
    save_redux(folder / "redux")
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (70, 50), "b.png": (30, 41)}.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def made(golden, files):
    """made(dtype, attention): a pipeline of the small FLUX with that Redux; each is made once."""
    known = {}

    def made(dtype: str = "float32", attention: str = "portable") -> Pipeline:
        if (dtype, attention) not in known:
            how = {"dtype": dtype, "attention": attention, "redux": files / "redux"}
            known[dtype, attention] = Pipeline(golden / "models" / "flux-tiny-dev", device="cpu", **how)
        return known[dtype, attention]

    return made


def looks(files: Path, *names: str, strength: float = 1.0) -> tuple[ImagePrompt, ...]:
    return tuple(ImagePrompt(file=str(files / name), strength=strength) for name in names)


def latents(made: Pipeline, layout: Layout, seed: int = 3) -> Tensor:
    return made.denoise(made.prepare(layout), seed)


def with_looks(region: Region, own: tuple[ImagePrompt, ...]) -> Region:
    return Region(prompt=region.prompt, box=region.box, image_prompts=own)


# -------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_our_siglip_is_transformers_siglip(transformers, tmp_path, sizes, prefix):
    """Its pooling head, which Redux does not use, is in the file and is passed over. Files without the prefix are
    those that transformers 5 writes."""
    theirs = randomized(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)))
    state = {f"{prefix}{key.removeprefix('vision_model.')}": x for key, x in theirs.state_dict().items()}
    assert f"{prefix}head.probe" in state
    ours = components.load(
        pick("siglip", "--redux", tiny.save(tmp_path / "x.safetensors", state, config=sizes)), "cpu", F64, kind=SIGLIP
    )
    side = sizes["image_size"]
    image = random(2, 3, side, side)
    found = ours(image)
    assert found.shape == (2, (side // sizes["patch_size"]) ** 2, sizes["hidden_size"])
    assert largest_difference(found, theirs(image).last_hidden_state) < 1e-9


@pytest.mark.parametrize("mode, size", [("RGB", (70, 50)), ("L", (400, 800)), ("RGBA", (384, 384)), ("P", (20, 20))])
def test_images_are_read_as_by_diffusers_and_transformers(transformers, diffusers, tmp_path, mode, size):
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    image.save(tmp_path / "a.png")
    half = [0.5, 0.5, 0.5]
    how = {"size": {"height": 384, "width": 384}, "resample": 3, "image_mean": half, "image_std": half}
    processor = transformers.SiglipImageProcessor(**how)
    theirs = processor.preprocess(
        diffusers.utils.load_image(str(tmp_path / "a.png")), return_tensors="pt", do_convert_rgb=True
    )
    ours = pixels_of(str(tmp_path / "a.png"), 384)
    assert ours.shape == (1, 3, 384, 384) and ours.std() > 0.1
    assert (ours - theirs["pixel_values"]).abs().max() < 1e-6


def test_our_projector_is_diffusers_image_encoder(diffusers, tmp_path):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    theirs = randomized(ReduxImageEncoder(redux_dim=24, txt_in_features=20))
    path = tiny.save(tmp_path / "flux1-redux.safetensors", theirs.state_dict())
    ours = components.load(pick("redux", "--redux", path), "cpu", F64, kind=PROJECTOR)
    x = random(2, 7, 24)
    assert largest_difference(ours(x), theirs(x).image_embeds) < 1e-9


def save_empty(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros in bfloat16, most of which take no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_the_official_files_have_the_names_and_shapes_that_are_expected(transformers, diffusers, tmp_path):
    """By those classes at full size; the SigLIP file as ComfyUI's users have it, without a config.json."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    full = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    with torch.device("meta"):
        config = transformers.SiglipVisionConfig(**full, image_size=384, patch_size=14)
        vision, projector = transformers.SiglipVisionModel(config), ReduxImageEncoder()
    shapes = {f"vision_model.{key.removeprefix('vision_model.')}": x.shape for key, x in vision.state_dict().items()}
    save_empty(tmp_path / "sigclip_vision_patch14_384.safetensors", shapes)
    save_empty(tmp_path / "flux1-redux-dev.safetensors", {key: x.shape for key, x in projector.state_dict().items()})
    source = pick("siglip", "--redux", tmp_path)
    assert siglip_params(source) == SiglipParams() and SiglipParams().tokens == 729
    components.check_loads(source, SIGLIP)
    module, _ = components.check_loads(pick("redux", "--redux", tmp_path), PROJECTOR)
    assert [tuple(x.shape) for x in module.parameters()] == [(12288, 1152), (12288,), (4096, 12288), (4096,)]


# -------------------------------------------------------------------------------- against the official pipelines

PARITY = {  # width, height; each image with its strength
    "128 x 128": (128, 128, {"a.png": 1.0}),
    "160 x 96, strength 0.5": (160, 96, {"b.png": 0.5}),
    "64 x 64, two images": (64, 64, {"a.png": 1.0, "b.png": 0.25}),
}


@pytest.mark.published
@pytest.mark.parametrize("width, height, images", PARITY.values(), ids=PARITY)
def test_latents_are_those_of_diffusers_two_pipelines(golden, files, made, width, height, images):
    """Their prompt_embeds_scale is for the text, too, and they add up the embeddings of several images; here it is for
    the image alone, and each image has its own tokens. So the text is theirs at scale 1, without an image."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    theirs = diffusers.FluxPipeline.from_pretrained(golden / "models" / "flux-tiny-dev")
    vision = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SIZES["tokens of 48"], vision_use_head=False)
    )
    vision.load_state_dict(randomized(Siglip(VISION), 1).float().state_dict())
    projector = ReduxImageEncoder(redux_dim=48, txt_in_features=64)
    projector.redux_up, projector.redux_down = nn.Linear(48, 96), nn.Linear(96, 64)  # a width that it doesn't ask for
    projector.load_state_dict(randomized(Projector(TO_GOLDEN), 2).float().state_dict())
    half = [0.5, 0.5, 0.5]
    how = {"size": {"height": 45, "width": 45}, "image_mean": half, "image_std": half}
    encoders = {key: getattr(theirs, key) for key in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    prior = diffusers.FluxPriorReduxPipeline(vision, transformers.SiglipImageProcessor(**how), projector, **encoders)
    prior.tokenizer_max_length = 77
    prompt = "a harbor at dawn"
    parts = []
    for name, strength in images.items():
        image = Image.open(files / name)
        found = prior(image, prompt=prompt, prompt_embeds_scale=strength)
        parts.append(found.prompt_embeds[:, 512:])
    if len(images) == 1 and strength == 1:
        embeds = found.prompt_embeds
    else:
        embeds = torch.cat([prior(image, prompt=prompt).prompt_embeds[:, :512], *parts], dim=1)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        prompt_embeds=embeds, pooled_prompt_embeds=found.pooled_prompt_embeds, width=width, height=height,
        num_inference_steps=2, guidance_scale=3.5, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    own = tuple(ImagePrompt(file=str(files / name), strength=strength) for name, strength in images.items())
    layout = Layout(**A | {"width": width, "height": height, "max_sequence_length": 512, "image_prompts": own})
    ours = latents(made(), layout)
    packed = ours.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    assert (packed.reshape(wanted.shape) - wanted).abs().max() < 1e-4
    assert (ours - latents(made(), Layout(**A | {"width": width, "height": height}))).abs().max() > 1e-3


# -------------------------------------------------------------------------------- what image prompts do


def test_tokens_follow_their_own_prompts_and_strength_multiplies_them(files, made):
    """The background, the last prompt, has none; CLIP's vector is the base prompt's."""
    image, count = looks(files, "a.png"), VISION.tokens
    regions = (with_looks(LEFT, looks(files, "b.png", "a.png", strength=0.5)), Region(prompt="x", box=(32, 0, 64, 32)))
    given = {**REGIONAL, "regions": regions}
    bare = made().prepare(Layout(**REGIONAL | {"regions": (LEFT, regions[1])})).conditioning
    found = made().prepare(Layout(**given, image_prompts=image)).conditioning
    assert torch.equal(found.y, bare.y) and torch.equal(found.txt[:, :16], bare.txt)
    assert [len(x) for x in found.regions] == [16 + 2 * count, 16, 16] and found.txt.shape == (1, 16 + count, 64)
    for own, before in zip(found.regions, bare.regions):
        assert torch.equal(own[:16], before)
    assert torch.equal(found.regions[0][16 + count :], 0.5 * found.txt[0, 16:])
    assert found.txt[0, 16:].std() > 0.1
    none = made().prepare(Layout(**given, image_prompts=looks(files, "a.png", strength=0.0))).conditioning
    assert none.txt.shape == found.txt.shape and not none.txt[:, 16:].any()


def test_without_image_prompts_nothing_of_redux_is_looked_for_and_bits_stay(golden, files, made):
    bare = Pipeline(golden / "models" / "flux-tiny-dev", device="cpu", attention="portable", redux=files / "nowhere")
    for given in A, REGIONAL:
        assert torch.equal(latents(bare, Layout(**given)), latents(made(), Layout(**given, image_prompts=())))
    refuse("--redux .*nowhere: there is no such file", latents, bare, Layout(**A, image_prompts=looks(files, "a.png")))


def test_a_regions_image_changes_nothing_outside_it(files, made):
    """From the first step to the last, without the base branch."""
    given = REGIONAL | {"mask_inject_steps": 2, "base_ratio": 0.0}

    def drawn(*images: tuple[ImagePrompt, ...]) -> Tensor:
        return latents(made(), Layout(**given | {"regions": tuple(map(with_looks, (LEFT, RIGHT), images))}))

    first = drawn(looks(files, "a.png"), ())
    for other in drawn(looks(files, "b.png"), ()), drawn((), ()), drawn(looks(files, "a.png", "b.png"), ()):
        assert torch.equal(first[..., 4:], other[..., 4:])
        assert (first[..., :4] - other[..., :4]).abs().max() > 1e-3
    both = drawn(looks(files, "a.png"), looks(files, "a.png"))
    assert torch.equal(first[..., :4], both[..., :4]) and not torch.equal(first[..., 4:], both[..., 4:])


@pytest.mark.parametrize("keys", [{}, {"base_ratio": 0.0}, {"feather": 32}, {"method": "rpg"}], ids=str)
def test_attentions_agree_on_regions_of_different_lengths(files, made, keys):
    keys = dict(keys)
    feather = keys.pop("feather", 0)
    regions = (Region(prompt="a boat", box=(0, 0, 32, 48), feather=feather, image_prompts=looks(files, "a.png")), RIGHT)
    layout = Layout(**REGIONAL | keys | {"regions": regions}, image_prompts=looks(files, "b.png"))
    exact = latents(made(), layout)
    assert (latents(made(attention="dense"), layout) - exact).abs().max() < 1e-4
    without = Layout(**REGIONAL | keys | {"regions": (with_looks(regions[0], ()), RIGHT)})
    assert (latents(made(), without) - exact).abs().max() > 1e-3


def test_the_kernel_agrees_on_regions_of_different_lengths(files, made):
    module = pytest.importorskip("regional.kernel", reason="needs Triton")
    if not module.INTERPRETED:
        pytest.skip("the CPU's kernel is the interpreted one")
    regions = (with_looks(LEFT, looks(files, "a.png")), RIGHT)
    layout = Layout(**REGIONAL | {"regions": regions, "steps": 1}, image_prompts=looks(files, "b.png"))
    assert (latents(made(attention="kernel"), layout) - latents(made(), layout)).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["regional", "rpg", "plain"])
def test_every_method_takes_them_and_plain_steps_only_the_base_prompts(files, made, capsys, method):
    given = REGIONAL | {"method": method}
    own = given | {"regions": (with_looks(LEFT, looks(files, "a.png")), RIGHT)}
    bare, base, region = (
        latents(made(), Layout(**keys, image_prompts=x))
        for keys, x in ((given, ()), (given, looks(files, "a.png")), (own, ()))
    )
    assert (bare - base).abs().max() > 1e-3
    assert torch.equal(bare, region) == (method == "plain")
    assert ("no effect without regional steps" in capsys.readouterr().err) == (method == "plain")


def test_bfloat16_is_near_float32(files, made):
    regions = (with_looks(LEFT, looks(files, "a.png")), RIGHT)
    layout = Layout(**REGIONAL | {"regions": regions}, image_prompts=looks(files, "b.png"))
    exact, found = (latents(made(dtype), layout) for dtype in ("float32", "bfloat16"))
    assert 0 < (found - exact).norm() / exact.norm() < 0.1
    assert made("bfloat16").prepare(layout).conditioning.regions[0].dtype == torch.bfloat16


def test_attention_maps_count_an_images_tokens_to_its_region(files, made):
    regions = (with_looks(LEFT, looks(files, "a.png")), RIGHT)
    maps = tiny.maps_of(made())
    alone = REGIONAL | {"base_ratio": 0.0}
    made().denoise(made().prepare(Layout(**alone | {"regions": regions})), 3, [maps.extend])
    found = maps.maps[0].mean(0)  # of the first step, (regions, image tokens)
    inside = torch.tensor([True, True, False, False] * 4)
    assert found.shape == (2, 16) and found[0, inside].min() > 0.1 and not found[0, ~inside].any()
    bare = tiny.maps_of(made())
    made().denoise(made().prepare(Layout(**alone)), 3, [bare.extend])
    assert (found[0, inside] > bare.maps[0].mean(0)[0, inside]).all()  # of more tokens
    assert torch.allclose(found[1], bare.maps[0].mean(0)[1], atol=1e-5)


def test_each_image_is_encoded_once(golden, files, spy):
    own = Pipeline(golden / "models" / "flux-tiny-dev", device="cpu", redux=files / "redux")
    loaded, encoded = spy(components, "load"), spy(Siglip, "forward")
    regions = (with_looks(LEFT, looks(files, "a.png")), with_looks(RIGHT, looks(files, "a.png", strength=2)))
    layout = Layout(**REGIONAL | {"regions": regions}, image_prompts=looks(files, "a.png", "b.png"))
    own.prepare(layout)
    own.prepare(Layout(**A, image_prompts=looks(files, "b.png")))
    assert len(encoded) == 2 and len(loaded) == 4  # T5, CLIP and these
    own.drop("t5")
    assert not own.embeddings


def test_the_memory_for_their_tokens_is_counted():
    layout = Layout(**REGIONAL, image_prompts=(ImagePrompt(file="a"), ImagePrompt(file="b"))).resolved(
        Pipeline("pocket", device="cpu").defaults
    )
    more = working_bytes(3072, layout, torch.bfloat16, False)
    layout = layout.__class__(**REGIONAL).resolved(Pipeline("pocket", device="cpu").defaults)
    assert more - working_bytes(3072, layout, torch.bfloat16, False) == 2 * 729 * 18 * 3072 * 2


# -------------------------------------------------------------------------------- files, flags, mistakes


def test_the_two_files_are_found_in_every_arrangement(golden, files, tmp_path):
    vision = (files / "redux" / "image_encoder" / "model.safetensors").read_bytes()
    projector = (files / "redux" / "image_embedder" / "diffusion_pytorch_model.safetensors").read_bytes()
    found = weights.find(golden / "models" / "flux-tiny-dev")
    layouts = {  # --redux, and where the two are
        "one": ("one/sigclip.safetensors", "one/flux1-redux-dev.safetensors"),
        "two/flux1-redux-dev.safetensors": ("two/sigclip.safetensors", "two/flux1-redux-dev.safetensors"),
        "m/style_models/r.safetensors": ("m/clip_vision/s.safetensors", "m/style_models/r.safetensors"),
        "o/image_embedder/r.safetensors": ("o/image_encoder/s.safetensors", "o/image_embedder/r.safetensors"),
        "o": ("o/image_encoder/s.safetensors", "o/image_embedder/r.safetensors"),
    }
    for name, paths in layouts.items():
        for path, data in zip(paths, (vision, projector)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
            config = (tmp_path / path).parent / "config.json"
            config.write_text(json.dumps(config_of(VISION)))
        sources = find_redux(found, tmp_path / name)
        assert [source.path.resolve() for source in sources] == [tmp_path / path for path in paths]
    official = save_redux(tmp_path / "x", context=40)
    refuse(r"its tokens are 40 wide, but .*flux1-dev.safetensors expects 64", find_redux, found, official)


def test_without_the_flag_two_folders_of_the_official_repository_are_downloaded(golden, files, tmp_path, monkeypatch):
    names = ["README.md", "flux1-redux-dev.safetensors", "image_embedder/diffusion_pytorch_model.safetensors"]
    names += ["image_encoder/config.json", "image_encoder/model.safetensors", "text_encoder/model.safetensors"]
    listing = hub.Listing("0" * 40, [hub.File(name, 1, "0" * 40) for name in names])
    asked = []

    def download(repo, listing, chosen, purpose):
        asked.append((repo, [file.name for file in chosen]))
        return files / "redux"

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "listed", lambda repo: listing)
    monkeypatch.setattr(hub, "download", download)
    find_redux(weights.find(golden / "models" / "flux-tiny-dev"))
    assert asked == [("black-forest-labs/FLUX.1-Redux-dev", names[2:5])]


def wrong_widths(state: tiny.State) -> tiny.State:
    return {"redux_up.weight": torch.zeros(96, 40), **{k: x for k, x in state.items() if k != "redux_up.weight"}}


def no_bias(state: tiny.State) -> tiny.State:
    return {key: x for key, x in state.items() if key != "redux_down.bias"}


def with_more(state: tiny.State) -> tiny.State:
    return state | {"redux_side.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "change, match",
    [
        (wrong_widths, "it reads tokens 40 wide, but those of .*model.safetensors are 48"),
        (no_bias, "redux_down.bias is missing, expected with shape"),
        (with_more, "redux_side.weight, of shape .2, 2., is a key that does not belong"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(golden, tmp_path, change, match):
    folder = save_redux(tmp_path)
    state = change(randomized(Projector(TO_GOLDEN)).float().state_dict())
    tiny.save(folder / "image_embedder" / "diffusion_pytorch_model.safetensors", state)
    refuse(match, find_redux, weights.find(golden / "models" / "flux-tiny-dev"), folder)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"num_attention_heads": 5, "image_size": 45}, "5 heads do not divide the hidden size 48"),
        ({"num_attention_heads": 3, "image_size": 60}, "it has 9 positions for 60 x 60 pixels in patches of 14"),
        ({"num_attention_heads": "x"}, "config.json says num_attention_heads = 'x', which can't be"),
    ],
)
def test_a_siglip_that_does_not_fit_is_refused(golden, tmp_path, config, match):
    folder = save_redux(tmp_path)
    (folder / "image_encoder" / "config.json").write_text(json.dumps(config))
    refuse(match, find_redux, weights.find(golden / "models" / "flux-tiny-dev"), folder)


MISTAKES = {
    "image_prompts[0].file = none.png: there is no such file": {"image_prompts": [{"file": "none.png"}]},
    "image_prompts[0].file = text.png: not an image": {"image_prompts": [{"file": "text.png"}]},
    "image_prompts[0].strength = -1": {"image_prompts": [{"file": "a.png", "strength": -1}]},
    "image_prompts[0].scale = 1: no such key": {"image_prompts": [{"file": "a.png", "scale": 1}]},
    "regions[0].image_prompts[1].file = none.png: there is no such file": {
        "regions": [
            {"prompt": "a", "box": [0, 0, 64, 64], "image_prompts": [{"file": "a.png"}, {"file": "none.png"}]}
        ]
    },
    "true_cfg_scale = 2.0: does not go with image_prompts": {
        "image_prompts": [{"file": "a.png"}], "true_cfg_scale": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_each_mistake_in_a_layout_gets_one_sentence(run, files, message):
    Path("text.png").write_text("not an image")
    Path("a.png").write_bytes((files / "a.png").read_bytes())
    Path("x.yaml").write_text(json.dumps(A | MISTAKES[message]))
    ran = run("--layout", "x.yaml", "--redux", files / "redux")
    assert ran.code == 2 and message in ran.errors[-1] and ran.errors[-1].endswith(".")


def test_each_mistake_in_redux_gets_one_sentence(run, files, golden):
    layout = {"image_prompts": [{"file": str(files / "a.png")}]}
    Path("x.yaml").write_text(json.dumps(A | layout))
    save_redux(Path("wide"), context=40)
    Path("only").mkdir()
    Path("only/r.safetensors").write_bytes(
        (files / "redux/image_embedder/diffusion_pytorch_model.safetensors").read_bytes()
    )
    Path("empty").mkdir()
    messages = {
        "none": "--redux none: there is no such file or folder",
        "empty": "--redux empty: no FLUX.1 Redux projector in it: no safetensors or GGUF file",
        "wide": "its tokens are 40 wide",
        "only": "--redux only: no SigLIP vision encoder in it: r.safetensors is FLUX.1 Redux, which belongs to --redux",
        "only/r.safetensors": "--redux only: no SigLIP vision encoder in it",
        str(golden / "models" / "flux-tiny-dev" / "ae.safetensors"): "no FLUX.1 Redux projector in it: ae.safetensors",
        str(files / "redux/image_encoder"): "no FLUX.1 Redux projector in it: model.safetensors is a SigLIP vision",
    }
    for name, message in messages.items():
        ran = run("--layout", "x.yaml", "--redux", name)
        assert ran.code == 2 and message in ran.errors[-1], ran.errors
    ran = run("--layout", "x.yaml", "--flux", "only/r.safetensors")
    assert ran.code == 2 and "r.safetensors is FLUX.1 Redux, which belongs to --redux" in ran.errors[-1]


def test_an_image_records_its_redux_and_is_made_again_by_it(run, files):
    Path("a.png").write_bytes((files / "a.png").read_bytes())
    save_redux(Path("redux"))
    regions = [{"prompt": "a boat", "box": [0, 0, 32, 64], "image_prompts": [{"file": "a.png", "strength": 0.5}]}]
    Path("x.yaml").write_text(json.dumps(A | {"regions": regions, "mask_inject_steps": 1, "seed": 3}))
    assert run("--layout", "x.yaml", "--redux", "redux", "--output", "z.png").code == 0
    recorded = json.loads(Image.open("z.png").text["layout"])
    assert recorded["given"]["redux"] == "./redux" and len(recorded["inputs"]["redux"]) == 16
    assert recorded["files"]["redux"] == "redux"
    again = ["--config-from-metadata", "z.png", "--trust-metadata", "--output"]
    assert run(*again, "y.png", model=None).code == 0
    assert Path("z.png").read_bytes() == Path("y.png").read_bytes()
    state = {key: 2 * x for key, x in randomized(Projector(TO_GOLDEN), 2).float().state_dict().items()}
    tiny.save(Path("redux/image_embedder/diffusion_pytorch_model.safetensors"), state)
    fingerprint.cache_clear()  # as in another process
    ran = run(*again, "w.png", model=None)
    assert ran.code == 0 and any("made by other weights: redux" in line for line in ran.errors)
    assert Path("w.png").read_bytes() != Path("z.png").read_bytes()
    ran = run("--layout", "x.yaml", "--redux", "redux", "--output", "z.png")
    assert ran.code == 2 and "made with other settings (redux" in ran.errors[-1]
    save_redux(Path("other"))
    assert run(*again, "v.png", "--redux", "other", model=None).code == 0  # the model stays the recorded one
    assert np.array_equal(Image.open("v.png"), Image.open("z.png"))
    Path("bare.yaml").write_text(json.dumps(A | {"seed": 3}))
    assert run("--layout", "bare.yaml", "--redux", "redux", "--output", "bare.png").code == 0
    assert "redux" not in json.loads(Image.open("bare.png").text["layout"])["inputs"]
