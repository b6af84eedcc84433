"""Other programs' forms of layouts: what each is read as, that regions survive the way there and back, and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from regional.mask import region_tokens
from regional.reader import read_layout
from tools.convert import FORMS, main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """All files of a test are named relative to a folder of its own."""
    monkeypatch.chdir(tmp_path)


def put(files: dict) -> None:
    for name, content in files.items():
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(name)
        else:
            Path(name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def halves(left: tuple, right: tuple, width: int = 32, height: int = 16) -> np.ndarray:
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = left, right
    return picture


def regions(*pairs: tuple[str, dict]) -> list[dict]:
    return [{"prompt": prompt, **shape} for prompt, shape in pairs]


# ------------------------------------------------------------------------------------------------ from each form

PUBLISHED = {
    "base_prompt": "a town",
    "background_prompt": "fields",
    "image_width": 128,
    "image_height": 64,
    "mask_inject_steps": 10,
    "double_inject_blocks_interval": 2,
    "base_ratio": 0.2,
    "0": {"description": "a tree", "mask": [0, 0, 64, 64]},
    "1": {"description": "a house", "mask": [64, 32, 128, 64]},
}
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 128, "height": 64}, {"id": 8, "width": 9, "height": 9}],
    "categories": [{"id": 1, "name": "tree"}, {"id": 18, "name": "house"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [16.5, 8, 47.5, 40]},
        {"id": 2, "image_id": 8, "category_id": 1, "bbox": [0, 0, 9, 9]},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 64, 32], "segmentation": [[0, 0, 64, 0, 64, 32.5]]},
    ],
}
PANOPTIC = {
    "images": [{"id": 3, "width": 32, "height": 16, "caption": "a town"}],
    "categories": [{"id": 1, "name": "tree"}],
    "annotations": [{"image_id": 3, "file_name": "3.png", "segments_info": [{"id": 66348, "category_id": 1}]}],
}
FORGE = [[0, 1, 0, 1, 1], [0.25, 0.5, 0, 0.125, 2], [0, 1, 0.7, 1, 1]]
SAM = {
    "global_caption": "a town",
    "bbox_list": "[[0, 0, 64, 64], [64.5, 0, 128, 32]]",
    "region_captions": "['tree', \"baker's house\"]",
    "width": 128,
    "height": 64,
}
INVOKE = {
    "positive_prompt": "a town",
    "width": 32,
    "height": 16,
    "regions": [
        {"positive_prompt": "a tree", "x_min": 0, "x_max": 16, "y_min": 4, "y_max": 12},
        {"positive_prompt": "a house", "mask": "house.png"},
    ],
}
GRADIO = {
    "image": "photo.png",
    "boxes": [{"xmin": 0, "ymin": 4, "xmax": 16, "ymax": 12, "label": "a tree", "color": [250, 185, 0]}],
}
SEG2ANY = {
    "caption": "a town",
    "seed": 23443,
    "segments_info": [{"color": [0, 128, 0], "text": "a tree"}, {"color": [128, 0, 0], "text": "a house"}],
}
TOWN = {"prompt": "a town", "width": 128, "height": 64}
SMALL = {"prompt": "a town", "width": 32, "height": 16}
TREE_AND_HOUSE = {
    **TOWN,
    "background_prompt": "fields",
    "mask_inject_steps": 10,
    "double_inject_interval": 2,
    "base_ratio": 0.2,
    "regions": regions(("a tree", {"box": [0, 0, 64, 64]}), ("a house", {"box": [64, 32, 128, 64]})),
}

BY_HAND = {
    "published": ("published", {"in": PUBLISHED}, [], TREE_AND_HOUSE),
    "published, as Python, with its pairs apart": (
        "published",
        {
            "in": """{'base_prompt': 'a town', 'image_width': 128, 'image_height': 64,
                'regional_prompt_mask_pairs': {'0': {'description': 'a tree', 'mask': (0, 0, 64, 64)}}}"""
        },
        [],
        TOWN | {"regions": regions(("a tree", {"box": [0, 0, 64, 64]}))},
    ),
    "coco": (
        "coco",
        {"in": COCO},
        ["--image", "7"],
        {
            "prompt": "house, tree",
            "width": 128,
            "height": 64,
            "regions": regions(
                ("house", {"box": [16.5, 8, 64, 48]}), ("tree", {"polygon": [[[0, 0], [64, 0], [64, 32.5]]]})
            ),
        },
    ),
    "coco, only boxes, by file name": (
        "coco",
        {"in": COCO},
        ["--image", "a.jpg", "--boxes"],
        {
            "prompt": "house, tree",
            "width": 128,
            "height": 64,
            "regions": regions(("house", {"box": [16.5, 8, 64, 48]}), ("tree", {"box": [0, 0, 64, 32]})),
        },
    ),
    "coco, panoptic": (  # 66348 = 44 + 256 * 3 + 65536 * 1
        "coco",
        {"in": PANOPTIC, "3.png": halves((44, 3, 1), (0, 0, 0))},
        [],
        SMALL | {"map": "layout.map.png", "regions": regions(("tree", {"color": 66348}))},
    ),
    "forge": (  # x1 x2 y1 y2 weight; the first row is the whole picture
        "forge",
        {"in": FORGE, "in.txt": "a town\n\na tree\na house, red\n"},
        [],
        {
            "prompt": "a town",
            "regions": regions(
                ("a tree", {"box": ["25%", "0%", "50%", "12.5%"], "strength": 2}),
                ("a house, red", {"box": ["0%", "70%", "100%", "100%"]}),
            ),
        },
    ),
    "forge, without a base": (
        "forge",
        {"in": FORGE[1:], "prompts": "a tree\na house\n"},
        ["--beside", "prompts", "--size", "128", "64"],
        {
            "prompt": "a tree, a house",
            "width": 128,
            "height": 64,
            "regions": regions(
                ("a tree", {"box": ["25%", "0%", "50%", "12.5%"], "strength": 2}),
                ("a house", {"box": ["0%", "70%", "100%", "100%"]}),
            ),
        },
    ),
    "rpg, rows": (
        "rpg",
        {"in": "Rows.\nFinal split ratio: 1;1;2\nRegional Prompt: the sky BREAK a roof\nBREAK a wall"},
        [],
        {
            "prompt": "the sky, a roof, a wall",
            "regions": regions(
                ("the sky", {"box": ["0%", "0%", "100%", "25%"]}),
                ("a roof", {"box": ["0%", "25%", "100%", "50%"]}),
                ("a wall", {"box": ["0%", "50%", "100%", "100%"]}),
            ),
        },
    ),
    "rpg, columns after a base prompt": (
        "rpg",
        {"in": "1,3\na town ADDBASE a tree BREAK a house"},
        [],
        {
            "prompt": "a town",
            "regions": regions(
                ("a tree", {"box": ["0%", "0%", "25%", "100%"]}), ("a house", {"box": ["25%", "0%", "100%", "100%"]})
            ),
        },
    ),
    "rpg, a row's height before its columns": (
        "rpg",
        {"in": "Final split ratio: 2,1,1;1,1,2\nRegional Prompt: a BREAK b BREAK c BREAK d"},
        [],
        {
            "prompt": "a, b, c, d",
            "regions": regions(
                ("a", {"box": ["0%", "0%", "50%", "66.666666666%"]}),
                ("b", {"box": ["50%", "0%", "100%", "66.666666666%"]}),
                ("c", {"box": ["0%", "66.666666666%", "33.333333333%", "100%"]}),
                ("d", {"box": ["33.333333333%", "66.666666666%", "100%", "100%"]}),
            ),
        },
    ),
    "layoutsam": (
        "layoutsam",
        {"in": SAM},
        [],
        TOWN | {"regions": regions(("tree", {"box": [0, 0, 64, 64]}), ("baker's house", {"box": [64.5, 0, 128, 32]}))},
    ),
    "layoutsam, the details of the second row": (
        "layoutsam",
        {"in": [SAM, SAM | {"bbox_list": "[[0, 0, 9, 9]]", "detail_region_captions": "['an old tree']"}]},
        ["--image", "1"],
        TOWN | {"regions": regions(("an old tree", {"box": [0, 0, 9, 9]}))},
    ),
    "invokeai": (
        "invokeai",
        {"in": INVOKE, "house.png": halves((255, 255, 255), (0, 0, 0))},
        [],
        SMALL | {"regions": regions(("a tree", {"box": [0, 4, 16, 12]}), ("a house", {"mask": "layout.1.png"}))},
    ),
    "gradio": (
        "gradio",
        {"in": GRADIO, "photo.png": halves((1, 2, 3), (4, 5, 6))},
        [],
        SMALL | {"prompt": "a tree", "regions": regions(("a tree", {"box": [0, 4, 16, 12]}))},
    ),
    "gradio, without its picture": (
        "gradio",
        {"in": GRADIO},
        ["--size", "32", "16"],
        SMALL | {"prompt": "a tree", "regions": regions(("a tree", {"box": [0, 4, 16, 12]}))},
    ),
    "seg2any": (
        "seg2any",
        {"in": SEG2ANY, "in.png": halves((0, 128, 0), (128, 0, 0))},
        [],
        SMALL
        | {
            "seed": 23443,
            "map": "layout.map.png",
            "regions": regions(("a tree", {"color": [0, 128, 0]}), ("a house", {"color": [128, 0, 0]})),
        },
    ),
}


@pytest.mark.parametrize("form, files, options, expected", BY_HAND.values(), ids=BY_HAND)
def test_a_form_is_read_as(form, files, options, expected):
    put(files)
    assert main(["--from", form, "in", "layout.yaml", *options]) == 0
    assert yaml.safe_load(Path("layout.yaml").read_text()) == expected
    assert len(read_layout(Path("layout.yaml"), {}).regions) == len(expected["regions"])


def test_every_form_has_a_hand_made_example():
    assert {form for form, *_ in BY_HAND.values()} == set(FORMS)


def test_the_picture_of_a_form_is_copied_beside_the_layout():
    put({"in": SEG2ANY, "in.png": halves((0, 128, 0), (128, 0, 0))})
    Path("out").mkdir()
    assert main(["--from", "seg2any", "in", "out/layout.yaml"]) == 0
    assert sorted(os.listdir("out")) == ["layout.map.png", "layout.yaml"]
    tokens = region_tokens(read_layout(Path("out/layout.yaml"), {}))
    assert tokens.image_bits.tolist() == [0b01, 0b10]


def test_coco_reads_captions_and_looks_for_panoptic_pictures_in_the_folder_of_the_files_name():
    Path("val").mkdir()
    put({"val.json": PANOPTIC, "val/3.png": halves((0, 0, 0), (44, 3, 1))})
    assert main(["--from", "coco", "val.json", "layout.yaml"]) == 0
    assert region_tokens(read_layout(Path("layout.yaml"), {})).image_bits.tolist() == [1 << 61, 1]


def test_sizes_become_the_nearest_multiples_of_16_and_shapes_are_scaled(capsys):
    # 100 -> 96 and 50 -> 48, both by 0.96; 968 lies between 960 and 976, the lower is taken
    boxes = {"boxes": [{"xmin": 50, "ymin": 25, "xmax": 100, "ymax": 50, "label": "a tree"}]}
    put({"in": boxes, "published": PUBLISHED | {"image_height": 968}})
    assert main(["--from", "gradio", "in", "layout.yaml", "--size", "100", "50"]) == 0
    assert "100 x 50" in (said := capsys.readouterr().err) and "96 x 48" in said
    layout = read_layout(Path("layout.yaml"), {})
    assert (layout.width, layout.height, layout.regions[0].box) == (96, 48, (48, 24, 96, 48))
    assert main(["--from", "published", "published", "published.yaml"]) == 0
    assert read_layout(Path("published.yaml"), {}).height == 960


def test_pictures_are_scaled_with_the_layout():
    put({"in": SEG2ANY, "in.png": halves((0, 128, 0), (128, 0, 0), 40, 39)})
    assert main(["--from", "seg2any", "in", "layout.yaml"]) == 0
    with Image.open("layout.map.png") as picture:
        assert picture.size == (32, 32)
    assert regions_of("layout.yaml")[1] == [0b01, 0b10] * 2


def test_what_lies_outside_of_the_picture_is_cut_off_and_said(capsys):
    put({"in": SAM | {"bbox_list": "[[-3, 0, 64, 64], [64.5, 0, 128.25, 32]]"}})
    assert main(["--from", "layoutsam", "in", "layout.yaml"]) == 0
    assert [region.box for region in read_layout(Path("layout.yaml"), {}).regions] == [
        (0, 0, 64, 64),
        (64.5, 0, 128, 32),
    ]
    said = capsys.readouterr().err
    assert "regions[0]: -3 lies outside" in said and "regions[1]: 128.25 lies outside" in said


def test_what_a_layout_has_no_place_for_is_said(capsys):
    put({"in": PUBLISHED | {"num_samples": 4}, "forge": [[0, 1, 0, 1, 0.5]], "forge.txt": "a town"})
    assert main(["--from", "published", "in", "layout.yaml"]) == 0
    assert "no place for num_samples" in capsys.readouterr().err
    assert main(["--from", "forge", "forge", "forge.yaml"]) == 0
    assert "weight 0.5" in capsys.readouterr().err


def test_what_the_target_has_no_place_for_is_said(capsys):
    put({"layout.yaml": SPLIT + "steps: 9\noverlap: last\n"})
    assert main(["--to", "published", "layout.yaml", "out"]) == 0
    assert capsys.readouterr().err == "convert: published has no place for overlap, regions[2].feather\n"
    assert json.loads(Path("out").read_text())["mask_inject_steps"] == 4  # 40 % of 9, rounded
    assert main(["--to", "gradio", "layout.yaml", "gradio"]) == 0
    assert "gradio has no place for prompt, steps, overlap, regions[2].feather" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ there and back

# borders at 40, 72 and 24, the centres of tokens: they show on which side a border comes out
SPLIT = """
prompt: a town
width: 112
height: 48
regions:
- {prompt: the sky, box: [0, 0, 112, 24]}
- {prompt: a tree, box: [0, 24, 40, 48]}
- {prompt: a house, box: [40, 24, 72, 48], feather: 3}
- {prompt: "a wall, red", box: [72, 24, 112, 48]}
"""
OVERLAPPING = """
prompt: a town
width: 112
height: 48
regions:
- {prompt: the sky, box: [0, 0, 112, 40.5]}
- {prompt: a tree, box: [7.5, 8, 40, 48]}
"""
POLYGONS = """
prompt: a town
width: 112
height: 48
regions:
- {prompt: the sky, polygon: [[0, 0], [112, 0], [56, 40]]}
- {prompt: trees, polygon: [[[0, 8], [40, 48], [0, 48]], [[112, 8], [112, 48], [72, 48]]]}
- {prompt: a house, box: [40, 41, 72, 48]}
"""
PICTURES = """
prompt: a town
width: 64
height: 64
map: map.png
overlap: %s
regions:
- {prompt: a sphere, mask: disc.png}
- {prompt: a field, color: [0, 128, 0]}
- {prompt: a barn, color: "#800000"}
- {prompt: a kite, polygon: [[0, 0], [64, 0], [64, 31]]}
"""
BOXED = ("published", "coco", "forge", "layoutsam", "invokeai", "gradio")


def regions_of(file: str) -> tuple[list[str], list[int]]:
    """The regions' prompts, and which of them each token lies in."""
    layout = read_layout(Path(file), {})
    return [region.prompt for region in layout.regions], region_tokens(layout).image_bits.tolist()


