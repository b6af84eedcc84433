"""Layouts of other programs: how each form is read, that regions survive the round trip, and refusals."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from regional.mask import region_tokens
from regional.reader import read_layout
from tools.convert import FORMS, main, overlapping


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """All files of a test are named relative to a folder of its own."""
    monkeypatch.chdir(tmp_path)


def put(**files) -> None:
    """Write files; "_" in a name stands for "."."""
    for name, content in files.items():
        path = Path(name.replace("_", "."))
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def convert(command: str) -> int:
    return main(command.split())


def read(file: str):
    return read_layout(Path(file), {})


def halves(left: tuple, right: tuple, width: int = 32, height: int = 16) -> np.ndarray:
    image = np.full((height, width, 3), right, dtype=np.uint8)
    image[:, : width // 2] = left
    return image


def regions_of(file: str) -> tuple[list, list[int]]:
    """The regions' prompts and strengths, and which of them each token lies in."""
    layout = read(file)
    regions = [(region.prompt, region.strength) for region in layout.regions]
    return regions, region_tokens(layout).image_bits.tolist()


GREEN, RED, WHITE, BLACK = (0, 128, 0), (128, 0, 0), (255, 255, 255), (0, 0, 0)
TOWN = {"prompt": "a town", "width": 128, "height": 64}
SMALL = {"prompt": "a town", "width": 32, "height": 16}
TREE, HOUSE = {"prompt": "a tree"}, {"prompt": "a house"}
PUBLISHED = {
    "base_prompt": "a town", "background_prompt": "fields", "image_width": 128, "image_height": 64,
    "mask_inject_steps": 10, "double_inject_blocks_interval": 2, "base_ratio": 0.2,
    "0": {"description": "a tree", "mask": [0, 0, 64, 64]},
    "1": {"description": "a house", "mask": [64, 32, 128, 64]},
}  # fmt: skip
AS_PYTHON = """{'base_prompt': 'a town', 'image_width': 128, 'image_height': 64,
    'regional_prompt_mask_pairs': {'0': {'description': 'a tree', 'mask': (0, 0, 64, 64)}}}"""
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 128, "height": 64}, {"id": 8, "width": 9, "height": 9}],
    "categories": [{"id": 1, "name": "a tree"}, {"id": 18, "name": "a house"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [16.5, 8, 47.5, 40]},
        {"id": 2, "image_id": 8, "category_id": 1, "bbox": [0, 0, 9, 9]},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 64, 32], "segmentation": [[0, 0, 64, 0, 64, 32.5]]},
    ],
}  # fmt: skip
COCO_HOUSE = HOUSE | {"box": [16.5, 8, 64, 48]}
PANOPTIC = {
    "images": [{"id": 3, "width": 32, "height": 16, "caption": "a town"}],
    "categories": COCO["categories"],
    "annotations": [{"image_id": 3, "file_name": "3.png", "segments_info": [{"id": 66348, "category_id": 1}]}],
}
FORGE = [[0, 1, 0, 1, 1], [0.25, 0.5, 0, 0.125, 2], [0, 1, 0.7, 1, 1]]  # x0, x1, y0, y1, weight
FORGE_REGIONS = [
    TREE | {"box": ["25%", "0%", "50%", "12.5%"], "strength": 2},
    HOUSE | {"box": ["0%", "70%", "100%", "100%"], "strength": 1},
]
SAM = {
    "global_caption": "a town", "width": 128, "height": 64, "region_captions": "['a tree', \"baker's house\"]",
    "bbox_list": "[[0, 0, 64, 64], [64.5, 0, 128, 32]]",
}  # fmt: skip
SAM_ROWS = [SAM, SAM | {"bbox_list": "[[0, 0, 9, 9]]", "detail_region_captions": "['an old tree']"}]
INVOKE_TREE = {"positive_prompt": "a tree", "x_min": 0, "x_max": 16, "y_min": 4, "y_max": 12}
INVOKE = {
    "positive_prompt": "a town", "width": 32, "height": 16,
    "regions": [INVOKE_TREE, {"positive_prompt": "a house", "mask": "house.png"}],
}  # fmt: skip
GRADIO_BOX = {"xmin": 0, "ymin": 4, "xmax": 16, "ymax": 12, "label": "a tree", "color": [250, 185, 0]}
GRADIO = {"image": "photo.png", "boxes": [GRADIO_BOX]}
GRADIO_LAYOUT = SMALL | {"prompt": "a tree", "regions": [TREE | {"box": [0, 4, 16, 12]}]}
SEGMENTS = [{"color": GREEN, "text": "a tree"}, {"color": RED, "text": "a house"}]
SEG2ANY = {"caption": "a town", "seed": 23443, "segments_info": SEGMENTS}


