"""FLUX.1 Kontext's references: as diffusers computes them, and kept to their regions."""

import dataclasses
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import load_file, save_file
from test_offload import DEV, FOUR, LiveBytes
from test_parity import random, randomized
from test_ulysses import torchrun
from torch import Tensor

from errors import InputError
from extensions import kontext
from extensions.controlnet import ControlNet, ControlNetParams, LoadedControl, controlnets
from extensions.guidance import negative, true_cfg
from extensions.kontext import EVERY, ReferenceAttention, References, pixels_of, read_references
from extensions.rpg import composed
from formats.known import doubts, is_kontext
from formats.recognize import pick
from model.attention import Block
from model.transformer import Flux, FluxParams
from pipeline import Pipeline
from regional.attention import dense_attention, portable_attention
from regional.extension import Branches, Conditioning
from regional.layout import Control, Defaults, Layout, Region
from regional.mask import region_tokens
from regional.sampling import by, noise_levels, sample
from runtime import memory
from runtime.ulysses import Ulysses
from sampler.flow import image_ids, noise, pack, text_ids, unpack

TEXT = 5
DEFAULTS = Defaults(4, TEXT, 64, tiny.FLUX.depth, tiny.FLUX.depth_single_blocks)
LEFT = Region(prompt="a", box=(0, 0, 32, 64))
RIGHT = Region(prompt="b", box=(32, 0, 64, 32))  # below it is the background
GUIDANCE = torch.tensor([3.5])
SHAPE = {"width": 64, "height": 64}
PROMPTS = Conditioning(random(1, TEXT, 32), random(3, TEXT, 32, seed=2), random(4, 48, seed=3))


