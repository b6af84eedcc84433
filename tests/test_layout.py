"""The layout file: what it means, and the one sentence that each mistake gets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import InputError
from regional.images import read_mask
from regional.layout import Layout, Region
from regional.reader import read_layout

GOOD = """
prompt: a city
width: 128
height: 64
regions:
- prompt: a red house
  box: [0, 0, 64, 64]
"""


@pytest.fixture
def write(tmp_path):
    """Writes layout.yaml and the pictures that some layouts name."""
    Image.new("L", (128, 64), 255).save(tmp_path / "white.png")
    Image.new("L", (128, 64), 100).save(tmp_path / "grey.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "square.png")
    (tmp_path / "text.png").write_text("not a picture")

    def to_file(text: str) -> Path:
        (tmp_path / "layout.yaml").write_text(text)
        return tmp_path / "layout.yaml"

    return to_file


def test_a_layout_is_read_with_the_published_defaults(write):
    layout = read_layout(write(GOOD), {})
    assert (layout.width, layout.height, layout.background_prompt) == (128, 64, "a photo")
    assert (layout.guidance, layout.base_ratio, layout.overlap) == (3.5, 0.3, "share")
    assert (layout.double_inject_interval, layout.single_inject_interval) == (1, 1)
    assert layout.regions[0].box == (0, 0, 64, 64)
    assert layout.regional_steps(24) == 10


def test_the_size_is_the_models_where_nothing_is_said(write):
    assert read_layout(write("prompt: x"), {}, 256).width == 256
    assert read_layout(write("prompt: x\nwidth: 512"), {}, 256).width == 512


def test_the_command_line_wins(write):
    layout = read_layout(write(GOOD), {"prompt": "a village", "width": 256, "height": 128})
    assert (layout.prompt, layout.width) == ("a village", 256)


def test_a_prompt_alone_is_a_layout():
    assert read_layout(None, {"prompt": "a fox"}).regions == ()


def test_mask_paths_are_relative_to_the_layout(write, tmp_path):
    layout = read_layout(write("prompt: x\nwidth: 128\nheight: 64\nregions: [{prompt: y, mask: white.png}]"), {})
    assert Path(layout.regions[0].mask) == tmp_path / "white.png"


def test_json_is_yaml(write):
    assert read_layout(write('{"prompt": "a", "width": 64, "height": 64}'), {}).height == 64


@pytest.mark.parametrize(
    "value, steps, expected",
    [
        ("40%", 24, 10),
        ("40%", 4, 2),
        ("12.5%", 4, 1),
        ("0%", 9, 0),
        ("100%", 9, 9),
        (10, 4, 4),
        (3, 24, 3),
        (0, 4, 0),
        ("29%", 50, 15),
    ],
)
def test_mask_inject_steps_is_a_count_or_a_share_rounded_half_up(value, steps, expected):
    regions = (Region(prompt="r", box=(0, 0, 64, 64)),)
    assert Layout(prompt="", mask_inject_steps=value, regions=regions).regional_steps(steps) == expected


def test_without_regions_or_at_beta_one_no_step_is_regional():
    assert Layout(prompt="").regional_steps(24) == 0
    assert Layout(prompt="", base_ratio=1, regions=(Region(prompt="r", box=(0, 0, 64, 64)),)).regional_steps(24) == 0


def test_a_16_bit_mask_is_inside_from_half_white_on(tmp_path):
    Image.fromarray(np.array([[300, 32895], [32896, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(str(tmp_path / "deep.png")).tolist() == [[False, False], [True, True]]


def test_what_is_transparent_is_outside(tmp_path):
    Image.fromarray(np.array([[[255, 255, 255, 0], [255, 255, 255, 255]]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert read_mask(str(tmp_path / "a.png")).tolist() == [[False, True]]


def region(text: str) -> str:
    return f"prompt: x\nwidth: 128\nheight: 64\nregions:\n- {text}"


MISTAKES = {
    "an unknown key": ("promt: x", "promt = 'x'", "did you mean prompt"),
    "an unknown key of a region": (
        region("{prompt: y, box: [0, 0, 9, 9], weight: 2}"),
        "regions[0].weight = 2",
        "known",
    ),
    "no prompt": ("width: 64", "prompt is missing", ""),
    "a region without prompt": (region("box: [0, 0, 9, 9]"), "regions[0].prompt is missing", ""),
    "an empty region prompt": (region("{prompt: ' ', box: [0, 0, 9, 9]}"), "regions[0].prompt = ' '", "needs a prompt"),
    "half a letter": ('prompt: "\\ud800"', "prompt = '\\ud800'", "surrogate"),
    "a number as prompt": ("prompt: 3", "prompt = 3", "quotes"),
    "no as prompt": ("prompt: no", "prompt = False", "quotes"),
    "a box too wide": (region("{prompt: y, box: [0, 0, 140, 64]}"), "regions[0].box = [0, 0, 140, 64]", "x1 = 140"),
    "a box below zero": (region("{prompt: y, box: [-1, 0, 40, 64]}"), "regions[0].box = [-1, 0, 40, 64]", "x0 = -1"),
    "an empty box": (region("{prompt: y, box: [40, 0, 40, 64]}"), "regions[0].box = [40, 0, 40, 64]", "empty"),
    "a box of three": (region("{prompt: y, box: [0, 0, 64]}"), "regions[0].box = [0, 0, 64]", "length 4"),
    "a box of nan": (region("{prompt: y, box: [0, 0, .nan, 64]}"), "regions[0].box", "x1 = nan"),
    "a box of words": (region("{prompt: y, box: [0, 0, a, 64]}"), "regions[0].box[2] = 'a'", "pixels"),
    "two shapes": (region("{prompt: y, box: [0, 0, 9, 9], mask: white.png}"), "regions[0] has box and mask", "exactly"),
    "no shape": (region("{prompt: y}"), "regions[0] has no shape", "exactly one"),
    "a mask that is not there": (region("{prompt: y, mask: gone.png}"), "gone.png", "no such file"),
    "a mask that is no picture": (region("{prompt: y, mask: text.png}"), "text.png", "not a picture"),
    "a mask that is a folder": (region("{prompt: y, mask: .}"), "regions[0].mask", "not a picture"),
    "a mask of another aspect": (region("{prompt: y, mask: square.png}"), "square.png", "64 x 64"),
    "a mask without white": (region("{prompt: y, mask: grey.png}"), "grey.png", "128"),
    "62 regions": (
        "prompt: x\nregions: [" + "{prompt: y, box: [0, 0, 64, 64]}, " * 62 + "]",
        "62 entries",
        "at most 61",
    ),
    "a width of 1000": ("prompt: x\nwidth: 1000", "width = 1000", "992 and 1008"),
    "a width of words": ("prompt: x\nwidth: wide", "width = 'wide'", "int"),
    "a width of 0": ("prompt: x\nwidth: 0", "width = 0", ">= 16"),
    "no steps": ("prompt: x\nsteps: 0", "steps = 0", ">= 1"),
    "a base ratio of 2": ("prompt: x\nbase_ratio: 2", "base_ratio = 2", "<= 1"),
    "a share without %": ("prompt: x\nmask_inject_steps: '40'", "mask_inject_steps = '40'", "40%"),
    "a share above all": ("prompt: x\nmask_inject_steps: 140%", "mask_inject_steps = '140%'", "40%"),
    "a negative count": ("prompt: x\nmask_inject_steps: -1", "mask_inject_steps = -1", "from 0"),
    "an interval of 0": ("prompt: x\ndouble_inject_interval: 0", "double_inject_interval = 0", ">= 1"),
    "an overlap rule that is none": ("prompt: x\noverlap: topmost", "overlap = 'topmost'", "enum"),
    "a negative seed": ("prompt: x\nseed: -1", "seed = -1", ">= 0"),
    "tabs": ("prompt: x\nregions:\n\t- prompt: y", "line 3", "tab"),
    "a key written twice": ("prompt: x\nwidth: 64\nwidth: 128", "width is written twice", "line 3"),
    "a key with a dot": ("prompt: x\nfoo.bar: 1", "foo.bar = 1", "no such key"),
    "a key that is a number": ("prompt: x\n3: y", "line 2", "'3'"),
    "a key that is a list": ("prompt: x\n? [a, b]\n: y", "line 2", "no word"),
    "a date": ("prompt: 2024-01-31", "line 1: 'timestamp'", "quotes"),
    "deep nesting": ("prompt: " + "[" * 3000, "value", "recursion"),
    "a control character": ("prompt: a\x00b", "#x0000", "not allowed"),
    "a mask with a strange name": (region('{prompt: y, mask: "a\\0b.png"}'), "regions[0].mask", "not a picture"),
    "no mapping": ("- a\n- b", "['a', 'b']", "mapping"),
    "an empty file": ("", "None", "mapping"),
    "a regions entry that is a word": ("prompt: x\nregions: [a]", "regions[0] = 'a'", "object"),
    "a Python object": ("prompt: !!python/object/apply:os.system [ls]", "line 1", "python"),
}


@pytest.mark.parametrize("text, names, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_sentence_with_file_key_and_value(write, text, names, says):
    file = write(text)
    with pytest.raises(InputError) as caught:
        read_layout(file, {})
    sentence = str(caught.value)
    assert str(file) in sentence and names in sentence and says in sentence, sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_a_missing_layout_is_named(tmp_path):
    with pytest.raises(InputError, match="gone.yaml.*no such layout"):
        read_layout(tmp_path / "gone.yaml", {})


def test_a_layout_that_is_a_picture_is_named(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png.*text"):
        read_layout(tmp_path / "a.png", {})


def test_a_mistake_on_the_command_line_is_named_as_such(write):
    with pytest.raises(InputError, match="--width = 1000: not a multiple of 16"):
        read_layout(write(GOOD), {"width": 1000})
    with pytest.raises(InputError, match="--mask-inject-steps = 'all'"):
        read_layout(write(GOOD), {"mask_inject_steps": "all"})