def split(*boxes: str) -> list[dict]:
    """Regions a, b, c ... with boxes in percent."""
    return [{"prompt": letter, "box": [f"{v}%" for v in box.split()]} for letter, box in zip("abcd", boxes)]


A_THIRD, TWO_THIRDS = "33.333333333", "66.666666666"
BY_HAND = {  # form and options, files, layout
    "published": ("published", {"in": PUBLISHED}, {
        **TOWN, "background_prompt": "fields", "mask_inject_steps": 10, "double_inject_interval": 2, "base_ratio": 0.2,
        "regions": [TREE | {"box": [0, 0, 64, 64]}, HOUSE | {"box": [64, 32, 128, 64]}]}),
    "published, as Python, with its pairs apart": (
        "published", {"in": AS_PYTHON}, TOWN | {"regions": [TREE | {"box": [0, 0, 64, 64]}]}),
    "coco": ("coco --image 7", {"in": COCO}, TOWN | {"prompt": "a house, a tree", "regions": [
        COCO_HOUSE, TREE | {"polygon": [[[0, 0], [64, 0], [64, 32.5]]]}]}),
    "coco, only boxes, by file name": ("coco --image a.jpg --boxes", {"in": COCO}, TOWN | {
        "prompt": "a house, a tree", "regions": [COCO_HOUSE, TREE | {"box": [0, 0, 64, 32]}]}),
    "coco, panoptic": (  # 66348 = 44 + 256 * 3 + 65536 * 1
        "coco", {"in": PANOPTIC, "3_png": halves((44, 3, 1), BLACK)},
        SMALL | {"map": "layout.map.png", "regions": [TREE | {"color": 66348}]}),
    "forge": ("forge", {"in": FORGE, "in_txt": "a town\n\na tree\na house\n"},
        {"prompt": "a town", "regions": FORGE_REGIONS}),
    "forge, without a base": (
        "forge --beside prompts --size 128 64", {"in": FORGE[1:], "prompts": "a tree\na house\n"},
        TOWN | {"prompt": "a tree, a house", "regions": FORGE_REGIONS}),
    "rpg, rows": ("rpg", {"in": "Rows.\nFinal split ratio: 1;1;2\nRegional Prompt: a BREAK b\nBREAK c"},
        {"prompt": "a, b, c", "regions": split("0 0 100 25", "0 25 100 50", "0 50 100 100")}),
    "rpg, columns after a base prompt": ("rpg", {"in": "1,3\na town ADDBASE a BREAK b"},
        {"prompt": "a town", "regions": split("0 0 25 100", "25 0 100 100")}),
    "rpg, a row's height before its columns": (
        "rpg", {"in": "Final split ratio: 2,1,1;1,1,2\nRegional Prompt: a BREAK b BREAK c BREAK d"},
        {"prompt": "a, b, c, d", "regions": split(
            f"0 0 50 {TWO_THIRDS}", f"50 0 100 {TWO_THIRDS}",
            f"0 {TWO_THIRDS} {A_THIRD} 100", f"{A_THIRD} {TWO_THIRDS} 100 100")}),
    "layoutsam, after a byte order mark": ("layoutsam", {"in": "\ufeff" + json.dumps(SAM)}, TOWN | {"regions": [
        TREE | {"box": [0, 0, 64, 64]}, {"prompt": "baker's house", "box": [64.5, 0, 128, 32]}]}),
    "layoutsam, the details of the second row": ("layoutsam --image 1", {"in": SAM_ROWS},
        TOWN | {"regions": [{"prompt": "an old tree", "box": [0, 0, 9, 9]}]}),
    "invokeai": ("invokeai", {"in": INVOKE, "house_png": halves(WHITE, BLACK)}, SMALL | {"regions": [
        TREE | {"box": [0, 4, 16, 12]}, HOUSE | {"mask": "layout.1.png"}]}),
    "gradio": ("gradio", {"in": GRADIO, "photo_png": halves(BLACK, RED)}, GRADIO_LAYOUT),
    "gradio, without its image": ("gradio --size 32 16", {"in": GRADIO}, GRADIO_LAYOUT),
    "seg2any": ("seg2any", {"in": SEG2ANY, "in_png": halves(GREEN, RED)}, SMALL | {
        "seed": 23443, "map": "layout.map.png",
        "regions": [TREE | {"color": list(GREEN)}, HOUSE | {"color": list(RED)}]}),
}  # fmt: skip