@pytest.mark.parametrize(
    "form, text",
    [(form, text) for form in BOXED for text in (SPLIT, OVERLAPPING)]
    + [("rpg", SPLIT), ("seg2any", SPLIT), ("coco", POLYGONS), ("invokeai", POLYGONS), ("seg2any", POLYGONS)]
    + [(form, PICTURES % rule) for form in ("coco", "invokeai", "seg2any") for rule in ("first", "last")],
)
def test_regions_survive_from_a_layout_to_a_form_and_back(form, text):
    grid = np.add.outer(np.arange(128) - 63.5, 1j * (np.arange(128) - 63.5))
    disc = (255 * (abs(grid) < 40)).astype(np.uint8)  # twice as fine as the layout
    disc[:, :48] = 0  # to 48 / 2 = 24, the centre of a token
    stripes = np.pad(halves((0, 128, 0), (128, 0, 0), 32, 64), ((0, 0), (0, 32), (0, 0)))  # the right half is black
    put({"layout.yaml": text, "disc.png": disc, "map.png": stripes})
    assert main(["--to", form, "layout.yaml", "there.json"]) == 0
    size = ["--size", "112", "48"] if form in ("forge", "rpg") else []
    assert main(["--from", form, "there.json", "back.yaml", *size]) == 0
    if form == "invokeai":  # it has a mask for each region, and no rule for overlaps
        rule = read_layout(Path("layout.yaml"), {}).overlap
        Path("back.yaml").write_text(Path("back.yaml").read_text() + f"overlap: {rule}\n")
    assert regions_of("back.yaml") == regions_of("layout.yaml")


