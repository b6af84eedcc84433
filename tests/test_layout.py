"""The layout file: what it means, and the sentence that each mistake gets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import MISSING, InputError, InputErrors
from pipeline import Pipeline
from regional.images import read_mask
from regional.layout import FLUX_DEV, Control, Layout, Region
from regional.reader import checked_in_code, read_layout
from tools.flags import naming

GOOD = "prompt: a city\nwidth: 128\nheight: 64\nregions:\n- {prompt: a house, box: [0, 0, 64, 64]}\n"
REGION = Region(prompt="r", box=(0, 0, 64, 64))


@pytest.fixture
def write(tmp_path):
    """Writes layout.yaml and the images that some layouts name."""
    Image.new("L", (128, 64), 255).save(tmp_path / "white.png")
    Image.new("L", (128, 64), 100).save(tmp_path / "gray.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "square.png")
    (tmp_path / "text.png").write_text("not an image")

    def to_file(text: str) -> Path:
        (tmp_path / "layout.yaml").write_text(text)
        return tmp_path / "layout.yaml"

    return to_file


def test_a_layout_is_read_with_the_published_defaults(write):
    layout = read_layout(write(GOOD), {})
    assert (layout.width, layout.height, layout.background_prompt) == (128, 64, "a photo")
    assert (layout.guidance, layout.base_ratio, layout.overlap) == (3.5, 0.3, "share")
    assert (layout.double_inject_interval, layout.single_inject_interval) == (1, 1)
    assert layout.regions[0].box == (0, 0, 64, 64) and layout.resolved(FLUX_DEV).regional_steps() == 10


def test_the_command_line_takes_precedence_and_the_size_is_the_models_where_none_is_given(write):
    layout = read_layout(write(GOOD), {"prompt": "a village", "width": 256, "height": 128})
    assert (layout.prompt, layout.width) == ("a village", 256)
    assert read_layout(None, {"prompt": "a fox"}).regions == ()
    assert read_layout(write("prompt: x"), {}, 256).width == 256
    assert read_layout(write("prompt: x\nwidth: 512"), {}, 256).width == 512


def test_paths_are_relative_to_the_layout_and_those_of_overrides_to_the_working_directory(write, tmp_path):
    layout = read_layout(write(region("mask: white.png")), {})
    assert Path(layout.regions[0].mask) == tmp_path / "white.png"
    lora = read_layout(write(GOOD), {"loras": [{"file": "a/b/c"}]}).loras[0]
    assert lora.file == "a/b/c" and read_layout(write(GOOD + "loras: [{file: a/b/c}]"), {}).loras[0] != lora


def test_json_is_yaml_and_aliases_are_written_out(write):
    assert read_layout(write('{"prompt": "a", "width": 64, "height": 64}'), {}).height == 64
    text = "prompt: x\nregions: [{prompt: a, box: &b [0, 0, 9, 9]}, {prompt: b, box: *b}]"
    assert read_layout(write(text), {}).regions[1].box == (0, 0, 9, 9)


@pytest.mark.parametrize(
    "value, steps, expected",
    [("40%", 24, 10), ("40%", 4, 2), ("12.5%", 4, 1), ("0%", 9, 0), ("100%", 9, 9), (10, 4, 4), (3, 24, 3), (0, 4, 0),
     ("29%", 50, 15)],
)  # fmt: skip
def test_mask_inject_steps_is_a_count_or_a_percentage_rounded_half_up(value, steps, expected):
    layout = Layout(prompt="", mask_inject_steps=value, regions=(REGION,), steps=steps).resolved(FLUX_DEV)
    assert layout.mask_inject_steps == layout.regions[0].mask_inject_steps == expected


def test_without_regions_or_at_base_ratio_1_no_step_is_regional():
    for layout in (Layout(prompt=""), Layout(prompt="", base_ratio=1, regions=(REGION,))):
        assert layout.resolved(FLUX_DEV).regional_steps() == 0


def test_a_resolved_layout_has_nothing_left_to_parse():
    own = Region(prompt="own", box=(0, 0, 9, 9), mask_inject_steps="50%", base_ratio=0.5)
    control = Control(model="a/b", image="c.png", mode="depth")
    layout = Layout(prompt="", double_blocks="0-2, 7", single_inject_interval=20, regions=(REGION, own),
                    controlnets=(control,), region_max_sequence_length="25%")  # fmt: skip
    found = layout.resolved(FLUX_DEV)
    assert (found.steps, found.max_sequence_length, found.region_max_sequence_length) == (24, 512, 128)
    assert found.double_blocks == {0, 1, 2, 7} and found.single_blocks == {0, 20}
    assert [(r.mask_inject_steps, r.base_ratio) for r in found.regions] == [(10, 0.3), (12, 0.5)]
    assert found.controlnets[0].mode == 2 and found.regional_steps() == 12
    assert found.resolved(FLUX_DEV) == found


def test_a_style_is_appended_to_all_prompts_once():
    layout = Layout(prompt="", background_prompt="fog", style="a sketch", regions=(REGION,))
    assert layout.filled(FLUX_DEV).style == "a sketch" and layout.filled(FLUX_DEV).regions == (REGION,)
    for found in (layout.resolved(FLUX_DEV), layout.resolved(FLUX_DEV).resolved(FLUX_DEV)):
        prompts = found.prompt, found.background_prompt, found.regions[0].prompt
        assert prompts == ("a sketch", "fog, a sketch", "r, a sketch")
    layout = Layout(prompt="a {b}", style="{prompt} in {prompt}", regions=(REGION,)).styled()
    assert (layout.prompt, layout.regions[0].prompt, layout.style) == ("a {b} in a {b}", "r in r", "")


IN_CODE = [  # what is not as in a file, and its sentence
    ({"width": 250}, "width = 250: not a multiple of 16, the nearest are 240 and 256."),
    ({"method": "magic"}, "method = 'magic': expected regional, rpg, plain."),
    ({"regions": [Region(prompt="r", box=(0, 0, "half", 9))]}, "regions[0].box[2] = 'half': expected pixels, or"),
    ({"regions": [Region(prompt="r")]}, "regions[0]: no shape, a region needs exactly one of box"),
    ({"regions": [Region(prompt="r", mask=Path("gone.png"))]}, "regions[0].mask = gone.png: there is no such file."),
    ({"mask_inject_steps": 0.4}, "mask_inject_steps = 0.4: expected int | str, got float (regional steps, a cou"),
    ({"preset": "contrl"}, "preset = 'contrl': expected published, control."),
]


@pytest.mark.parametrize("keys, sentence", IN_CODE, ids=[sentence[:20] for _, sentence in IN_CODE])
def test_a_layout_made_in_code_gets_the_sentences_of_a_file(keys, sentence):
    with pytest.raises(InputErrors) as caught:
        checked_in_code(Layout(prompt="x", **keys), 256)
    assert str(caught.value).startswith(sentence)


def test_a_layout_made_in_code_is_read_like_a_file_and_a_file_once(write, monkeypatch):
    box = np.array([0, 16, 64, 32])
    regions = [Region(prompt="r", box=("50%", 0, "100%", "25%")), Region(prompt="s", box=box)]
    found = checked_in_code(Layout(prompt="x", preset="control", regions=regions), 256)
    assert (found.width, found.height, found.base_ratio, found.mask_inject_steps) == (256, 256, 0.1, "80%")
    assert [region.box for region in found.regions] == [(128, 0, 256, 64), (0, 16, 64, 32)]
    assert checked_in_code(Layout(prompt="x", preset="control", base_ratio=0.2, width=64), 256).base_ratio == 0.2
    assert checked_in_code(found, 512) is found
    layout = read_layout(write(region("mask: white.png")))
    monkeypatch.setattr("regional.reader.read_mask", None)  # it would be read again
    assert checked_in_code(layout, 512) is layout


def test_a_pipeline_checks_layouts_and_gives_them_its_models_size():
    pipeline = Pipeline("pocket", device="cpu")
    layout = Layout(prompt="a red circle", preset="control", style="{prompt} on a gray background")
    found = pipeline.prepare(layout).layout
    assert (found.width, found.base_ratio, found.prompt) == (256, 0.1, "a red circle on a gray background")
    with pytest.raises(InputError, match="^width = 250: not a multiple of 16, the nearest are 240 and 256.$"):
        pipeline.prepare(Layout(prompt="a red circle", width=250))


def test_masks_of_16_bits_and_with_transparency(tmp_path):
    """Inside is what is white from the half on, and not transparent."""
    deep = np.array([[300, 32895], [32896, 65535]], dtype=np.uint16)
    clear = np.array([[[255, 255, 255, 0], [255] * 4]], dtype=np.uint8)
    for pixels, inside in (deep, [[False, False], [True, True]]), (clear, [[False, True]]):
        Image.fromarray(pixels).save(tmp_path / "a.png")
        assert read_mask(str(tmp_path / "a.png")).tolist() == inside


def region(rest: str, prompt: str = "y") -> str:
    return f"prompt: x\nwidth: 128\nheight: 64\nregions:\n- {{prompt: {prompt}, {rest}}}"


def mapped(rest: str) -> str:
    return f"map: white.png\n{region(rest)}"


ONE = "{prompt: y, box: [0, 0, 64, 64]}, "
MISTAKES = [  # YAML, and what its sentence has behind the file's name; {at} is the folder
    ("prompt: x\npromt: x", "promt = 'x': no such key, did you mean prompt."),
    (region("box: [0, 0, 9, 9], weight: 2"), "regions[0].weight = 2: no such key, did you mean strength."),
    (region("box: [0, 0, 9, 9], blink: 2"), "regions[0].blink = 2: no such key, known keys are prompt, box, ellipse"),
    ("prompt: x\nweight: 2", "weight = 2: no such key, known keys are prompt, background_prompt"),
    ("prompt: x\ncfg: 7", "cfg = 7: no such key, did you mean guidance."),
    ("prompt: x\ndenoising_strength: 0.4", "denoising_strength = 0.4: no such key, did you mean image."),
    ("width: 64", "prompt: missing."),
    ("prompt: x\nregions:\n- box: [0, 0, 9, 9]", "regions[0].prompt: missing."),
    (region("box: [0, 0, 9, 9]", "' '"), "regions[0].prompt = ' ': expected what the region shows, in words."),
    ('prompt: "\\ud800"', "prompt = '\\ud800': invalid Unicode (unpaired surrogate)."),
    ("prompt: 3", "prompt = 3: expected str, got int ("),
    ("prompt: no", "prompt = False: expected str, got bool (the base prompt); "
     "write it in quotes."),
    (region("box: [0, 0, 140, 64]"), "regions[0].box[2] = 140: outside the image, expected 0 to 128 pixels."),
    (region("box: [-1, 0, 40, 64]"), "regions[0].box[0] = -1: outside the image"),
    (region("box: [40, 0, 40, 64]"), "regions[0].box = [40, 0, 40, 64]: the box is empty, x0 must be smaller"),
    (region("box: [50%, 20, 50%, 40]"), "x0 must be smaller than x1; did you mean [64, 20, 128, 60]."),
    (region("ellipse: [9, 40, 90, 20]"), "ellipse = [9, 40, 90, 20]: the box is empty, y0 must be smaller than "
     "y1; did you mean [9, 40, 99, 60]."),
    (region("box: [9, 40, 90, 30]"), "y0 must be smaller than y1."),
    (region("box: [0, 0, 0.5, 1]"), "regions[0].box = [0, 0, 0.5, 1]: smaller than a pixel; write 50% for 0.5."),
    (region("ellipse: [0, 0, 129, 9]"), "regions[0].ellipse[2] = 129: outside the image, expected 0 to 128 pixels."),
    (region("box: [0, 0, 64]"), "regions[0].box = [0, 0, 64]: expected array of length 4, got 3 (x0, y0, x1, y1"),
    (region("box: [0, 0, .nan, 64]"), "regions[0].box[2] = nan: outside the image"),
    (region("box: [0, 0, a, 64]"), "regions[0].box[2] = 'a': expected pixels, or a percentage such as 25%."),
    (region("box: [0, 0, 9, 9], mask: white.png"), "regions[0]: box and mask, a region needs exactly one of box, elli"),
    (mapped("color: #ffffff}"), "expected the node content, but found '<stream end>'; quote text"),
    (mapped("color: null"), 'exactly one of box, ellipse, polygon, mask, color; "#rrggbb" needs its quotes.'),
    ("prompt: x\nregions: [{prompt: y}]", "regions[0]: no shape, a region needs exactly one of box, ellipse, poly"),
    (region("mask: gone.png"), "regions[0].mask = {at}/gone.png: there is no such file."),
    (region("mask: text.png"), "regions[0].mask = {at}/text.png: not an image that can be read (cannot identify image"),
    (region("mask: ."), "regions[0].mask = {at}: cannot be read (Is a directory)."),
    (region("mask: square.png"), "regions[0].mask = {at}/square.png: aspect ratio 64 x 64 does not match 128 x 64."),
    (region("mask: gray.png"), "regions[0].mask = {at}/gray.png: nothing in it is white, no opaque pixel reaches 128."),
    (region('mask: "a\\0b.png"'), "a\\x00b.png': cannot be read (embedded null byte)."),
    (region("color: 1"), "regions[0].color = 1: a color needs the layout's map, an image, and there is none."),
    (mapped("color: red"), "regions[0].color = 'red': expected \"#rrggbb\", [r, g, b] from 0 to 255, or an index."),
    (mapped("color: [0, 0, 256]"), "regions[0].color[2] = 256: expected int <= 255 (one of the layout's map"),
    (mapped("color: [0, 0]"), "regions[0].color = [0, 0]: expected array of length >= 3 (one of the layout's map"),
    (mapped("color: 16777216"), "regions[0].color = 16777216: expected int <= 16777215 ("),
    (mapped("color: [9, 9, 9]"), "regions[0].color = [9, 9, 9]: nothing in the map is of this color; it has #ffffff."),
    ("map: none.png\n" + GOOD, "map = {at}/none.png: there is no such file."),
    (region("polygon: [[0, 0], [9, 9]]"), "polygon = [[0, 0], [9, 9]]: expected at least three points [x, y], or li"),
    (region("polygon: [[0, 0], [9, 9], [65, 65]]"), "regions[0].polygon[2] = 65: outside the image, expected 0 to 64"),
    (region("box: [0, 0, 101%, 9]"), "regions[0].box[2] = '101%': expected pixels, or a percentage such as 25%."),
    (region("box: [0, 0, 9, 9], strength: -1"), "regions[0].strength = -1: expected float >= 0.0 ("),
    (region("box: [0, 0, 9, 9], feather: .inf"), "regions[0].feather = inf: expected float <= 8192.0 ("),
    (region("box: [0, 0, 9, 9], mask_inject_steps: few"), "regions[0].mask_inject_steps = 'few': expected its own"),
    (region("box: [0, 0, 9, 9], base_ratio: 2"), "regions[0].base_ratio = 2: expected float <= 1.0 ("),
    (f"prompt: x\nregions: [{ONE * 62}]", ": expected array of length <= 61 (at most 61)."),
    ("prompt: x\nwidth: 1000", "width = 1000: not a multiple of 16, the nearest are 992 and 1008."),
    ("prompt: x\nwidth: wide", "width = 'wide': expected int, got str (in pixels, a multiple of 16)."),
    ("prompt: x\nwidth: 0", "width = 0: expected int >= 16 ("),
    ("prompt: x\nsteps: 0", "steps = 0: expected int >= 1 ("),
    ("prompt: x\nbase_ratio: 2", "base_ratio = 2: expected float <= 1.0 ("),
    ("prompt: x\nmask_inject_steps: '40'", "mask_inject_steps = '40': expected regional steps, a count or 40%."),
    ("prompt: x\nmask_inject_steps: 0.4", "mask_inject_steps = 0.4: expected int | str, got float (regional steps, a "
     "count or 40%); write 40%."),
    ("prompt: x\nmask_inject_steps: '.125'", "a count or 40%; write 12.5%."),
    ("prompt: x\nregion_max_sequence_length: 1.0", "write 100%."),
    ("prompt: x\nmask_inject_steps: 10.0", "a count or 40%); write 10."),
    ("prompt: x\nsteps: 20.0", "expected int, got float (denoising steps; default: the model's); write 20."),
    ("prompt: x\nsteps: 20.5", "default: the model's)."),
    (
        region("box: [0, 0, 9, 9], opacity: 0.5"),
        "regions[0].opacity = 0.5: overlap: share has no opacity; write overlap: last.",
    ),
    (region("box: [0, 0, 9, 9], order: 1"), "regions[0].order = 1: overlap: share has no order; write overlap: last."),
    ("prompt: style: a fox", "line 1, column 14: mapping values are not allowed here; quote text with : or # or {."),
    ("prompt: x\nstyle: {prompt} in ink", "expected <block end>, but found '<scalar>'; quote text with : or # or {."),
    (region("box: [0, 0, 9, 9]", "style: a fox"), "expected ',' or '}', but got ':'; quote text with : or # or {."),
    ("prompt: x\nmask_inject_steps: 140%", "mask_inject_steps = '140%': expected regional steps, a count or 40%."),
    ('prompt: x\nmask_inject_steps: "40%\\n"', "mask_inject_steps = '40%\\n': expected regional steps"),
    ("prompt: x\nmask_inject_steps: -1", "mask_inject_steps = -1: expected int >= 0 ("),
    ("prompt: x\nsingle_blocks: all", "single_blocks = 'all': expected \"every 2\", \"0-18\""),
    ("prompt: x\ndouble_inject_interval: 0", "double_inject_interval = 0: expected int >= 1 ("),
    ("prompt: x\noverlap: topmost", "overlap = 'topmost': expected share, last, first, smallest."),
    ("prompt: x\nseed: -1", "seed = -1: expected int >= 0 ("),
    ("prompt: x\nregions: [a]", "regions[0] = 'a': expected a mapping of keys to values."),
    ("prompt: x\nregions:\n\t- prompt: y", "line 3, column 1: found character '\\t' that cannot start any token."),
    ("prompt: x\nwidth: 64\nwidth: 128", "line 3, column 1: the key width is written twice."),
    ("prompt: x\nfoo.bar: 1", "foo.bar = 1: no such key"),
    ("prompt: x\n3: y", "line 2, column 1: invalid key '3'."),
    ("prompt: x\n? [a, b]\n: y", "line 2, column 3: invalid key that is a list."),
    ("prompt: 2024-01-31", "line 1, column 9: 'timestamp' is not a type of layouts; write text in quotes."),
    ("prompt: " + "[" * 3000, "cannot be read as YAML (maximum recursion depth exceeded"),
    ("prompt: a\x00b", "unacceptable character #x0000: special characters are not allowed"),
    ("prompt: !!python/object/apply:os.system [ls]", "line 1, column 9: 'tag:yaml.org,2002:python/object/apply:os."),
    ("- a\n- b", "the layout = ['a', 'b']: expected a mapping of keys to values."),
    ("", "the layout = None: expected a mapping of keys to values."),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", MISTAKES, ids=[expected[:30] for _, expected in MISTAKES])
def test_a_mistake_gets_one_sentence_with_file_key_and_value(write, text, expected):
    file = write(text)
    with pytest.raises(InputError) as caught:
        read_layout(file, {})
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}: ") and sentence.endswith(".") and sentence.isprintable()
    assert expected.replace("{at}", str(file.parent)) in sentence


def test_up_to_ten_mistakes_are_found_at_once(write):
    file = write("promt: x\nwidth: wide\nregions: [{prompt: 3, box: [1]}, {prompt: y, boks: 1}]")
    with pytest.raises(InputErrors) as caught:
        read_layout(file, {})
    lines = str(caught.value).split("\n")
    keys = "prompt", "promt", "width", "regions[0].prompt", "regions[0].box", "regions[1].boks"
    assert [line.removeprefix(f"{file}: ").split(": ")[0].split(" = ")[0] for line in lines] == list(keys)
    shapes = "box: [0, 0, 1, 1]", "ellipse: [9, 9, 9, 9]", "box: [0, 0, 9, 9], order: 2", "mask: gray.png"
    file = write("prompt: x\nwidth: 128\nheight: 64\nregions:\n" + "".join(f"- {{prompt: y, {x}}}\n" for x in shapes))
    with pytest.raises(InputErrors) as caught:
        read_layout(file, {})
    keys = ["regions[0].box", "regions[1].ellipse", "regions[2].order", "regions[3].mask"]
    assert [error.key for error in caught.value.errors] == keys
    regions = "[{prompt: 3, box: [0, 0, 9, 9]}, {prompt: y, box: [0, 0, 1.5x, 9]}, {prompt: y}]"
    file = write(f"prompt: x\nguidance: much\nheight: 250\nregions: {regions}")  # wrong types and wrong values
    with pytest.raises(InputErrors) as caught:
        read_layout(file, {})
    keys = ["guidance", "regions[0].prompt", "height", "regions[1].box[2]", "regions[2]"]
    assert [error.key for error in caught.value.errors] == keys
    file = write(f"prompt: x\nregions: [{'{prompt: y, box: [9, 9, 9, 9]}, ' * 61}]")
    with pytest.raises(InputErrors) as caught:
        read_layout(file, {})
    assert str(caught.value).count("regions[9].box = ") == 1 and len(caught.value.errors) == 10


def test_files_that_are_no_layouts_are_named(tmp_path):
    with pytest.raises(InputError, match="gone.yaml: there is no such file.$"):
        read_layout(tmp_path / "gone.yaml", {})
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png: an image, not a layout; --config-from-metadata"):
        read_layout(tmp_path / "a.png", {})


def test_a_mistake_on_the_command_line_is_named_by_its_flag(write):
    for key, value, flag in [
        ("width", 1000, "--width 1000: not a multiple of 16"),
        ("mask_inject_steps", "all", "--mask-inject-steps all: expected"),
        ("loras", [{"file": "a/b", "scale": 200}], "--lora 200: expected float <= 100"),
        ("controlnets", [{"model": "a/b", "image": "a", "end": 2}], "--control-end 2: expected float <= 1"),
    ]:
        with pytest.raises(InputError) as caught, naming(None, {key: value}):
            read_layout(write(GOOD), {key: value})
        assert str(caught.value).startswith(f"the command line: {flag}")


def test_errors_are_worded_once():
    assert str(InputError("steps", 0, "too few", "a.yaml")) == "a.yaml: steps = 0: too few."
    assert str(InputError("--device", "tpu", "unknown").within("a.yaml")) == "--device tpu: unknown."
    assert str(InputError(Path("a.png"), MISSING, "cut\n off").within("a.yaml")) == "a.png: cut off."
    with pytest.raises(InputError, match="^a.yaml: regions: bad.$"), naming(Path("a.yaml"), {}):
        raise InputError("regions", MISSING, "bad")


def test_a_layout_is_read_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("layouts").mkdir()
    Image.new("L", (64, 64), 255).save("layouts/mask.png")
    Path("layouts/a.yaml").write_text("{prompt: a, width: 64, height: 64, regions: [{prompt: b, mask: mask.png}]}")
    assert read_layout("layouts/a.yaml") == read_layout(Path("layouts/a.yaml"), {}, 128)