@pytest.mark.parametrize("form, files, expected", BY_HAND.values(), ids=BY_HAND)
def test_a_form_is_read_and_its_regions_survive_the_way_back(form, files, expected):
    put(**files)
    assert convert(f"in layout.yaml --from {form}") == 0
    assert yaml.safe_load(Path("layout.yaml").read_text()) == expected
    form = form.split()[0]
    size = f"--size {expected.get('width', 1024)} {expected.get('height', 1024)}" if form in ("forge", "rpg") else ""
    assert convert(f"--to {form} layout.yaml there.json") == 0
    assert convert(f"--from {form} there.json back.yaml {size}") == 0
    assert regions_of("back.yaml") == regions_of("layout.yaml")


def test_images_are_copied_next_to_the_layout_and_panoptic_ones_may_lie_in_a_folder():
    Path("val").mkdir()
    put(**{"val_json": PANOPTIC, "val/3_png": halves(BLACK, (44, 3, 1))})
    Path("out").mkdir()
    assert convert("--from coco val.json out/layout.yaml") == 0
    assert sorted(os.listdir("out")) == ["layout.map.png", "layout.yaml"]
    assert regions_of("out/layout.yaml")[1] == [1 << 61, 1]


def test_sizes_become_multiples_of_16_and_shapes_and_images_are_scaled_and_cut(capsys):
    # 100 -> 96 and 50 -> 48, both by 0.96; 968 lies between 960 and 976, the lower is taken
    boxes = {"boxes": [{"xmin": 50, "ymin": 25, "xmax": 100, "ymax": 50, "label": "a tree"}]}
    put(gradio=boxes, published=PUBLISHED | {"image_height": 968}, map=SEG2ANY, map_png=halves(GREEN, RED, 40, 39))
    put(sam=SAM | {"bbox_list": "[[-3, 0, 64, 64], [64.5, 0, 128.25, 32]]"})
    for command in "gradio gradio a --size 100 50", "published published b", "seg2any map c", "layoutsam sam d":
        assert convert(f"--from {command}") == 0
    assert (read("a").width, read("a").height, read("a").regions[0].box) == (96, 48, (48, 24, 96, 48))
    assert read("b").height == 960
    with Image.open("c.map.png") as image:
        assert image.size == (32, 32) and len(image.getcolors()) == 2
    assert regions_of("c")[1] == [0b01, 0b10] * 2
    assert [region.box for region in read("d").regions] == [(0, 0, 64, 64), (64.5, 0, 128, 32)]
    err = capsys.readouterr().err
    assert "100 x 50 are not multiples of 16: scaled to 96 x 48" in err
    assert "regions[0]: -3 lies outside" in err and "regions[1]: 128.25 lies outside" in err