@pytest.mark.parametrize("form, files, options, expected", BY_HAND.values(), ids=BY_HAND)
def test_regions_survive_from_a_form_to_a_layout_and_back(form, files, options, expected):
    put(files)
    assert main(["--from", form, "in", "layout.yaml", *options]) == 0
    assert main(["--to", form, "layout.yaml", "there.json"]) == 0
    size = ["--size", *(str(expected.get(key, 1024)) for key in ("width", "height"))]
    assert main(["--from", form, "there.json", "back.yaml", *(size if form in ("forge", "rpg") else [])]) == 0
    assert regions_of("back.yaml") == regions_of("layout.yaml")


def test_forms_that_hold_all_of_it_come_back_word_for_word():
    put({"published": PUBLISHED, "invokeai": INVOKE, "house.png": halves((255, 255, 255), (0, 0, 0))})
    assert main(["--from", "published", "published", "layout.yaml"]) == 0
    assert main(["--to", "published", "layout.yaml", "again"]) == 0
    defaults = {"guidance_scale": 3.5, "num_inference_steps": 24, "single_inject_blocks_interval": 1}
    assert json.loads(Path("again").read_text()) == PUBLISHED | defaults
    put({"rpg": "Final split ratio: 2,1,1;1,1,2\nRegional Prompt: a town BREAK a BREAK b BREAK c BREAK d\n"})
    assert main(["--from", "rpg", "rpg", "rpg.yaml", "--size", "96", "48"]) == 0
    assert main(["--to", "rpg", "rpg.yaml", "again.txt"]) == 0
    # 96 x 48: heights 32 and 16, columns 48 + 48 and 32 + 64
    assert Path("again.txt").read_text() == Path("rpg").read_text().replace("2,1,1;1,1,2", "32,48,48;16,32,64")