@pytest.fixture(scope="module")
def flux() -> Flux:
    return randomized(Flux(tiny.FLUX))


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> dict[str, str]:
    """Four images by their names, which become references of 2 x 2, 2 x 2, 2 x 1 and 2 x 2 tokens."""
    monkeypatch.setattr(kontext, "SIZES", [(32, 32), (32, 16)])
    files = {}
    for i, (name, size) in enumerate({"a": (40, 40), "b": (40, 40), "wide": (64, 32), "c": (9, 9)}.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        files[name] = str(tmp_path / f"{name}.png")
        Image.fromarray(pixels).save(files[name])
    return files


def as_latents(image: Tensor) -> Tensor:
    """In place of the VAE's: each of 16 channels a mixture of the colors, of the 8 x 8 pixels' mean."""
    mean = torch.nn.functional.avg_pool2d(image.double(), 8)
    return 3 * pack(torch.einsum("Bchw,oc->Bohw", mean, random(16, 3, seed=7)))


def encoded(layout: Layout) -> References | None:
    if found := read_references(layout):
        found.encode(as_latents)
    return found


def made(*regions: Region, **keys) -> Layout:
    keys = {"mask_inject_steps": 2, "base_ratio": 0.3} | SHAPE | keys
    return Layout(prompt="p", regions=regions, **keys).resolved(DEFAULTS)


def latents(flux: Flux, layout: Layout, *more) -> Tensor:
    """more: further extensions, inside the references'."""
    tokens = region_tokens(layout) if layout.regions else None
    references = encoded(layout)
    own = [*more, references.extend] if references else more
    velocity = composed if layout.method == "rpg" else by(portable_attention)
    return sample(flux, layout, tokens, PROMPTS, 1, velocity, own)


def changed(one: Tensor, other: Tensor) -> Tensor:
    """Which tokens of an image differ at all, (h, w) bool."""
    return (pack(one) != pack(other)).any(-1).view(4, 4)


def difference(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().max().item()


INSIDE = torch.zeros(4, 4, dtype=torch.bool)
INSIDE[:, :2] = True  # LEFT's tokens


# ------------------------------------------------------------------------ as diffusers


@pytest.fixture(scope="module")
def theirs(golden):
    """diffusers' pipeline on the golden checkpoint; its text encoders are not used."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    folder = golden / "models" / "flux-tiny-dev"
    names = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder, **names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(golden) -> Pipeline:
    return Pipeline(golden / "models" / "flux-tiny-dev", device="cpu", dtype="float32")


CASES = {
    "square": ((128, 128), (96, 96), {}),
    "another aspect ratio": ((160, 96), (48, 144), {"guidance": 1.5}),
    "larger than the image": ((96, 64), (160, 128), {"guidance": 7.0, "steps": 3}),
    "negative prompt": ((96, 96), (96, 64), {"true_cfg_scale": 2.5, "negative_prompt": "blurry"}),
    "both in a batch": ((96, 96), (96, 64), {"true_cfg_scale": 2.5, "negative_prompt": "blurry", "cfg_batch": True}),
}


@pytest.mark.published
@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_diffusers(theirs, ours, case, tmp_path, monkeypatch):
    """They get the same image, noise and encoded prompts."""
    (width, height), size, keys = CASES[case]
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "reference.png")
    monkeypatch.setattr(kontext, "SIZES", [size])
    keys = {"steps": 2, "width": width, "height": height} | keys
    layout = Layout(prompt="a red boat", references=(str(tmp_path / "reference.png"),), **keys)
    prepared = ours.prepare(layout)
    found = ours.denoise(prepared, seed=1)
    prompts = {"prompt_embeds": prepared.conditioning.txt, "pooled_prompt_embeds": prepared.conditioning.y}
    if away := prepared.extras.negative:
        prompts |= {"negative_prompt_embeds": away.txt, "negative_pooled_prompt_embeds": away.y}
    their = theirs(
        image, width=width, height=height, max_area=width * height, _auto_resize=False, output_type="latent",
        num_inference_steps=layout.steps, guidance_scale=layout.guidance, true_cfg_scale=layout.true_cfg_scale,
        latents=pack(noise(width, height, 1)), **prompts,
    ).images  # fmt: skip
    assert difference(pack(found), their) < 1e-4
    without = ours.denoise(ours.prepare(replace(layout, references=())), seed=1)
    assert difference(found, without) > 0.05


@pytest.mark.published
def test_sizes_and_pixels_are_those_of_diffusers(theirs, tmp_path):
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS as PREFERRED

    assert sorted(PREFERRED) == kontext.SIZES and len(kontext.SIZES) == 17
    for width, height in (300, 300), (40, 300), (33, 16), (16, 9), (1, 200):
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "x.png")
        _, *size = min((abs(width / height - w / h), w, h) for w, h in PREFERRED)
        expected = theirs.image_processor.preprocess(image.resize(size, Image.Resampling.LANCZOS))
        assert difference(pixels_of(str(tmp_path / "x.png")), expected) < 1e-6


@pytest.mark.published
def test_a_second_reference_is_at_the_next_index(theirs, ours, tmp_path, monkeypatch):
    """diffusers' pipeline takes one an image; here its transformer gets the paper's positions (1, ...) and (2, ...)."""
    monkeypatch.setattr(kontext, "SIZES", [(64, 64), (96, 32)])
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for i, (file, size) in enumerate(zip(files, [(64, 64), (32, 96)])):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    layout = Layout(prompt="a boat", steps=2, width=96, height=96, references=tuple(map(str, files)))
    prepared = ours.prepare(layout)
    txt, _, y, _ = prepared.conditioning
    further = prepared.extras.references.tokens[0]
    ids = [image_ids(96, 96), image_ids(64, 64) + torch.tensor([1, 0, 0]), image_ids(96, 32) + torch.tensor([2, 0, 0])]
    more = {"img_ids": torch.cat(ids, dim=1)[0], "txt_ids": text_ids(txt.shape[1])[0], "pooled_projections": y}
    img = pack(noise(96, 96, 1))
    levels = noise_levels(prepared.layout, ours.parts.get("flux").params)
    with torch.inference_mode():
        for t, end in itertools.pairwise(levels):
            both = torch.cat([img, further], dim=1)
            given = {"hidden_states": both, "encoder_hidden_states": txt, "timestep": torch.tensor([t]), **more}
            velocity = theirs.transformer(**given, guidance=torch.tensor([3.5]), return_dict=False)[0]
            img = img + (end - t) * velocity[:, :36]
    assert difference(ours.denoise(prepared, seed=1), unpack(img, 96, 96)) < 1e-4


# ------------------------------------------------------------------------ regions


def alone(flux: Flux, layout: Layout, inside: Tensor, txt: Tensor, img: Tensor, ids: Tensor) -> Tensor:
    """Plain FLUX on a region's tokens, its own prompt and further tokens: all steps of a regional run, written out."""
    x = pack(noise(64, 64, 1)).double().float()[:, inside]
    own = torch.cat([ids, image_ids(64, 64)[:, inside]], dim=1)
    levels = noise_levels(layout, flux.params)
    for t, end in itertools.pairwise(levels):
        both = torch.cat([img, x.double()], dim=1)
        given = both, own, txt, text_ids(TEXT), torch.tensor([t]), PROMPTS.y[:1], GUIDANCE
        x = x + (end - t) * tiny.velocity(flux, *given)[:, -x.shape[1] :].float()
    return x


@pytest.mark.parametrize("base_stream", ["separate", "shared"])
def test_a_region_is_kontext_with_its_own_references(flux, pictures, base_stream):
    """With base_ratio 0 and all blocks masked, its tokens are an image by themselves."""
    left = replace(LEFT, references=(pictures["a"], pictures["wide"]))
    right = replace(RIGHT, references=(pictures["b"],))
    layout = made(left, right, base_ratio=0.0, mask_inject_steps=4, base_stream=base_stream)
    found = pack(latents(flux, layout))
    img = torch.cat([as_latents(pixels_of(pictures[x])) for x in ("a", "wide")], dim=1)
    ids = [image_ids(32, 32) + torch.tensor([1, 0, 0]), image_ids(32, 16) + torch.tensor([2, 0, 0])]
    inside = INSIDE.flatten()
    expected = alone(flux, layout, inside, PROMPTS.regions[:1], img, torch.cat(ids, dim=1))
    assert difference(found[:, inside], expected) < 1e-5


def test_a_base_branch_of_all_weight_is_kontext_with_the_layouts_references(flux, pictures):
    files = (pictures["a"], pictures["wide"])
    regional = made(replace(LEFT, references=(pictures["b"],)), RIGHT, references=files, mask_inject_steps=4)
    parts = [replace(x, base_ratio=1.0) for x in regional.regions]
    found = latents(flux, replace(regional, regions=tuple(parts), base_ratio=1.0))
    assert difference(found, latents(flux, made(references=files))) < 1e-5
    assert difference(found, latents(flux, regional)) > 0.01


@pytest.mark.parametrize("shared", [(), ("b", "wide")], ids=["alone", "beside the layout's"])
def test_a_regions_reference_changes_no_other_token(flux, pictures, shared):
    """To the last bit, with base_ratio 0: nothing leaks through the layout's references, either."""
    keys = {"references": tuple(pictures[x] for x in shared), "base_ratio": 0.0, "mask_inject_steps": 4}
    runs = [latents(flux, made(replace(LEFT, references=(pictures[x],)), RIGHT, **keys)) for x in ("a", "c")]
    assert torch.equal(changed(*runs), INSIDE)


def test_the_layouts_reference_changes_all_tokens_in_all_steps(flux, pictures):
    for ratio, steps in itertools.product((0.0, 0.3), (0, 2, 4)):
        keys = {"base_ratio": ratio, "mask_inject_steps": steps}
        one, other = (latents(flux, made(LEFT, RIGHT, references=(pictures[x],), **keys)) for x in ("a", "c"))
        assert changed(one, other).all(), keys


def test_after_its_steps_a_regions_reference_is_gone(flux, pictures):
    """In plain steps the transformer gets the layout's references alone."""
    seen = []

    def extend(forward, branches):
        def watched(given, step):
            seen.append((step, given.img.shape[1], branches.base_ratio is not None))
            return forward(given, step)

        return watched

    keys = {"references": (pictures["wide"],), "sampler": "heun"}
    found = latents(flux, made(replace(LEFT, references=(pictures["a"],)), RIGHT, **keys), extend)
    assert seen == [(i, 16 + 2 + 4 * (i < 2), i < 2) for i in (0, 0, 1, 1, 2, 2, 3)]
    one = latents(flux, made(replace(LEFT, references=(pictures["c"],)), RIGHT, **keys))
    assert difference(one, found) > 1e-3


def test_a_region_without_steps_does_not_read_its_references(flux, pictures, capsys):
    own = replace(LEFT, references=(pictures["a"],))
    assert read_references(made(own, RIGHT, mask_inject_steps=0)) is None
    assert read_references(made(replace(own, mask_inject_steps=0), RIGHT)) is None
    message = "warning: regions[0].references are unused: none of its steps is regional"
    assert capsys.readouterr().err.splitlines() == [message] * 2
    assert read_references(made(LEFT, RIGHT)) is None


def test_by_the_method_rpg_a_region_has_its_own_and_the_layouts(flux, pictures):
    seen = []

    def extend(forward, branches):
        return lambda given, step: (seen.append((branches.prompt, given.img.shape[1])), forward(given, step))[1]

    right = replace(RIGHT, references=(pictures["a"],))
    layout = made(LEFT, right, references=(pictures["wide"],), method="rpg", steps=2, mask_inject_steps=1)
    latents(flux, layout, extend)
    assert seen == [(1, 18), (2, 22), (3, 18), (0, 18), (0, 18)]


# ------------------------------------------------------------------------ the attention of a step


def kernel(tokens):
    kernels = pytest.importorskip("regional.kernel", reason="Triton is not installed")
    return kernels.kernel_attention(tokens, torch.float32, torch.device("cpu"))


COUNTS = (6, 5, 0, 7)  # tokens of the layout's references, and of three regions'
VARIANTS = {
    "two streams": (True, 2, {}),
    "shared stream": (True, 1, {}),
    "no base branch": (False, 1, {}),
    "open": (False, 1, {"image_attention": "open"}),
    "weights": (True, 2, {"strength": 2.0, "feather": 24.0}),
    "weights, no base branch": (False, 1, {"strength": 0.5, "feather": 24.0}),
    "ratios": (True, 2, {"base_ratio": 0.8}),
}


def attention_of(make, variant: str) -> tuple[ReferenceAttention, Branches]:
    has_base, streams, keys = VARIANTS[variant]
    own = {key: keys[key] for key in keys if key != "image_attention"}
    regions = [replace(LEFT, **own), RIGHT, Region(prompt="c", box=(16, 16, 48, 48))]
    layout = made(*regions, **{key: keys[key] for key in keys if key == "image_attention"})
    tokens, order = region_tokens(layout).sorted()
    bits = tokens.bits(torch.tensor([3, 4, 5, 2]))
    ratio = tokens.mean([region.base_ratio for region in layout.regions] + [0.3]) * has_base
    masked = lambda block: block.index == 0  # noqa: E731
    branches = Branches(bits, order, 8, 0, has_base, streams, ratio, masked, tokens.log_weights())
    further = torch.tensor([EVERY] * COUNTS[0] + [1 << i for i, n in enumerate(COUNTS[1:]) for _ in range(n)])
    return ReferenceAttention(make, branches, further), branches


def qkv(attention: ReferenceAttention, kind: str) -> list[Tensor]:
    """Random (1, 2, L, 32), L by `join`; in the single blocks the layout's references and base image are alike."""
    text = len(attention.bits) - 16 - sum(COUNTS) + attention.text_length
    img = random(1, 16 + sum(COUNTS), 192).float()
    txt = random(1, text, 192, seed=2).float()
    joined = attention.join(txt, img) if kind == "single" else torch.cat([txt, img], dim=1)
    return [x.unflatten(-1, (2, 32)).transpose(1, 2).contiguous() for x in joined.chunk(3, dim=-1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_attention_functions_agree(variant):
    for kind, index in itertools.product(("double", "single"), (0, 1)):
        results = []
        for make in dense_attention, portable_attention, kernel:
            attention, _ = attention_of(make, variant)
            results.append(attention(*qkv(attention, kind), Block(kind, index)))
        assert max(difference(results[0], x) for x in results[1:]) < 2e-6
        assert results[0].std() > 0.1


def test_a_regions_references_are_weighed_like_its_image_tokens_and_weigh_nothing():
    attention, branches = attention_of(dense_attention, "weights")
    tokens = attention.tokens("double", True)
    assert torch.equal(tokens.log_weight[-16:, 1:], branches.log_weights) and not tokens.log_weight[:-16].any()
    columns = tokens.as_key[-16 - sum(COUNTS) : -16].tolist()  # of four prompts', then of their image tokens'
    assert columns == [0] * COUNTS[0] + [4 + 1] * COUNTS[1] + [4 + 3] * COUNTS[3]


def expected_rows(variant: str, kind: str, is_masked: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, row by row, from who each token is: ("text", i), ("base text",), ("shared",), ("own", i),
    ("base image", j) or ("image", j)."""
    attention, branches = attention_of(dense_attention, variant)
    bits = branches.region_bits.tolist()
    regions = [0, 1, 2, 61]
    names = [("text", i) for i, n in zip(regions, (3, 4, 5, 2)) for _ in range(n)]
    names += [("base text",)] * 8 * branches.has_base
    names += [("shared",)] * COUNTS[0] + [("own", i) for i, n in enumerate(COUNTS[1:]) for _ in range(n)]
    if kind == "single" and branches.streams == 2:
        names += [("base image", j) for j in range(16)]
    names += [("image", j) for j in range(16)]
    of_image = [{i for i in regions if bits[-16 + j] >> i & 1} for j in range(16)]
    in_base = {"base text", "shared"}
    if branches.has_base:
        in_base.add("base image" if ("base image", 0) in names else "image")

    def regions_of(name: tuple) -> set[int]:
        kinds = {"text": lambda: {name[1]}, "own": lambda: {name[1]}, "shared": lambda: set(regions)}
        return of_image[name[1]] if name[0] == "image" else kinds.get(name[0], set)()

    def attended(row: int, keys: list[int]) -> Tensor:
        weights = (q[:, :, row : row + 1] @ k[:, :, keys].mT / 32**0.5).softmax(-1)
        return (weights @ v[:, :, keys])[:, :, 0]

    base_keys = [i for i, name in enumerate(names) if name[0] in in_base]
    out = torch.zeros_like(q)
    for row, name in enumerate(names):
        if name[0] in ("base text", "shared", "base image"):
            out[:, :, row] = attended(row, base_keys)
            continue
        mine = regions_of(name) if is_masked else set(regions)
        own = [i for i, key in enumerate(names) if (regions_of(key) if is_masked else set(regions)) & mine]
        own = [i for i in own if names[i][0] in ("text", "shared", "own", "image")]
        out[:, :, row] = attended(row, own)
        if name[0] == "image" and branches.has_base:
            source = names.index(("base image", name[1])) if ("base image", 0) in names else row
            out[:, :, row] = torch.lerp(out[:, :, row], attended(source, base_keys), branches.base_ratio[name[1]])
    return out


@pytest.mark.parametrize("variant", ["two streams", "shared stream", "no base branch", "ratios"])
def test_who_sees_whom(variant):
    """Against the definition in words; the base stream's copy of an image token differs from the regional one."""
    for kind, index in itertools.product(("double", "single"), (0, 1)):
        attention, _ = attention_of(dense_attention, variant)
        q, k, v = (random(*x.shape, seed=i).double() for i, x in enumerate(qkv(attention, kind)))
        found = attention(q, k, v, Block(kind, index))
        assert difference(found, expected_rows(variant, kind, index == 0, q, k, v)) < 1e-6


def test_other_regions_rows_depend_on_a_reference_through_the_base_branch_alone():
    """Its own rows, the prompt and the image tokens of its region change: all others stay, even with a base branch."""
    attention, branches = attention_of(dense_attention, "two streams")
    for kind in "double", "single":
        q, k, v = qkv(attention, kind)
        start = len(branches.region_bits) - 16 + 8 + COUNTS[0]
        before = attention(q, k, v, Block(kind, 0))
        v = v.clone()
        v[:, :, start : start + COUNTS[1]] += 1
        rows = (attention(q, k, v, Block(kind, 0)) != before).any(-1).any(1)[0].nonzero().flatten()
        total = q.shape[2]
        image = [total - 16 + j for j in range(16) if branches.region_bits[-16 + j] & 1]
        assert rows.tolist() == [0, 1, 2, *range(start, start + COUNTS[1]), *image]


@pytest.mark.parametrize("base_ratio, streams", [(0.3, 2), (0.0, 1)])
def test_a_controlnet_adds_to_image_tokens_alone(flux, pictures, monkeypatch, base_ratio, streams):
    """References may have more tokens than the image: 24 here, and it has 16."""
    monkeypatch.setattr(kontext, "SIZES", [(96, 64)])
    net = randomized(ControlNet(ControlNetParams(**dataclasses.asdict(tiny.FLUX))))
    control = LoadedControl(net, random(1, 16, 64), torch.ones(16, 1), Control(model="m", image="i"))
    seen = []

    def extend(forward, branches):
        def watched(given, step):
            def after_block(x, block):
                before = x.clone()
                x = given.after_block(x, block)
                rows = (x != before).any(-1)[0].nonzero().flatten()
                seen.append((step, block.kind, (rows - x.shape[1]).tolist()))
                return x

            return forward(given._replace(after_block=after_block), step)

        return watched

    keys = {"references": (pictures["a"],), "base_ratio": base_ratio, "steps": 2, "mask_inject_steps": 1}
    layout = made(LEFT, RIGHT, **keys)
    own = [extend, encoded(layout).extend, controlnets([control], flux.params, 2, PROMPTS)]
    sample(flux, layout, region_tokens(layout), PROMPTS, 1, by(portable_attention), own)
    regional = [(0, "double", 1)] * 2 + [(0, "single", streams)] * 3
    plain = [(1, "double", 1)] * 2 + [(1, "single", 1)] * 3
    assert seen == [(step, kind, [*range(-16 * count, 0)]) for step, kind, count in regional + plain]


@pytest.mark.parametrize("shared, own", [(1, 0), (1, 2), (0, 4)])
def test_the_room_that_is_counted_on_holds_references(monkeypatch, shared, own):
    """FLUX.1-dev at 1024 x 1024 in bfloat16 with four regions, on the meta device."""
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    monkeypatch.setattr("model.transformer.known_rope", lambda _, shape, *__: empty(1, shape[1], 64, 2).float())
    with torch.device("meta"):
        whole = Flux(FluxParams()).bfloat16().requires_grad_(False)
    regions = tuple(replace(x, references=("x",) * (i < own)) for i, x in enumerate(FOUR))
    layout = replace(DEV, regions=regions, references=("x",) * shared)
    tokens, order = region_tokens(layout).sorted()
    ratio = torch.full((4096,), 0.3)
    branches = Branches(tokens.bits(512), order, 512, 0, True, 2, ratio, lambda block: True)
    bits = torch.tensor([EVERY] * shared + [1 << i for i in range(own)]).repeat_interleave(4096)
    attention = ReferenceAttention(lambda tokens: lambda q, *_: torch.empty_like(q), branches, bits)
    attention.base = attention.base.to("meta")
    monkeypatch.setattr(attention, "tokens", lambda *_: None)
    one = torch.empty(1, device="meta")
    with torch.inference_mode():
        modulation = whole.modulations([1.0], empty(1, 768), one)[0]
        img, img_ids = empty(1, 4096 + len(bits), 64), torch.zeros(1, 4096 + len(bits), 3)
        txt = empty(1, 5 * 512, 4096)
        with LiveBytes() as bytes_:
            whole(img, img_ids, txt, text_ids(5 * 512), modulation, attention, attention.join)
    monkeypatch.setattr(memory, "VALUES_PER_PIXEL", 0)
    counted_on = memory.working_bytes(3072, layout, torch.bfloat16, fp8=False)
    assert bytes_.most < counted_on < 1.5 * bytes_.most


def test_images_end_the_sequence_so_that_controlnets_find_them():
    attention, _ = attention_of(dense_attention, "two streams")
    txt, img = random(1, 22, 4), random(1, 34, 4, seed=2)
    joined = attention.join(txt, img)
    assert torch.equal(joined[:, -32:], torch.cat([img[:, -16:]] * 2, dim=1)) and joined.shape[1] == 22 + 34 + 16


def test_true_guidance_in_one_batch_is_that_of_two_passes(flux, pictures):
    keys = {"references": (pictures["a"],), "true_cfg_scale": 2.0, "negative_prompt": "n"}
    found = []
    for batch in False, True:
        layout = made(replace(LEFT, references=(pictures["wide"],)), RIGHT, **keys, cfg_batch=batch)
        assert negative(layout, None)[0].prompt == "n"
        away = PROMPTS._replace(txt=random(1, TEXT, 32, seed=8), regions=random(3, TEXT, 32, seed=9))
        own = [encoded(layout).extend, true_cfg(flux, layout, away)]
        found.append(sample(flux, layout, region_tokens(layout), PROMPTS, 1, by(portable_attention), own))
    assert difference(*found) < 1e-5


def test_attention_maps_count_references_among_the_keys(flux, pictures):
    """Against the whole matrix of scores."""
    maps = tiny.AttentionMaps(tiny.FLUX.depth, tiny.FLUX.depth_single_blocks)
    sums = []

    def extend(forward, branches):
        def watched(given, step):
            own = given.attention
            start = len(own.bits) - len(own.base_ratio)

            def attention(q, k, v, block):
                tokens = own.tokens(block.kind, True)
                scores = q[0] @ k[0].mT / 32**0.5
                scores += tokens.log_weight[:, tokens.as_key] + tokens.log_weight[:, tokens.as_query].T
                scores[:, tokens.bits[:, None] & tokens.bits == 0] = -torch.inf
                sums.append(scores.softmax(-1)[:, -16:, :start].sum(-1).mean(0)[branches.order.argsort()])
                return own(q, k, v, block)

            return forward(given._replace(attention=attention), step)

        return watched if branches.base_ratio is not None else forward

    left = replace(LEFT, references=(pictures["a"],), feather=24.0)
    layout = made(left, RIGHT, references=(pictures["wide"],), steps=1, mask_inject_steps=1)
    for own in extend, maps.extend:
        latents(flux, layout, own)
    whole = maps.maps.sum(2)[0]  # (groups, L_img), each group of one block
    assert difference(whole, torch.stack(sums)) < 1e-5 and len(sums) == 5
    assert whole.min() > 0.01 and whole.max() < 0.99


# ------------------------------------------------------------------------ the program


@pytest.fixture
def files(tmp_path, pictures) -> Path:
    """A layout with a reference for the whole image and one for a region."""
    text = """\
prompt: a harbor
width: 96
height: 64
steps: 2
mask_inject_steps: 1
seed: 1
references: [a.png]
regions:
  - {prompt: a boat, box: [0, 0, 48, 64], references: [b.png]}
"""
    (tmp_path / "layout.yaml").write_text(text)
    return tmp_path / "layout.yaml"


WAYS = {
    "portable": [],
    "dense": ["--attention", "dense"],
    "offload": ["--offload", "blocks"],
    "bfloat16": ["--dtype", "bfloat16"],
    "fp8": ["--quantize", "fp8"],
}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_a_run_gives_the_same_image_in_all_ways(run, files):
    images = {}
    for name, flags in WAYS.items():
        result = run("--layout", files, "--output", f"{name}.png", *flags)
        assert result.code == 0, result.errors
        images[name] = pixels(files.parent / f"{name}.png")
    for name, limit in {"dense": 1, "offload": 0, "bfloat16": 60, "fp8": 120}.items():
        assert np.abs(images[name] - images["portable"]).max() <= limit, name
    assert run("--layout", files, "--output", "plain.png", "--mask-inject-steps", 0).code == 0
    assert np.abs(pixels(files.parent / "plain.png") - images["portable"]).max() > 2


def test_compiled_blocks_give_the_same_latents(pictures, monkeypatch):
    """Of a regional step, without what needs a C++ compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flux = randomized(Flux(dataclasses.replace(tiny.FLUX, depth=1, depth_single_blocks=1)))
    layout = made(replace(LEFT, references=(pictures["a"],)), RIGHT, references=(pictures["wide"],), steps=1)
    with torch.inference_mode():
        eager = latents(flux, layout)
        flux.compile_blocks()
        assert difference(latents(flux, layout), eager) < 1e-5
    torch._dynamo.reset()


def test_what_goes_with_references(run, files, golden):
    """LoRAs of the whole image, ControlNets, an image to repaint, maps of attention: each changes the picture."""
    models = golden / "models"
    Image.open(files.with_name("a.png")).resize((96, 64)).save(files.with_name("from.png"))
    start = "image: {file: from.png, repaint: {box: [0, 0, 96, 64]}}\n"
    ways = {
        "alone": ([], ""),
        "lora": (["--lora", models / "lora" / "lora_diffusers.safetensors"], ""),
        "controlnet": ([], f"controlnets: [{{model: {models / 'controlnet'}, image: a.png}}]\n"),
        "start": ([], "image: {file: from.png, denoise: 0.5}\n"),
        "repaint": ([], start),
        "heun": (["--sampler", "heun"], ""),
    }
    images = {}
    for name, (flags, more) in ways.items():
        layout = files.with_name(f"{name}.yaml")
        layout.write_text(more + files.read_text())
        flags = [*flags, "--attention-maps", "maps"]
        result = run("--layout", layout, "--output", f"{name}.png", *flags)
        assert result.code == 0, result.errors
        images[name] = pixels(files.parent / f"{name}.png").tobytes()
    assert images.pop("repaint") == images["alone"]  # all of it is drawn anew
    assert len(set(images.values())) == len(images)


REFUSED = {
    "references: [none.png]": "references[0] = none.png: there is no such file.",
    "references: [layout.yaml]": "references[0] = layout.yaml: not an image that can be read",
    "references: a.png": "references",
    "references: [3]": "references[0]",
    "control": "references: do not go with FLUX.1 Fill, Canny, Depth and control LoRAs.",
    "loras": "references: do not go with LoRAs of regions.",
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(run, files, golden, case):
    text = files.read_text()
    if case == "loras":
        lora = golden / "models" / "lora" / "lora_diffusers.safetensors"
        text = text.replace("b.png]", f"b.png], loras: [{{file: {lora}}}]")
    elif case == "control":
        lora = control_lora(files.parent / "control.safetensors", golden)
        text += f"loras: [{{file: {lora}, image: a.png}}]\n"
    else:
        text = text.replace("references: [a.png]", case)
    files.write_text(text)
    result = run("--layout", "layout.yaml")
    assert result.code == 2 and len([x for x in result.errors if x.startswith("generate.py")]) == 1, result.errors
    assert REFUSED[case] in result.errors[-1]


def control_lora(file: Path, golden: Path) -> Path:
    """One that makes img_in read 64 further channels."""
    hidden = 128
    tensors = {"transformer.x_embedder.lora_A.weight": torch.ones(1, 128)}
    tensors["transformer.x_embedder.lora_B.weight"] = torch.ones(hidden, 1)
    return tiny.save(file, tensors)


def test_under_parallel_two_image_streams_are_refused(pictures):
    pipeline = Pipeline("pocket", device="cpu")
    pipeline.parallel = True
    layout = Layout(prompt="a circle", **SHAPE, references=(pictures["a"],), regions=(LEFT,), steps=2)
    with pytest.raises(InputError, match="references need base_stream: shared there, and no ControlNets"):
        pipeline.prepare(layout)
    pipeline.prepare(replace(layout, base_stream="shared"))


def in_parallel(layouts: list[Layout], parallel: Ulysses | None = None) -> list[Tensor]:
    flux = randomized(Flux(tiny.FLUX))
    return [latents(flux, layout, *([parallel.extend] if parallel else [])) for layout in layouts]


def parallel_layouts(a: str, b: str) -> list[Layout]:
    own = replace(LEFT, references=(b,))
    return [made(references=(a,)), made(own, RIGHT, references=(a,), base_stream="shared")]


def test_two_processes_compute_what_one_computes(tmp_path, monkeypatch):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, color in zip(files, ("red", "blue")):
        Image.new("RGB", (9, 9), color).save(file)
    done = torchrun(2, __file__, tmp_path / "latents.safetensors", *files)
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "latents.safetensors")
    monkeypatch.setattr(kontext, "SIZES", [(32, 32)])
    alone = in_parallel(parallel_layouts(*map(str, files)))
    assert all(difference(x, y) < 1e-5 for x, y in zip(together.values(), alone))
    assert len(together) == 2 and difference(*alone) > 1e-3


# ------------------------------------------------------------------------ which model it is


def test_what_says_kontext_is_told_apart(golden, tmp_path, pictures):
    def said(path: Path, *layouts: Layout) -> list[str]:
        return [text.removeprefix(f"{path}") for text in doubts([*layouts], pick("flux", "--flux", path), None)]

    state = tiny.flux_state()
    shape = {"width": 512, "height": 512}
    plain = Layout(prompt="p", **shape)
    having = Layout(prompt="p", **shape, regions=(Region(prompt="a", box=(0, 0, 99, 99), references=("x.png",)),))
    named = tiny.save(tmp_path / "one" / "flux1-kontext-dev.safetensors", state)
    other = tiny.save(tmp_path / "two" / "x.safetensors", state)
    spec = tiny.save(tmp_path / "three" / "x.safetensors", state, {"modelspec.architecture": "flux-1-kontext"})
    folder = tmp_path / "four"
    inner = tiny.save(folder / "transformer" / "x.safetensors", state)
    draws = [" is FLUX.1 Kontext, which without references draws as FLUX.1-dev does."]
    lacks = [" is not FLUX.1 Kontext, which alone has learned to use references."]
    assert said(named, plain) == said(named, having, plain) == draws and said(named, having) == []
    assert said(spec, plain) == draws and said(other, plain, having) == said(inner, plain, having) == []
    for pipeline, text in {"FluxKontextPipeline": draws, "FluxPipeline": []}.items():
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        assert said(inner, plain) == text
    assert said(inner, having) == lacks
    assert is_kontext(pick("flux", "--flux", golden / "models" / "flux-tiny-dev")) is False
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index.json: damaged JSON \("):
        said(inner, plain)


if __name__ == "__main__":
    with torch.inference_mode():
        kontext.SIZES = [(32, 32)]
        together = Ulysses(torch.device("cpu"), tiny.FLUX.num_heads)
        found = in_parallel(parallel_layouts(*sys.argv[2:]), together)
        if together.rank == 0:
            save_file({str(i): x.contiguous() for i, x in enumerate(found)}, sys.argv[1])
        together.close()