def test_what_the_other_side_cannot_hold_is_reported(capsys):
    put(**{"in": PUBLISHED | {"num_samples": 4}, "forge": [[0, 1, 0, 1, 0.5]], "forge_txt": "a town"})
    put(layout_yaml=SPLIT + "steps: 9\noverlap: last\n")
    reports = {
        "--from published in a.yaml": "no place for num_samples\n",
        "--from forge forge b.yaml": "no place for its weight 0.5\n",
        "--to published layout.yaml out": "published has no place for overlap, regions[2].feather\n",
        "--to gradio layout.yaml c": "gradio has no place for prompt, steps, overlap, regions[2].feather\n",
        "--to coco layout.yaml d": "coco has no place for steps, overlap, regions[2].feather\n",
    }
    for command, report in reports.items():
        assert convert(command) == 0
        assert report in capsys.readouterr().err
    assert json.loads(Path("out").read_text())["mask_inject_steps"] == 4  # 40 % of 9, rounded
    assert [part["area"] for part in json.loads(Path("d").read_text())["annotations"]] == [2688, 960, 768, 960]


def layout_of(*regions: str, head: str = "width: 112\nheight: 48") -> str:
    return "\n".join(["prompt: a town", head, "regions:", *(f"- {{{region}}}" for region in regions), ""])


# Borders at 40, 72 and 24, the centers of tokens, show on which side a border comes out.
SPLIT = layout_of(
    "prompt: the sky, box: [0, 0, 112, 24]", "prompt: a tree, box: [0, 24, 40, 48]",
    "prompt: a house, box: [40, 24, 72, 48], feather: 3", 'prompt: "a wall, red", box: [72, 24, 112, 48]',
)  # fmt: skip
OVERLAPPING = layout_of("prompt: the sky, box: [0, 0, 112, 40.5]", "prompt: a tree, box: [7.5, 8, 40, 48]")
POLYGONS = layout_of(
    "prompt: the sky, polygon: [[0, 0], [112, 0], [56, 40]]",
    "prompt: trees, polygon: [[[0, 8], [40, 48], [0, 48]], [[112, 8], [112, 48], [72, 48]]]",
    "prompt: a house, box: [40, 41, 72, 48]",
)
ELLIPSES = layout_of("prompt: the sun, ellipse: [3.5, 0, 61, 47]", "prompt: a pond, ellipse: [60%, 25%, 100%, 100%]")
IMAGES = layout_of(
    "prompt: a sphere, mask: disc.png", "prompt: a field, color: [0, 128, 0]", 'prompt: a barn, color: "#800000"',
    "prompt: a kite, polygon: [[0, 0], [64, 0], [64, 31]]",
    head="width: 64\nheight: 64\nmap: map.png\noverlap: %s",
)  # fmt: skip
BOXED = ("published", "coco", "forge", "layoutsam", "invokeai", "gradio")


@pytest.mark.parametrize(
    "form, text",
    [(form, text) for form in BOXED for text in (SPLIT, OVERLAPPING)]
    + [("rpg", SPLIT), ("seg2any", SPLIT), ("coco", POLYGONS), ("invokeai", POLYGONS), ("seg2any", POLYGONS)]
    + [(form, ELLIPSES) for form in ("coco", "invokeai", "seg2any")]
    + [(form, IMAGES % rule) for form in ("coco", "invokeai", "seg2any") for rule in ("first", "last")],
)
def test_regions_survive_from_a_layout_to_a_form_and_back(form, text):
    grid = np.add.outer(np.arange(128) - 63.5, 1j * (np.arange(128) - 63.5))
    disc = (255 * (abs(grid) < 40)).astype(np.uint8)  # twice as fine as the layout
    disc[:, :48] = 0  # to 48 / 2 = 24, the center of a token
    stripes = np.pad(halves(GREEN, RED, 32, 64), ((0, 0), (0, 32), (0, 0)))  # the right half is black
    put(layout_yaml=text, disc_png=disc, map_png=stripes)
    assert convert(f"--to {form} layout.yaml there.json") == 0
    assert convert(f"--from {form} there.json back.yaml {'--size 112 48' * (form in ('forge', 'rpg'))}") == 0
    if form == "invokeai":  # it has a mask for each region, and no rule for overlaps
        rule = read("layout.yaml").overlap
        Path("back.yaml").write_text(Path("back.yaml").read_text() + f"overlap: {rule}\n")
    assert regions_of("back.yaml") == regions_of("layout.yaml")


