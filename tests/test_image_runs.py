"""Runs with images: made again from their metadata, repainted by region, decoded, checked; and every mistake."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_images import PROMPT, WORSE, models, picture  # noqa: F401, models is a fixture

from regional.layout import Layout, Region, Repaint, Start
from settings import Settings
from tools import metadata
from tools.metadata import keep_timing, read_metadata, read_timings

LEFT = {"prompt": "A red car.", "box": [0, 0, 48, 64]}
RIGHT = {"prompt": "A blue car.", "box": [48, 0, 96, 64]}
SHORT = {"prompt": PROMPT, "steps": 2, "seed": 3, "max_sequence_length": 16, "mask_inject_steps": 1}
SIZE = {"width": 96, "height": 64}


def write(name: str, **keys) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(yaml.safe_dump(SHORT | keys))
    return name


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB")).astype(int)


def made(ran) -> str:
    assert ran.code == 0, ran.errors
    (name,) = ran.made
    return name


@pytest.fixture
def pictures(tmp_path) -> None:
    Path(tmp_path / "in").mkdir()
    picture(96, 64).save(tmp_path / "in" / "a.png")
    picture(101, 67).save(tmp_path / "in" / "odd.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (16, 8, 64, 40))
    mask.save(tmp_path / "in" / "mask.png")


A = {"file": "in/a.png"}
REPLAYED = {
    "image": {"image": A},
    "denoise": {"image": A | {"denoise": 0.5}},
    "box": {"image": A | {"repaint": {"box": ["25%", 0, 80, 32], "feather": 8}}},
    "polygon": {"image": A | {"repaint": {"polygon": [[0, 0], [90, 8], [10, 60]]}}},
    "mask": {"image": A | {"repaint": {"mask": "in/mask.png"}}, "regions": [LEFT, RIGHT]},
    "regions": {"image": A | {"repaint": {"regions": [1]}}, "regions": [LEFT, RIGHT]},
    "regions of masks": {
        "image": A | {"repaint": {"regions": [0]}}, "regions": [{"prompt": "x", "mask": "in/mask.png"}]},
    "odd": {"image": {"file": "in/odd.png", "repaint": {"ellipse": [10, 10, 60, 50]}}},
    "guidance": {**SIZE, "negative_prompt": WORSE, "true_cfg_scale": 2.0, "cfg_batch": True},
    "a region's": {**SIZE, "true_cfg_scale": 2.0, "regions": [LEFT | {"negative_prompt": WORSE}, RIGHT]},
    "canny": {**SIZE, "control_image": "in/a.png", "guidance": 30.0},
    "fill": {"image": A | {"repaint": {"mask": "in/mask.png"}}, "guidance": 30.0},
}  # fmt: skip


@pytest.mark.parametrize("case", REPLAYED)
def test_images_are_made_again_to_the_bit_also_moved_with_their_pictures(run, pictures, models, case):  # noqa: F811
    model = models.get(case, models["dev"])
    flags = ["--layout", write("one/a.yaml", **REPLAYED[case]), "--save-latents", "one/z.safetensors"]
    shutil.copytree("in", "one/in")
    first = made(run(*flags, "--output", "one/out.png", model=model))
    assert run(*flags, "--output", "one/out.png", model=model).errors[-1].startswith("0 generated, 1 kept")
    os.makedirs("two")
    shutil.move("one", "two/three")
    for command in ["--config-from-metadata", "out.png"], ["--decode", "z.safetensors"]:
        again = run(command[0], f"two/three/{command[1]}", "--output", "again.png", "--overwrite", model=model)
        assert np.array_equal(pixels(made(again)), pixels(f"two/three/{Path(first).name}")), command
    assert read_metadata(Path("again.png"))["seed"] == 3


def test_a_picture_that_changed_or_is_gone_is_refused(run, pictures):
    flags = ["--layout", write("a.yaml", **REPLAYED["mask"]), "--save-latents", "z.safetensors"]
    made(run(*flags))
    for name in "in/a.png", "in/mask.png":
        whole = Path(name).read_bytes()
        for problem in "has changed", "is not there any more":
            os.remove(name)
            if problem == "has changed":
                picture(96, 64, seed=1).save(name)
            for command in ["--config-from-metadata", "a.png"], ["--decode", "z.safetensors"]:
                code, _, errors = run(*command, "--output", "b.png")
                assert code == 2 and len(errors) == 1
                assert f"{command[1]}: it was made with image." in errors[0] and problem in errors[0]
        Path(name).write_bytes(whole)


def test_a_region_is_drawn_anew_by_one_command_and_another_one_after_it(run, pictures):
    first = made(run("--layout", write("a.yaml", **SIZE, regions=[LEFT, RIGHT])))
    more = ["--repaint", 1, "--region-prompt", 1, "A green house.", "--denoise", 0.9]
    second = made(run("--config-from-metadata", first, *more))
    assert (first, second) == ("a.png", "a_1.png")
    assert np.array_equal(pixels(first)[:, :48], pixels(second)[:, :48])
    assert np.abs(pixels(first) - pixels(second))[:, 48:].mean() > 2
    found = read_metadata(Path(second))
    assert found["image"] == {"file": "./a.png", "denoise": 0.9, "repaint": {
        "box": None, "ellipse": None, "polygon": None, "mask": None, "regions": [1], "feather": 0.0}}  # fmt: skip
    assert [region["prompt"] for region in found["regions"]] == [LEFT["prompt"], "A green house."]
    again = run("--config-from-metadata", first, *more)
    assert again.made == [second] and again.errors[-1].startswith("0 generated, 1 kept")
    os.remove(first)  # of a repainted image it is not needed to repaint it again
    third = made(run("--config-from-metadata", second, "--repaint", 0, 1, "--seed", 9))
    assert np.abs(pixels(second) - pixels(third)).reshape(64, 2, 48, 3).mean(axis=(0, 2, 3)).min() > 2
    only = made(run("--config-from-metadata", third, "--repaint", 0, "--output", "d.png", "--seed", 2))
    assert np.array_equal(pixels(third)[:, 48:], pixels(only)[:, 48:])
    code, _, (line,) = run("--config-from-metadata", second)
    assert code == 2 and "image.file" in line and "not there any more" in line


def test_flags_for_an_image_replace_the_layouts(run, pictures):
    layout = write("a.yaml", **REPLAYED["box"])
    made(run("--layout", layout, "--image", "in/odd.png", "--denoise", 0.5, "--output", "b.png"))
    found = read_metadata(Path("b.png"))
    assert (found["image"]["file"], found["image"]["denoise"], found["image"]["repaint"]) == ("./in/odd.png", 0.5, None)
    assert (found["width"], found["height"]) == (96, 64)
    made(run("--prompt", PROMPT, "--image", "in/a.png", "--steps", 2, "--seed", 1, "--output", "c.png"))
    assert Image.open("c.png").size == (96, 64)  # the image's size, not the model's


def test_the_same_settings_are_known_by_the_pictures_contents(run, pictures):
    flags = ["--layout", write("a.yaml", **REPLAYED["mask"]), "--output", "a.png"]
    made(run(*flags))
    shutil.copy("in/a.png", "in/same.png")
    write("a.yaml", **REPLAYED["mask"] | {"image": {"file": "in/same.png", "repaint": {"mask": "in/mask.png"}}})
    assert run(*flags).errors[-1].startswith("0 generated, 1 kept")
    picture(96, 64, seed=2).save("in/same.png")
    code, _, errors = run(*flags)
    assert code == 2 and "image.file" in errors[-1] and "--update draws it again" in errors[-1]
    assert run(*flags, "--update").errors[-1].startswith("1 generated")


def test_a_dry_run_counts_the_steps_that_are_run_and_the_passes_of_guidance(run, pictures, capsys):
    keys = REPLAYED["mask"] | {"steps": 10, "mask_inject_steps": "50%", "true_cfg_scale": 2.0}
    keys["image"] = keys["image"] | {"denoise": 0.4}
    code, made, _ = run("--layout", write("a.yaml", **keys), "--check")
    text = " ".join(made)
    assert code == 0 and "steps 1 to 2: regional" in text and "steps 3 to 4: plain" in text
    assert "2.00 times a plain step" in text  # both prompts, in each of them
    assert run("--layout", "a.yaml", "--preview", "p.png").code == 0 and Image.open("p.png").width > 500


def test_timings_are_kept_without_words_and_not_of_what_costs_more(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(metadata.torch.cuda, "max_memory_allocated", lambda: 0)
    start = Start(file="x.png", denoise=0.5, repaint=Repaint(box=(0, 0, 16, 16)))
    region = Region(prompt="a secret", negative_prompt="a secret", box=(0, 0, 64, 64))
    given = Layout(prompt="a secret", negative_prompt="a secret", steps=4, image=start, regions=(region,), **SIZE)
    for cheap in {"steps": 2}, {"image_prompts": ({"file": "x"},)}, {"references": ("x",)}:
        keep_timing(Settings(), metadata.replace(given, **cheap), 1.0)
        assert not read_timings()
    keep_timing(Settings(), given, 1.5)
    (timing,) = read_timings().values()
    assert timing.seconds == 1.5 and timing.layout.run_steps() == 2 and "secret" not in repr(timing.layout)


# ------------------------------------------------------------------------------- mistakes


def of(**keys) -> dict:
    return {**SIZE, **keys}


def repaint(**keys) -> dict:
    return of(image=A | {"repaint": keys}, regions=[LEFT, RIGHT])


MISTAKES = {
    "no file": (of(image={"denoise": 0.5}), "image.file: missing"),
    "a file that is not there": (of(image={"file": "gone.png"}), "image.file = gone.png: there is no such file"),
    "a folder": (of(image={"file": "in"}), "image.file = in: cannot be read"),
    "a text": (of(image={"file": "a.yaml"}), "image.file = a.yaml: not an image"),
    "half a file": (of(image={"file": "half.png"}), "image.file = half.png: not an image"),
    "no mapping": (of(image="in/a.png"), "image = 'in/a.png': expected"),
    "a list": (of(image=[A]), "image = [{'file': 'in/a.png'}]: expected"),
    "an unknown key": (of(image=A | {"strength": 0.5}), "image.strength = 0.5: no such key"),
    "A1111's key": (of(denoising_strength=0.5), "denoising_strength = 0.5: no such key, did you mean image"),
    "denoise 0": (of(image=A | {"denoise": 0}), "image.denoise = 0: expected"),
    "denoise 1.5": (of(image=A | {"denoise": 1.5}), "image.denoise = 1.5: expected"),
    "denoise as text": (of(image=A | {"denoise": "50%"}), "image.denoise = '50%': expected"),
    "no shape": (repaint(), "image.repaint: expected exactly one of box, ellipse, polygon, mask, regions"),
    "feather alone": (repaint(feather=3), "image.repaint: expected exactly one of"),
    "two shapes": (repaint(box=[0, 0, 16, 16], mask="in/mask.png"), "image.repaint: expected exactly one of"),
    "a box outside": (repaint(box=[0, 0, 200, 16]), "image.repaint.box[2] = 200: outside the image"),
    "an empty box": (repaint(box=[16, 0, 16, 16]), "image.repaint.box = [16, 0, 16, 16]: the box is empty"),
    "a box without a pixel": (repaint(box=[3.2, 3.2, 3.7, 60]), "image.repaint: no pixel's center lies in it"),
    "two points": (repaint(polygon=[[0, 0], [9, 9]]), "image.repaint.polygon = [[0, 0], [9, 9]]: expected"),
    "a mask that is not there": (repaint(mask="gone.png"), "image.repaint.mask = gone.png: there is no such file"),
    "an empty mask": (repaint(mask="black.png"), "image.repaint.mask = black.png: nothing in it is white"),
    "a mask of another shape": (repaint(mask="tall.png"), "image.repaint.mask = tall.png: aspect ratio 16 x 64"),
    "regions out of range": (repaint(regions=[0, 2]), "image.repaint.regions = [0, 2]: the layout has 2 regions"),
    "a negative region": (repaint(regions=[-1]), "image.repaint.regions[0] = -1: expected"),
    "no regions": (repaint(regions=[]), "image.repaint.regions = []: the layout has 2 regions"),
    "a negative feather": (repaint(box=[0, 0, 16, 16], feather=-1), "image.repaint.feather = -1: expected"),
    "true_cfg_scale 0.5": (of(true_cfg_scale=0.5), "true_cfg_scale = 0.5: expected"),
    "a number as a negative prompt": (of(negative_prompt=3), "negative_prompt = 3: expected"),
    "a region's negative list": (
        of(regions=[LEFT | {"negative_prompt": ["x"]}]), "regions[0].negative_prompt = ['x']: expected"),
    "cfg_batch as a number": (of(cfg_batch=2), "cfg_batch = 2: expected"),
    "a control image that nothing reads": (of(control_image="in/a.png"), "control_image = in/a.png: only FLUX.1 Canny"),
    "a broken control image": (of(control_image="half.png"), "control_image = half.png: not an image"),
    "fill: no image": (of(), "image: FLUX.1 Fill needs an image, and what to repaint"),
    "fill: nothing to repaint": (of(image=A), "image: FLUX.1 Fill needs an image, and what to repaint"),
    "fill: a control image": (repaint(regions=[0]) | {"control_image": "in/a.png"}, "control_image = in/a.png: only"),
    "canny: no image": (of(), "control_image: FLUX.1 Canny and Depth need an image"),
    "canny: a control LoRA": (
        of(control_image="in/a.png", loras=[{"file": "x", "image": "in/a.png"}]),
        "loras = ['in/a.png']: there can be only one control LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_sentence(run, pictures, models, case):  # noqa: F811
    """Also in a dry run, but for what only pixels tell."""
    keys, sentence = MISTAKES[case]
    Image.new("L", (96, 64)).save("black.png")
    Image.new("L", (16, 64), 255).save("tall.png")
    Path("half.png").write_bytes(Path("in/a.png").read_bytes()[:2000])
    for way in ["--check"], []:
        flags = ["--layout", write("a.yaml", **keys), *way]
        code, images, errors = run(*flags, model=models.get(case.partition(":")[0], models["dev"]))
        if way and case == "a box without a pixel":
            continue
        assert code == 2 and not [name for name in images if name.endswith(".png")]
        (line,) = [line for line in errors if line.startswith("generate.py: ")]
        assert line.startswith(f"generate.py: a.yaml: {sentence}") and line.endswith("."), line


FLAGS = {
    "--denoise goes with": ["--prompt", "x", "--denoise", 0.5],
    "--repaint and --region-prompt go with --config-from-metadata": ["--prompt", "x", "--repaint", 0],
    "--region-prompt go with": ["--layout", "a.yaml", "--region-prompt", 0, "x"],
    "--repaint is of the image of": ["--config-from-metadata", "a.png", "--repaint", 0, "--image", "in/a.png"],
    "--repaint 7: the image has 2 regions": ["--config-from-metadata", "a.png", "--repaint", 7],
    "--repaint -1: the image has 2 regions": ["--config-from-metadata", "a.png", "--repaint", -1],
    "--region-prompt 2: the image has 2": ["--config-from-metadata", "a.png", "--region-prompt", 2, "x"],
    "--region-prompt x: the image has 2": ["--config-from-metadata", "a.png", "--region-prompt", "x", "x"],
    "--region-prompt 1: expected a region's index": ["--config-from-metadata", "a.png", "--region-prompt", 1],
    "--image gone.png: there is no such file": ["--prompt", "x", "--image", "gone.png"],
    "--denoise 2": ["--prompt", "x", "--image", "in/a.png", "--denoise", 2],
    "--denoise": ["--prompt", "x", "--image", "in/a.png", "--denoise", "much"],
    "--control-image in/a.png: only FLUX.1 Canny": ["--prompt", "x", "--control-image", "in/a.png"],
    "--true-cfg-scale 0.5": ["--prompt", "x", "--true-cfg-scale", 0.5],
}


def test_a_mistake_in_flags_gets_one_sentence(run, pictures):
    made(run("--layout", write("a.yaml", **SIZE, regions=[LEFT, RIGHT])))
    for sentence, flags in FLAGS.items():
        code, _, errors = run(*flags, "--output", "b.png")
        line = next(line for line in errors if line.startswith("generate.py: "))
        assert code == 2 and sentence in line and line.endswith("."), (sentence, errors)


PICTURES = [(mode, (1, 1)) for mode in ("RGB", "L", "LA", "P", "I;16", "1", "CMYK")]


@pytest.mark.parametrize("mode, size", [*PICTURES, ("RGB", (20000, 50)), ("RGB", (17, 3000))], ids=str)
def test_images_of_any_mode_and_size_start_a_run(run, tmp_path, mode, size):
    """The layout is of about the image's shape, within what is allowed."""
    Image.new(mode, size).save(tmp_path / ("in.tif" if mode == "CMYK" else "in.png"))
    file = "in.tif" if mode == "CMYK" else "in.png"
    code, _, errors = run("--layout", write("a.yaml", image={"file": file}), "--check")
    assert code == 0, errors


def test_doubts_are_said(run, pictures, models):  # noqa: F811
    without = "negative_prompt has no effect with true_cfg_scale 1"
    for keys in of(negative_prompt="x"), of(regions=[LEFT | {"negative_prompt": "x"}]):
        assert any(without in line for line in run("--layout", write("a.yaml", **keys), "--check").errors)
    guidance = "guidance is 3.5, but FLUX.1 Fill and Canny are made for 30, and Depth for 10."
    for keys, count in (REPLAYED["fill"], 0), ({**REPLAYED["fill"], "guidance": 3.5}, 1):
        ran = run("--layout", write("a.yaml", **keys), "--check", model=models["fill"])
        assert sum(guidance in line for line in ran.errors) == count and ran.code == 0
    Image.open("in/a.png").save("in/lossy.jpg")
    keys = of(image={"file": "in/lossy.jpg", "repaint": {"box": [0, 0, 16, 16]}})
    ran = run("--layout", write("b.yaml", **keys))
    assert any("in/lossy.jpg: a lossless format" in line for line in ran.errors) and ran.code == 0
