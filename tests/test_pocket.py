"""The pocket checkpoint and its detector: what is measured with them must mean something."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import generate
import weights
from benchmarks.judge import decoded
from extensions import loading
from extensions.lora_files import read_lora
from extensions.region_lora import can_be_regional
from formats import components
from pocket import adapters, export, from_checkpoint
from pocket.adapters import draw_edges, draw_looks
from pocket.detect import borders_agree, detect, look_of
from pocket.judge import KINDS, drawn, judge, random_case
from pocket.scenes import BACKGROUNDS, COLORS, LOOKS, PATTERNS, Scene, caption, draw, place, random_scene, split
from regional.layout import Layout
from regional.mask import region_tokens
from regional.reader import read_layout
from sampler.flow import pack

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "pocket" / "checkpoint"
ADAPTERS = ROOT / "pocket" / "adapters"


def area_of(picture: np.ndarray, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """The pixels in a box, (H, W) bool."""
    area = np.zeros(picture.shape[:2], dtype=bool)
    area[max(0, y0) : y1, max(0, x0) : x1] = True
    return area


def read_objects(change, seed: int) -> np.ndarray:
    """Share of 80 objects, four to a picture, whose (colour, pattern, shape) the detector reads after `change`."""
    rng, right = np.random.default_rng(seed), []
    for _ in range(20):
        scene = random_scene(rng, 256, 256, 4)
        picture = change(draw(scene))
        for thing in scene.things:
            (x, y), (rx, ry) = thing.center, thing.radius
            area = area_of(picture, x - rx - 3, y - ry - 3, x + rx + 3, y + ry + 3)
            seen = detect(picture, area) or (None,) * 3
            right.append([thing.color == seen[0], thing.pattern == seen[1], thing.shape == seen[2]])
    return np.array(right, dtype=float).mean(0)


@pytest.fixture(scope="module")
def through_the_autoencoder():
    """A picture as it is after encoding and decoding."""
    model = components.load(weights.find("pocket").ae, "cpu", torch.float32)
    return partial(decoded, model=model)


def test_the_detector_reads_what_was_drawn_and_the_autoencoder_keeps_it(through_the_autoencoder):
    color, pattern, shape = read_objects(np.asarray, seed=0)
    assert color == pattern == 1 and shape > 0.97
    color, pattern, shape = read_objects(through_the_autoencoder, seed=1)
    assert color > 0.95 and pattern > 0.97 and shape > 0.9
    assert not any(detect(draw(Scene(96, 96, background, ()))) for background in BACKGROUNDS)


def seen_looks(look: str | None, change, boxes: list[tuple[int, ...]], scenes: int) -> list[str | None]:
    """What the detector says of objects drawn with a look, in every color and pattern by turns, after `change`."""
    rng, combinations, seen = np.random.default_rng(0), list(itertools.product(COLORS, PATTERNS)), []
    shapes = ["circle", "square", "triangle", "diamond", "star", "heart"]
    for i in range(scenes):
        looks = [(*combinations[(i * len(boxes) + j) % 40], str(rng.choice(shapes))) for j in range(len(boxes))]
        things = tuple(place(rng, *each) for each in zip(looks, boxes))
        width, height = boxes[-1][2:]
        scene = Scene(width, height, list(BACKGROUNDS)[i % 4], things)
        picture = change(draw_looks(scene, [look] * len(boxes)))
        seen += [look_of(picture, area_of(picture, *box)) for box in boxes]
    return seen


FOUR_BOXES = [(0, 0, 112, 128), (112, 0, 256, 128), (0, 128, 128, 256), (128, 128, 256, 256)]


@pytest.mark.parametrize("look", [*LOOKS, None])
def test_the_detector_tells_the_looks_apart_and_the_autoencoder_keeps_them(look, through_the_autoencoder):
    for boxes, scenes in ([(0, 0, 96, 96)], 80), (FOUR_BOXES, 30):
        assert set(seen_looks(look, np.asarray, boxes, scenes)) == {look}
    assert np.mean([s == look for s in seen_looks(look, np.asarray, [(0, 0, 64, 64)], 80)]) > 0.95
    assert np.mean([s == look for s in seen_looks(look, through_the_autoencoder, FOUR_BOXES, 10)]) > 0.85


def test_borders_agree_where_the_same_objects_are():
    scene, other = (random_scene(np.random.default_rng(seed), 256, 256, 4) for seed in (0, 1))
    assert borders_agree(draw(scene), draw(scene)) == 1 > 0.6 > borders_agree(draw(scene), draw(other))
    moved = np.roll(draw(scene), 2, axis=1)
    assert borders_agree(moved, draw(scene)) > 0.95 > 0.3 > borders_agree(draw(scene), draw_edges(scene) * 0)


def test_the_checkpoint_and_its_adapters_are_small_and_in_official_layouts():
    base = weights.find("pocket")
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 12e6
    assert base.flux.key_names.name == "BFL" and base.ae.key_names.name == "diffusers"
    assert "decoder.mid_block.attentions.0.to_q.weight" in safe_open(base.ae.path, "pt").keys()
    parts = {part: components.on_meta(getattr(base, part)) for part in ("flux", "t5", "clip")}
    for look in LOOKS:
        lora = read_lora(ADAPTERS / f"{look}.safetensors", parts)
        assert lora.changes["flux"] and not lora.unknown and all(map(can_be_regional, lora.changes["flux"]))
    loading.check_base(loading.find_controlnet(str(ADAPTERS / "edges")), base.flux)
    assert all(file.stat().st_size < 2e6 for file in ADAPTERS.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_says_yes_to_what_was_asked_for(kind, tmp_path):
    for seed in range(5):
        case = random_case(seed, 4, kind, tmp_path)
        seen = judge(drawn(case), case)
        assert seen["both"] == 1 and seen["duplicates"] == 0 and seen["leakage"] < 0.1
        assert not seen["background"] < 0.9 and not seen["visible"] > 0.1 and seen["coherence"] < 2


def test_leaks_duplicates_seams_and_what_is_wrong_are_seen():
    """The judge must be able to say no: also to the picture of other looks in the same places."""
    case, other = random_case(0, 4), random_case(1, 4)
    right = [w[:2] == o[:2] for w, o in zip(case.wanted, other.wanted)]
    assert judge(drawn(case._replace(wanted=other.wanted)), case)["both"] == np.mean(right) < 1
    case = random_case(3, 4)
    good = judge(drawn(case), case)
    turned = case._replace(wanted=case.wanted[1:] + case.wanted[:1])
    assert judge(drawn(turned), case)["leakage"] > 0.4 > 0.1 > good["leakage"]
    same = case._replace(wanted=case.wanted[:1] * 4)
    assert judge(drawn(same), case)["duplicates"] == 3 / 4
    elsewhere = next(name for name in BACKGROUNDS if name != case.background)
    assert judge(drawn(case._replace(background=elsewhere)), case)["background"] < 0.1 < 0.9 < good["background"]
    shaded = drawn(case).astype(int)
    shaded[case.areas[0]] += 12 * (-1 if case.background == "white" else 1)
    shaded = judge(shaded.clip(0, 255).astype(np.uint8), case)
    assert shaded["visible"] > 0.2 > good["visible"] == 0 and shaded["coherence"] > good["coherence"] + 2
    assert shaded["seams"] > good["seams"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [1, 4, 8, 16])
def test_random_cases_are_what_their_kind_says(kind, regions, tmp_path):
    for seed in range(5):
        case = random_case(seed, regions, kind, tmp_path)
        tokens = region_tokens(case.layout)
        assert len(case.wanted) == len(case.areas) == regions and not tokens.warnings
        for i, area in enumerate(case.areas):  # the layout's regions are the areas that are judged
            inside = (tokens.image_bits.reshape(16, 16) >> i & 1).bool().numpy()
            assert (inside == area[8::16, 8::16]).all()
        if regions > 1:
            assert (case.areas.sum(0) > 1).any() == ("overlapping" in kind)
        alone = case.areas & (case.areas.sum(0) == 1)
        assert alone.sum((1, 2)).min() > 400


def test_a_caption_names_everything_and_a_canvas_is_split_without_rest():
    scene = random_scene(np.random.default_rng(3), 256, 256, 3)
    text = caption(np.random.default_rng(0), scene, keep_background=1)
    assert all(thing.caption in text for thing in scene.things) and scene.background in text
    boxes = split(np.random.default_rng(0), 256, 128, 5)
    assert sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes) == 256 * 128


EXAMPLES = [ROOT / "layout.yaml", *sorted(ROOT.glob("examples/*.yaml"))]


def generated(layout: Path, output: Path, *flags: str) -> tuple[Layout, np.ndarray]:
    """What the file says, and the picture."""
    assert generate.main(["--layout", str(layout), *flags, "--device", "cpu", "--output", str(output)]) == 0
    return read_layout(layout, {}, size=256), np.asarray(Image.open(output))


@pytest.mark.parametrize("layout", EXAMPLES, ids=[file.stem for file in EXAMPLES])
def test_every_example_runs(layout, tmp_path):
    """With the pocket model, and for flux_dev.yaml at its own size, in two steps."""
    written, picture = generated(layout, tmp_path / "picture.png", "--steps", "2")
    assert picture.shape == (written.height, written.width, 3)


@pytest.mark.published
def test_every_region_of_the_starter_layout_shows_what_its_prompt_says(tmp_path):
    written, picture = generated(ROOT / "layout.yaml", tmp_path / "picture.png")
    for region in written.regions:
        seen = detect(picture, area_of(picture, *map(int, region.box)))
        assert seen and seen.color in region.prompt and seen.pattern in region.prompt, (region.prompt, seen)


def test_a_look_trains_every_layer_that_its_lora_adapts():
    model, rng = adapters.Model(), np.random.default_rng(0)
    scene, boxes = adapters.scene_with_boxes(rng, 64, 64, 1)
    picture, acts = adapters.with_look("barred")(rng, scene, boxes)
    img = pack(model.encode([picture]))
    batch = model.batch(rng, [adapters.Pool(64, 64, 1, [scene], img, torch.from_numpy(acts)[None].float())])
    lora = adapters.LoRA(model.flux)
    lora.act_on(torch.ones(1, batch.txt.shape[1], 1), torch.ones(1, batch.noisy.shape[1], 1))
    (model.velocity(batch, adapters.any_guidance(batch)) - batch.target).square().mean().backward()
    assert all(up.grad.any() for up in lora.up.values())


def test_a_run_from_the_checkpoint_exports_the_same_files(tmp_path):
    from_checkpoint.begin(CHECKPOINT, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "again")
    files = [file.relative_to(CHECKPOINT) for file in CHECKPOINT.rglob("*") if file.is_file()]
    files.remove(Path("training.log"))
    assert len(files) == 11
    for file in files:
        first, again = CHECKPOINT / file, tmp_path / "again" / file
        if file.suffix != ".safetensors":
            assert first.read_bytes() == again.read_bytes(), file
            continue
        with safe_open(first, "pt") as one, safe_open(again, "pt") as other:  # the order of the metadata may differ
            assert one.metadata() == other.metadata() and set(one.keys()) == set(other.keys())
            assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())