def test_a_form_gets_prompts_with_the_style_and_a_map_the_highest_order_on_top(capsys):
    regions = "prompt: a, box: [0, 0, 80, 48], order: 1", "prompt: b, box: [40, 0, 112, 48]"
    put(layout_yaml=layout_of(*regions, head="width: 112\nheight: 48\noverlap: last\nstyle: ink"))
    assert convert("--to seg2any layout.yaml there.json") == convert("--from seg2any there.json back.yaml") == 0
    assert regions_of("back.yaml") == ([("a, ink", 1), ("b, ink", 1)], regions_of("layout.yaml")[1])
    assert capsys.readouterr().err == ""


def test_forms_that_hold_all_of_a_layout_come_back_word_for_word():
    plan = "Final split ratio: 2,1,1;1,1,2\nRegional Prompt: a town BREAK a BREAK b BREAK c BREAK d\n"
    put(published=PUBLISHED, rpg=plan)
    assert convert("--from published published layout.yaml") == convert("--to published layout.yaml again") == 0
    defaults = {"guidance_scale": 3.5, "num_inference_steps": 24, "single_inject_blocks_interval": 1}
    assert json.loads(Path("again").read_text()) == PUBLISHED | defaults
    assert convert("--from rpg rpg rpg.yaml --size 96 48") == convert("--to rpg rpg.yaml again.txt") == 0
    # 96 x 48: heights 32 and 16, columns 48 + 48 and 32 + 64
    assert Path("again.txt").read_text() == plan.replace("2,1,1;1,1,2", "32,48,48;16,32,64")