def test_forges_axes_are_x_x_y_y():
    put({"layout.yaml": "prompt: a\nwidth: 64\nheight: 32\nregions: [{prompt: b, box: [16, 8, 64, 24], strength: 2}]"})
    assert main(["--to", "forge", "layout.yaml", "couple.json"]) == 0
    assert json.loads(Path("couple.json").read_text()) == [[0, 1, 0, 1, 1], [0.25, 1, 0.25, 0.75, 2]]
    assert Path("couple.txt").read_text() == "a\nb\n"


def test_cocos_boxes_have_a_width_and_a_height():
    put({"layout.yaml": SPLIT})
    assert main(["--to", "coco", "layout.yaml", "out.json"]) == 0
    wall = json.loads(Path("out.json").read_text())["annotations"][3]
    assert (wall["bbox"], wall["area"]) == ([72, 24, 40, 24], 960)


# ------------------------------------------------------------------------------------------------ refusals


def without(data: dict, key: str) -> dict:
    return {name: value for name, value in data.items() if name != key}


def coco(**annotation) -> dict:
    return COCO | {"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9]} | annotation]}


HOLE = "{prompt: y, polygon: [[[0, 0], [60, 0], [60, 60]], [[30, 10], [50, 10], [50, 30]]]}"
FROM_MISTAKES = {
    "no text": ("published", np.zeros((4, 4), np.uint8), "in.png", "text file"),
    "neither JSON nor Python": ("published", "{'a': open}", "{'a': open}", "neither"),
    "deep nesting": ("coco", "[" * 100000, "[[", "neither"),
    "no mapping": ("published", [1, 2], "[1, 2]", "object"),
    "a pair without a mask": ("published", PUBLISHED | {"0": {"description": "a"}}, "0 = ", "mask is missing"),
    "a pair with three numbers": (
        "published",
        PUBLISHED | {"1": {"description": "a", "mask": [1, 2, 3]}},
        "1.mask = [1, 2, 3]",
        "length 4",
    ),
    "a width of words": ("published", PUBLISHED | {"image_width": "wide"}, "image_width = 'wide'", "int"),
    "an empty box": (
        "published",
        PUBLISHED | {"1": {"description": "a", "mask": [9, 0, 9, 9]}},
        "regions[1].box = [9, 0, 9, 9]",
        "empty",
    ),
    "no size": ("published", without(PUBLISHED, "image_width"), "--size", "the file has none"),
    "a picture too many": ("coco", COCO, "--image: ", "2 of its 2 images"),
    "run-length encoding": (
        "coco --image 7",
        coco(segmentation={"counts": [3], "size": [9, 9]}),
        "annotations[0].segmentation",
        "--boxes",
    ),
    "half a point": ("coco --image 7", coco(segmentation=[[1, 2, 3]]), "annotations[0].segmentation = [[1", "lists of"),
    "no such category": ("coco --image 7", coco(category_id=5), "annotations[0].category_id = 5", "no such category"),
    "no box": ("coco --image 7", coco(bbox=None), "annotations[0].bbox = None", "array"),
    "no panoptic picture": ("coco", PANOPTIC, "map = 3.png", "no such file"),
    "no prompts": ("forge", FORGE, "in.txt", "text file"),
    "a mapping over the edge": ("forge", [[0, 1.5, 0, 1, 1]], "mapping[0][1] = 1.5", "<= 1"),
    "masks in place of a mapping": ("forge", [{"mask": "", "weight": 1}], "mapping[0] = {", "array"),
    "a split of words": ("rpg", "Final split ratio: one;two\nRegional Prompt: a BREAK b", "' one;two'", "numbers"),
    "a split of nothing": ("rpg", "1,0\na BREAK b", "split ratio = '1,0'", "above 0"),
    "more parts than prompts": ("rpg", "1,1,1\na BREAK b", "split ratio = '1,1,1'", "3 parts, for 2 prompts"),
    "a command": ("rpg", "1,1\na ADDCOL b", "ADDCOL", "BREAK"),
    "no ratio": ("rpg", "", "split ratio = ''", "numbers"),
    "more boxes than captions": ("layoutsam", SAM | {"region_captions": "['a']"}, "bbox_list: it has 2", "for 1"),
    "no row": ("layoutsam --image 5", [SAM], "--image 5", "0 of its 1"),
    "boxes of words": ("layoutsam", SAM | {"bbox_list": "['a']"}, "bbox_list[0] = 'a'", "array"),
    "a mask that is not there": ("invokeai", INVOKE, "mask = house.png", "no such file"),
    "a box without an end": (
        "invokeai",
        INVOKE | {"regions": [{"positive_prompt": "a", "x_min": 0, "x_max": 9, "y_min": 0}]},
        "regions[0] = ",
        "y_max is missing",
    ),
    "two sizes": ("layoutsam --size 9 9", SAM, "--size [9, 9]", "128 x 64"),
    "a size of nothing": ("gradio --size 0 9", GRADIO, "size[0] = 0", ">= 1"),
    "no label": ("gradio --size 9 9", {"boxes": [{"xmin": 0}]}, "boxes[0] = {'xmin': 0}", "label is missing"),
    "an empty label": (
        "gradio --size 32 16",
        {"boxes": [GRADIO["boxes"][0] | {"label": ""}]},
        "regions[0].prompt = ''",
        "expected what the region shows",
    ),
    "no map": ("seg2any", SEG2ANY, "in.png", "no such file"),
    "a color that no pixel has": (
        "seg2any --beside map.png",
        SEG2ANY | {"segments_info": [{"color": [1, 2, 3], "text": "a"}]},
        "regions[0].color = [1, 2, 3]: ",
        "of this color",
    ),
    "a color of two": ("seg2any --beside map.png", SEG2ANY | {"segments_info": [{"color": [1, 2], "text": "a"}]},
        "segments_info[0].color = [1, 2]", "length 3"),
}  # fmt: skip
TO_MISTAKES = {
    **{f"polygons to {form}": (form, POLYGONS, "regions[0]: it has a polygon", f"{form} has only boxes")
       for form in ("published", "forge", "rpg", "layoutsam", "gradio")},
    "no split": ("rpg", OVERLAPPING, "regions: their boxes", "no split"),
    "a split with a gap": ("rpg", SPLIT.replace("[72, 24, 112, 48]", "[80, 24, 112, 48]"), "their boxes", "no split"),
    "a prompt that breaks": ("rpg", SPLIT.replace("a tree", "a BREAK tree"), "prompt = 'BREAK'", "rpg"),
    "no base prompt": ("forge", SPLIT.replace("a town", "''"), "prompt = ''", "first line"),
    "an overlap": ("seg2any", OVERLAPPING, "regions[0]: it overlaps", "each pixel can have one"),
    "a region that others hide": (
        "seg2any", OVERLAPPING.replace("[0, 0, 112, 40.5]", "[8, 9, 30, 40]") + "overlap: last", "regions[0]", "under"),
    "a hole": ("coco", f"prompt: x\nwidth: 64\nheight: 64\nregions: [{HOLE}]", "regions[0].polygon", "hole"),
    "less than a pixel": ("invokeai", "prompt: x\nwidth: 64\nheight: 64\nregions: [{prompt: y, box: [1.2, 0, 1.6, 9]}]",
        "regions[0].box = [1.2, 0.0, 1.6, 9.0]", "no pixel"),
    "a layout that is none": ("forge", "promt: x", "promt = 'x'", "did you mean prompt"),
}  # fmt: skip


def sentence_of(capsys) -> str:
    """The one sentence on stderr; nothing was written."""
    *_, sentence = said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("convert: ") for line in said) and sentence.endswith("."), said
    assert not [name for name in os.listdir() if name.startswith((".convert", "layout", "out"))]
    return sentence