def coco(**annotation) -> dict:
    return COCO | {"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9]} | annotation]}


def pair(**keys) -> dict:
    return PUBLISHED | {"1": {"description": "a"} | keys}


FROM_MISTAKES = [  # form and options, the file in.txt, words of the sentence
    ("published", [1, 2], "the file = [1, 2]: expected object"),
    ("coco", "[" * 100000, "it is neither JSON nor a Python literal"),
    ("coco", "9" * 5000, "it is neither JSON nor a Python literal"),
    ("published", "{'0': {1, 2}}", "it is neither JSON nor a Python literal"),
    ("published", pair(mask=[1, 2, 3, 10**4000]), "1.mask[3] = "),
    ("published", pair(), "1 = {'description': 'a'}: object missing required field mask"),
    ("published", pair(mask=[1, 2, 3]), "1.mask = [1, 2, 3]: expected array of length 4"),
    ("published", PUBLISHED | {"image_width": "wide"}, "image_width = 'wide': expected int"),
    ("published", pair(mask=[9, 0, 9, 9]), "regions[1].box = [9, 0, 9, 9]: the box is empty"),
    ("published", {"base_prompt": "a town"}, "--size: needed, because the file does not state"),
    ("coco", COCO, "--image: 2 of the 2 images match"),
    ("coco --image 7", coco(segmentation={"counts": [3], "size": [9, 9]}), "annotations[0].segmentation: run-length"),
    ("coco --image 7", coco(segmentation=[[1, 2, 3]]), "annotations[0].segmentation = [[1.0, 2.0, 3.0]]: expected"),
    ("coco --image 7", coco(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "annotations[0].segmentation = [["),
    ("coco --image 7", coco(segmentation=[[1, 2] * 50000]), "in.txt: "),
    ("coco --image 7", coco(category_id=5), "annotations[0].category_id = 5: there is no such category"),
    ("coco --image 7", coco(bbox=None), "annotations[0].bbox = None: expected array"),
    ("coco", PANOPTIC, "map = 3.png: there is no such file"),
    ("forge --beside gone.txt", FORGE, "gone.txt: there is no such file"),
    ("forge", FORGE, "mapping: 3 boxes, for 1 prompts"),
    ("forge", FORGE * 21, "expected array of length <= 62"),
    ("forge", [[0, 1.5, 0, 1, 1]], "mapping[0][1] = 1.5: expected float <= 1"),
    ("rpg", "Final split ratio: one;two\nRegional Prompt: a BREAK b", "split ratio = ' one;two': expected numbers"),
    ("rpg", "1,0\na BREAK b", "split ratio = '1,0': expected numbers above 0"),
    ("rpg", "1,1,1\na BREAK b", "split ratio: 3 boxes, for 2 prompts"),
    ("rpg", f"1,{'9' * 5000}\na BREAK b", "split ratio = '1,99"),
    ("rpg", "1," * 200, "it has more than 61 parts"),
    ("rpg", "Final split ratio:" * 60000, "split ratio = 'Final split"),
    ("rpg", f"1,1\na BREAK {'b ' * 200000}", "in.txt: 800,"),
    ("rpg", "1,1\na ADDCOL b", "Regional Prompt = 'ADDCOL': not read"),
    ("layoutsam", SAM | {"region_captions": "['a']"}, "bbox_list: 2 boxes, for 1 prompts"),
    ("layoutsam", SAM | {"bbox_list": "[[0, 0, "}, "bbox_list is neither JSON nor"),
    ("layoutsam --image 5", [SAM], "--image 5: 0 of the 1 images match"),
    ("layoutsam", SAM | {"bbox_list": "['a']"}, "bbox_list[0] = 'a': expected array"),
    ("layoutsam --size 9 9", SAM, "--size [9, 9]: the file's own is 128 x 64"),
    ("invokeai", INVOKE, "mask = house.png: there is no such file"),
    ("invokeai", INVOKE | {"regions": [{"positive_prompt": "a", "x_min": 0}]}, "regions[0].box[1] = None: expected"),
    ("gradio --size 0 9", GRADIO, "size[0] = 0: expected int >= 1"),
    ("gradio --size 9 9", {"boxes": [{"xmin": 0}]}, "boxes[0] = {'xmin': 0}: object missing required field label"),
    ("gradio --size 32 16", {"boxes": [GRADIO_BOX | {"label": ""}]}, "regions[0].prompt = '': expected"),
    ("gradio --size 32 16", {"boxes": [GRADIO_BOX | {"xmax": float("nan")}]}, "regions[0].box[2] = nan: outside"),
    ("seg2any --beside gone.png", SEG2ANY, "segments_info = gone.png: there is no such file"),
    ("seg2any --beside gone.png", SEG2ANY | {"segments_info": [{"color": [1, 2], "text": "a"}]}, "color = [1, 2]: exp"),
    ("seg2any --beside map.png", SEG2ANY | {"segments_info": [{"color": BLACK, "text": "a"}]}, "nothing in the map"),
]
HOLE = "prompt: y, polygon: [[[0, 0], [60, 0], [60, 40]], [[30, 10], [50, 10], [50, 30]]]"
BOXES_ONLY = [form for form in FORMS if form not in ("coco", "invokeai", "seg2any")]
TO_MISTAKES = [
    *((form, POLYGONS, f"regions[0]: {form} has only boxes, no polygon") for form in BOXES_ONLY),
    ("rpg", OVERLAPPING, "regions: their boxes form no split"),
    ("rpg", SPLIT.replace("[72, 24, 112, 48]", "[80, 24, 112, 48]"), "regions: their boxes form no split"),
    ("rpg", SPLIT.replace("a tree", "a BREAK tree"), "prompt = 'BREAK': it is a keyword in rpg"),
    ("forge", SPLIT.replace("a town", "''"), "prompt = '': forge's first line"),
    ("seg2any", OVERLAPPING, "regions[1]: it overlaps another"),
    ("seg2any", OVERLAPPING.replace("[0, 0, 112, 40.5]", "[8, 9, 30, 40]") + "overlap: last", "regions[0]: it has no"),
    ("coco", layout_of(HOLE), "regions[0].polygon: coco fills holes"),
    ("invokeai", layout_of("prompt: y, box: [1.2, 0, 1.6, 9]"), "regions[0].box = [1.2, 0.0, 1.6, 9.0]: there is no"),
    ("forge", "promt: x", "promt = 'x': no such key, did you mean prompt"),
]  # fmt: skip


def is_refused(capsys, command: str, words: str) -> None:
    assert convert(command) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("convert: ") and sentence.endswith(".") and words in sentence, sentence
    assert "in.txt: " in sentence or "gone.txt" in sentence
    assert not [name for name in os.listdir() if name.startswith((".convert", "layout", "out"))]


@pytest.mark.parametrize("form, content, words", FROM_MISTAKES)
def test_a_mistake_in_a_form_gets_one_sentence_with_file_key_and_value(form, content, words, capsys):
    put(in_txt=content, map_png=halves(GREEN, RED))
    is_refused(capsys, f"in.txt layout.yaml --from {form}", words)


def test_only_files_that_end_are_read(capsys):
    os.mkfifo("fifo")
    put(**{"in": FORGE})
    for command in ("coco /dev/zero a", "rpg fifo a", "forge --beside fifo in a", "gradio --beside fifo in a"):
        assert convert(f"--from {command}") == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("form, text, words", TO_MISTAKES)
def test_what_a_form_cannot_hold_is_refused_in_one_sentence(form, text, words, capsys):
    put(in_txt=text)
    is_refused(capsys, f"in.txt out.json --to {form}", words)


def test_polygons_that_cover_each_other_are_read_with_a_warning(capsys):
    for left, is_warned in (32, True), (64, False):
        second = [left, 0, 96, 0, 96, 64, left, 64]
        put(**{"in": coco(segmentation=[[0, 0, 64, 0, 64, 64, 0, 64], second])})
        assert convert("--from coco in layout.yaml --image 7 --overwrite") == 0
        assert ("annotations[0].segmentation: its polygons overlap" in capsys.readouterr().err) == is_warned


def test_many_large_polygons_are_tried_in_little_time_and_memory():
    """One after the other as pixels, they took 7 GB."""
    squares = [[[i, 0], [i + 100, 0], [i + 100, 8192], [i, 8192]] for i in range(0, 8000, 100)]
    tracemalloc.start()
    start = time.process_time()
    assert not overlapping(squares, 8192, 8192)
    assert overlapping([*squares, squares[3]], 8192, 8192)
    assert time.process_time() - start < 2 and tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_a_file_that_exists_or_cannot_be_read_or_written_is_named(capsys):
    put(in_yaml=SPLIT, in_png=halves(RED, RED), out_txt="mine")
    messages = {
        "--to forge in.yaml out.json": "out.txt: exists already; --overwrite replaces it.",
        "--to coco in.yaml in.png/out.json": "in.png/out.json: ",
        "--to seg2any in.yaml out.png": "out.png: a file next to it needs this name",
        "--to coco gone.yaml out.json": "gone.yaml: there is no such file.",
        "--from coco gone.json out.yaml": "gone.json: there is no such file",
        "--from coco in.png out.yaml": "in.png: cannot be read",
    }
    for command, message in messages.items():
        assert convert(command) == 2
        assert f"convert: {message}" in capsys.readouterr().err
    assert Path("out.txt").read_text() == "mine" and not Path("out.json").exists()
    assert convert("--to forge in.yaml out.json --overwrite") == 0
    assert Path("out.txt").read_text().startswith("a town\n")


@pytest.mark.parametrize("command", ["in out", "--from coco --to coco in out", "--to x a b"])
def test_a_command_without_one_known_form_ends_with_2(command, capsys):
    with pytest.raises(SystemExit) as caught:
        convert(command)
    assert caught.value.code == 2 and "--from" in capsys.readouterr().err