@pytest.mark.parametrize("form, content, names, says", FROM_MISTAKES.values(), ids=FROM_MISTAKES)
def test_a_mistake_in_a_form_gets_one_sentence_with_file_key_and_value(form, content, names, says, capsys):
    source = "in.png" if isinstance(content, np.ndarray) else "in"
    put({source: content, "map.png": halves((0, 128, 0), (128, 0, 0))})
    form, *options = form.split()
    assert main(["--from", form, source, "layout.yaml", *options]) == 2
    sentence = sentence_of(capsys)
    starts = tuple(f"convert: {start}" for start in (f"{source}: ", "in.txt: ", "--image", "--size"))
    assert sentence.startswith(starts) and names in sentence and says in sentence, sentence


@pytest.mark.parametrize("form, text, names, says", TO_MISTAKES.values(), ids=TO_MISTAKES)
def test_what_a_form_cannot_hold_is_refused_in_one_sentence(form, text, names, says, capsys):
    put({"in.yaml": text})
    assert main(["--to", form, "in.yaml", "out.json"]) == 2
    sentence = sentence_of(capsys)
    assert sentence.startswith("convert: in.yaml: ") and names in sentence and says in sentence, sentence


def test_polygons_that_cover_each_other_are_read_with_a_warning(capsys):
    put({"in": coco(segmentation=[[0, 0, 64, 0, 64, 64, 0, 64], [32, 0, 96, 0, 96, 64, 32, 64]])})
    assert main(["--from", "coco", "in", "layout.yaml", "--image", "7"]) == 0
    assert "annotations[0]: its polygons overlap" in capsys.readouterr().err
    put({"in": coco(segmentation=[[0, 0, 64, 0, 64, 64, 0, 64], [64, 0, 96, 0, 96, 64, 64, 64]])})
    assert main(["--from", "coco", "in", "layout.yaml", "--image", "7", "--overwrite"]) == 0
    assert "polygons" not in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(capsys):
    put({"in.yaml": SPLIT, "out.txt": "mine", "in": PUBLISHED})
    assert main(["--to", "forge", "in.yaml", "out.json"]) == 2
    assert "out.txt: exists already; --overwrite replaces it." in capsys.readouterr().err
    assert Path("out.txt").read_text() == "mine" and not Path("out.json").exists()
    assert main(["--to", "forge", "in.yaml", "out.json", "--overwrite"]) == 0
    assert Path("out.txt").read_text().startswith("a town\n")


def test_a_target_that_cannot_be_is_named(capsys):
    put({"in.yaml": SPLIT})
    assert main(["--to", "coco", "in.yaml", "gone/out.json"]) == 2
    assert "gone/out.json: there is no folder gone." in capsys.readouterr().err
    assert main(["--to", "seg2any", "in.yaml", "out.png"]) == 2
    assert "out.png: a file that belongs to it" in capsys.readouterr().err
    assert main(["--to", "coco", "gone.yaml", "out.json"]) == 2
    assert "gone.yaml: there is no such layout file." in capsys.readouterr().err
    assert main(["--from", "coco", "gone.json", "out.yaml"]) == 2
    assert "gone.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["in", "out"], ["--from", "coco", "--to", "coco", "in", "out"], ["--to", "x", "a", "b"]]
)
def test_a_command_that_says_no_form_or_two_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "--from" in capsys.readouterr().err
