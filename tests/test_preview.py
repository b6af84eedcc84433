"""What a layout looks like and costs before anything is generated, and the schema of its file."""

import dataclasses
import json
import re
import runpy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from errors import InputError
from extensions.rpg import composed
from model.transformer import Flux, FluxParams
from regional.attention import portable_attention
from regional.layout import Layout
from regional.mask import region_tokens
from regional.reader import read_layout
from regional.sampling import Conditioning, by, sample
from tools.cost import evaluations, forward_flops, plain_flops, resolved, stages
from tools.preview import COLORS, GAP, LINE, details, grid_tokens, innermost, preview, report
from tools.schema import json_schema

ROOT = Path(__file__).parent.parent
EXAMPLES = [ROOT / "layout.yaml", *sorted((ROOT / "examples").glob("*.yaml"))]
COLOR = [tuple(color) for color in COLORS.tolist()]
GRAY = COLOR[61]
TOP = 2 * LINE + 2 * GAP
HALF = {"box": [0, 0, 128, 256]}


def layout(*regions: dict, **keys) -> Layout:
    """A layout of 256 x 256 pixels, 16 x 16 tokens of 64 drawn pixels, unless it says otherwise."""
    written = [{"prompt": f"thing {i}", **region} for i, region in enumerate(regions)]
    return read_layout(None, {"prompt": "a scene", "regions": written, **keys}, 256)


def canvas(of: Layout) -> np.ndarray:
    """The tokens without heading and legend: (tokens down, tokens across, cell, cell, 3)."""
    h, w = of.height // 16, of.width // 16
    cell = round(1024 / max(h, w))
    drawn = np.asarray(preview(of))[TOP : TOP + h * cell, GAP : GAP + w * cell]
    return drawn.reshape(h, cell, w, cell, 3).swapaxes(1, 2)


def most(cell: np.ndarray) -> tuple[int, ...]:
    """The color that most of a token's pixels have."""
    colors, count = np.unique(cell.reshape(-1, 3), axis=0, return_counts=True)
    return tuple(colors[count.argmax()].tolist())


def white(drawn: np.ndarray) -> np.ndarray:
    """How many pixels of each token are white, as only names are."""
    return (drawn == 255).all(axis=-1).sum(axis=(2, 3))


def test_each_token_has_the_color_of_its_region_and_the_rest_is_gray():
    # The last token's center is at 248.
    drawn = canvas(layout({"box": [0, 0, 128, 96]}, {"box": [128, 128, 250, 256]}))
    for row, column in np.ndindex(16, 16):
        inside = [row < 6 and column < 8, row >= 8 and column >= 8]
        expected = COLOR[inside.index(True)] if any(inside) else GRAY
        assert most(drawn[row, column]) == expected, (row, column)
    assert {most(cell) for cell in canvas(layout())[::3, ::3].reshape(-1, 64, 64, 3)} == {GRAY}
    # A token whose center, here x = 24, lies outside stays gray, and the shape is drawn over it.
    drawn = canvas(layout({"box": [0, 0, 23, 256]}))
    assert most(drawn[5, 0]) == COLOR[0] and most(drawn[5, 1]) == GRAY
    dark = [int(0.45 * value) for value in COLOR[0]]
    edge = np.flatnonzero((drawn[5, 1, 20] == dark).all(axis=1))
    assert edge.tolist() == [26, 27]  # 23 / 16 tokens of 64 pixels: the edge ends after pixel 92 = 64 + 28


def test_an_ellipse_is_drawn_in_its_box_with_its_tokens_inside():
    drawn = canvas(layout({"ellipse": [32, 0, 224, 128]}, style="ink"))
    dark = [int(0.45 * value) for value in COLOR[0]]
    rows, columns = (drawn.swapaxes(1, 2).reshape(1024, 1024, 3) == dark).all(axis=-1).nonzero()
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx([0, 511, 128, 895], abs=2)
    assert most(drawn[4, 3]) == most(drawn[1, 7]) == COLOR[0] and most(drawn[0, 2]) == most(drawn[7, 13]) == GRAY


def test_overlaps_are_striped_in_the_colors_of_all_their_regions_unless_the_last_one_hides_the_others():
    boxes = ({"box": [0, 0, 160, 256]}, {"box": [96, 0, 256, 256]})
    drawn = canvas(layout(*boxes))
    shared = drawn[2:5, 7:9].reshape(-1, 3)
    for i in (0, 1):
        assert 0.4 < (shared == COLOR[i]).all(axis=1).mean() < 0.5  # grid lines are darker
    assert (drawn[2:5, 2:4] == COLOR[0]).all(axis=-1).mean() > 0.9
    assert not (drawn[:, 6:10] == GRAY).all(axis=-1).any()
    drawn = canvas(layout(*boxes, overlap="last"))
    assert most(drawn[3, 7]) == COLOR[1] and not (drawn[3, 7] == COLOR[0]).all(axis=-1).any()


def test_a_soft_edge_is_graded():
    drawn = canvas(layout({"box": [0, 0, 128, 256], "feather": 128}))
    strength = [np.abs(np.subtract(most(drawn[2, column]), GRAY)).sum() for column in range(16)]
    assert strength[0] == np.abs(np.subtract(COLOR[0], GRAY)).sum() and strength[15] == 0
    assert all(a > b for a, b in zip(strength[4:12], strength[5:12])) and strength[:4] == [strength[0]] * 4


RING = [[[16, 16], [240, 16], [240, 240], [16, 240]], [[64, 64], [192, 64], [192, 192], [64, 192]]]
CORNER = [[0, 0], [256, 0], [256, 48], [48, 48], [48, 256], [0, 256]]
PARTS = {
    "inside another": layout({"box": [0, 0, 256, 256]}, {"box": [32, 32, 224, 224]}, overlap="last"),
    "ring": layout({"polygon": RING}),
    "corner": layout({"polygon": CORNER}),
    "overlap": layout({"box": [0, 0, 160, 256], "feather": 64}, {"box": [96, 0, 256, 256]}),
    "eight": layout(*({"box": [160 * i, 0, 160 * i + 160, "50%"]} for i in range(8)), width=1280, height=768),
}


@pytest.mark.parametrize("of", PARTS.values(), ids=PARTS)
def test_each_regions_name_lies_in_its_own_part(of):
    names = white(canvas(of))
    cover = region_tokens(of).cover.reshape(-1, *names.shape).numpy() > 0
    alone = cover & (cover.sum(axis=0) == 1)
    for own in alone:
        assert (names * own).sum() > 80
    assert names[~alone.any(axis=0)].sum() == 0


def test_a_name_is_no_larger_than_its_region_and_two_of_one_place_both_have_one():
    names = white(canvas(layout({"box": [320, 320, 352, 352]}, width=1280, height=768)))
    assert names[18:24, 18:24].sum() == names[20:22, 20:22].sum() > 50
    box = {"box": [0, 0, 128, 128]}
    one, two = (white(canvas(layout(*[box] * n)))[:8, :8].sum() for n in (1, 2))
    assert two > 1.8 * one
    inside = np.ones((9, 9), dtype=bool)
    inside[3:, 3:6] = False
    y, x, depth = innermost(inside)  # not the middle
    assert (y, depth) == (1.5, 1.5) and inside[int(y), int(x)]


SIZES = [(1280, 768, (1040, 624)), (32, 32, (1024, 1024)), (8192, 16, (1024, 2)), (16, 8192, (2, 1024))]


@pytest.mark.parametrize("width, height, size", SIZES)
def test_images_of_all_aspect_ratios_have_a_legend_that_covers_no_token(width, height, size):
    sheet = np.asarray(preview(layout({"box": [0, 0, 16, 16]}, width=width, height=height)))
    assert max(sheet.shape) < 1500 and sheet.shape[1] >= size[0] + 2 * GAP
    right, bottom = GAP + size[0], TOP + size[1]  # of the last token
    assert (sheet[bottom - 1, right - 1] != 255).any()
    assert (sheet[bottom, GAP:right] == 255).all() and (sheet[TOP:bottom, right] == 255).all()
    swatches = (sheet == COLOR[0]).all(axis=-1)
    rows, columns = (np.flatnonzero(swatches.any(axis=axis)).max() for axis in (1, 0))
    assert (rows >= bottom) == (width > height) and (columns >= right) == (width <= height)


def test_a_legend_has_61_colors_and_the_settings_that_are_not_the_defaults():
    boxes = [[128 * (i % 8), 128 * (i // 8), 128 * (i % 8) + 128, 128 * (i // 8) + 128] for i in range(61)]
    of = layout(*({"box": box} for box in boxes), width=1024, height=1024)
    legend = np.asarray(preview(of))[:, 1024 + 2 * GAP :]
    shown = {tuple(value) for value in np.unique(legend.reshape(-1, 3), axis=0).tolist()}
    assert {*COLOR} <= shown and len({*COLOR}) == 62 and GRAY == (228, 228, 228)
    changed = {"strength": 2.5, "feather": 32, "base_ratio": 0, "mask_inject_steps": "60%"}
    of = layout(HALF, {"box": [128, 0, 256, 128], **changed})
    first, second, background = (details(of, region_tokens(of), i) for i in range(3))
    assert first == "128 tokens, 50.0%" and background.count(",") == 1
    assert second.endswith("%, strength 2.5, feather 32, base_ratio 0, mask_inject_steps 60%")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_all_examples_are_valid_and_have_a_preview_and_a_report(file, is_valid):
    assert is_valid(yaml.safe_load(file.read_text()))
    of = read_layout(file, {}, 256)
    assert min(preview(of).size) > 400
    text, _ = report(of, FluxParams(), None)
    assert all(region.prompt[:30] in text for region in of.regions)


KEYS = {"width": 128, "height": 128, "steps": 5, "max_sequence_length": 12}


def run(first: dict | None = None, second: dict | None = None, **keys) -> Layout:
    one = {"box": [0, 0, 64, 128]} | (first or {})
    two = {"box": [48, 32, 112, 96]} | (second or {})
    return layout(one, two, **KEYS, **{"region_max_sequence_length": 8, **keys})


RUNS = {
    "plain": run(method="plain"), "published": run(), "no base branch": run(base_ratio=0),
    "no regions": layout(**KEYS),
    "all steps": run(mask_inject_steps=5, overlap="last"),
    "one stream": run(base_stream="shared"),
    "intervals": run(double_inject_interval=2, single_inject_interval=3),
    "blocks": run(double_blocks=[1], single_blocks="0-1"),
    "open images": run(image_attention="open"), "composition": run(method="rpg"),
    "composition alone": run(method="rpg", base_ratio=0),
    "soft and weighed": run({"feather": 48, "strength": 0}),
    "own steps": run({"mask_inject_steps": 1}, {"mask_inject_steps": "80%"}, base_ratio=0),
    "own ratios": run({"base_ratio": 0}, {"base_ratio": 1}),
    "heun": run(sampler="heun"), "heun to the end": run(sampler="heun", mask_inject_steps=5),
    "composition by heun": run(sampler="heun", method="rpg"), "multistep": run(sampler="dpmpp_2m"),
    "covering": run(second={"box": [64, 0, 128, 128]}),
}  # fmt: skip


@cache
def counted_flops(of: Layout, params: FluxParams = tiny.FLUX) -> int:
    """Matrix products of a whole run. The counter sees into attention only where that is made of
    them, in MATH."""
    of = resolved(of, params)
    tokens = region_tokens(of) if of.regional_steps() else None
    count = len(tokens.prompts) if tokens else 0
    regions = torch.randn(count, of.region_max_sequence_length, params.context_in_dim)
    txt = torch.randn(1, of.max_sequence_length, params.context_in_dim)
    conditioning = Conditioning(txt, regions if count else None, torch.randn(1 + count, params.vec_in_dim))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method = composed if of.method == "rpg" else by(portable_attention)
        sample(Flux(params), of, tokens, conditioning, 1, method)
    return counter.get_total_flops()


MODULATION = forward_flops(tiny.FLUX, text=0, image=0, pairs=0)


def total_flops(of: Layout, params: FluxParams) -> int:
    found = stages(resolved(of, params), params, grid_tokens(of))
    assert found[-1][1] == plain_flops(params, 12, 64)
    starts = [0, *(end for end, *_ in found)]
    return sum(evaluations(of, start, end) * flops for start, (end, flops, _) in zip(starts, found))


@pytest.mark.parametrize("of", RUNS.values(), ids=RUNS)
def test_the_expected_work_is_that_of_a_run(of):
    counted = counted_flops(of)
    if of is RUNS["composition alone"]:  # its base prompt's modulation is made for all steps
        counted -= resolved(of, tiny.FLUX).regional_steps() * MODULATION
    if of.sampler == "heun":  # neighboring steps share a modulation; rpg's prompts do in the regional steps
        T = resolved(of, tiny.FLUX).regional_steps()
        counted += (4 + (3 * (T - 1) if of.method == "rpg" else 0)) * MODULATION
    # Ratios of tokens are a matrix product too.
    assert total_flops(of, tiny.FLUX) == pytest.approx(counted, rel=1e-5)
    ratio = counted / counted_flops(RUNS["plain"])
    assert f"{ratio:.2f} times plain FLUX.1" in report(of, tiny.FLUX, None)[0]
    if of is RUNS["published"]:
        schnell = dataclasses.replace(tiny.FLUX, guidance_embed=False)  # has no guidance to embed
        assert total_flops(of, schnell) == counted_flops(of, schnell)


def test_a_report_lists_what_each_region_holds():
    of = layout(HALF, {"box": [128, 0, 256, 64]}, max_sequence_length=64, region_max_sequence_length=32)
    text, warnings = report(of, FluxParams(), [20, 5, 6, 7])
    assert [" ".join(line.split()) for line in text.splitlines()[1:5]] == [
        "base 256 100.0% 20 of 64 a scene",
        "0 128 50.0% 5 of 32 thing 0",
        "1 32 12.5% 6 of 32 thing 1",
        "background 96 37.5% 7 of 32 a photo",
    ]
    assert warnings == []
    assert "up to 32" in report(of, FluxParams(), None)[0]
    text, _ = report(layout(HALF), FluxParams(), None)
    assert "up to 512" in text and "steps 11 to 24: plain" in text  # FLUX.1-dev's
    assert report(of, FluxParams(), [64, 32, 32, 32])[1] == []
    assert report(of, FluxParams(), [65, 33, 32, 40])[1] == [
        "prompt has 65 tokens, and only the first 64 are read.",
        "regions[0].prompt has 33 tokens, and only the first 32 are read.",
        "background_prompt has 40 tokens, and only the first 32 are read.",
    ]


def test_a_report_names_the_steps_of_each_stage():
    alone = "regional, no base branch"
    for name, lines in {
        "own steps": [f"1 to 1: {alone}", "2 to 2: regional", "3 to 4: regional", "5 to 5: plain"],
        "no base branch": [f"1 to 2: {alone}", "3 to 5: plain"],
        "all steps": ["1 to 5: regional"],
    }.items():
        text, _ = report(RUNS[name], tiny.FLUX, None)
        assert re.findall(r"^steps (.*), [^,]* each, ", text, re.MULTILINE) == lines


SMALL, RIGHT, MIDDLE = {"box": [160, 0, 192, 32]}, {"box": [128, 0, 256, 256]}, {"box": [64, 0, 192, 256]}
WARNINGS = [
    (layout(HALF, SMALL), "regions[1] covers only 4 tokens, 1.6% of the image,"),
    (layout(HALF, {"box": [160, 0, 208, 32]}), ""),
    (layout(HALF, {"box": [0, 0, 64, 128]}), "regions[1] lies wholly in regions[0];"),
    (layout({"box": [0, 0, 64, 128]}, HALF), "regions[0] lies wholly in regions[1];"),
    (layout({"box": [0, 0, 64, 64]}, HALF, overlap="last"), "regions[0] lies wholly under others"),
    (layout(HALF, RIGHT, MIDDLE), "regions[2] has no token of its own"),
    (layout(HALF, {"box": [161, 1, 163, 3]}), "regions[1] covers no token;regions[1] covers only 1"),
    (layout({**HALF, "strength": 0}), "regions[0] has strength 0:"),
    (layout(HALF, {"box": [96, 0, 256, 256]}), ""),
]


@pytest.mark.parametrize("of, starts", WARNINGS, ids=[starts for _, starts in WARNINGS])
def test_each_doubt_gets_one_sentence(of, starts):
    _, warnings = report(of, FluxParams(), None)
    expected = [start for start in re.split(";(?=r)", starts) if start]
    assert [w[: len(start)] for w, start in zip(warnings, expected)] == expected
    assert len(warnings) == len(expected)
    assert all(warning.endswith(".") and warning.count(". ") == 0 for warning in warnings)


def test_the_schema_in_docs_is_current_and_describes_every_key(capsys):
    runpy.run_path(str(ROOT / "tools" / "schema.py"), run_name="__main__")
    assert (ROOT / "docs" / "layout.schema.json").read_text() == capsys.readouterr().out
    schema = json_schema()
    parts = [schema, *schema["$defs"].values()]
    assert all(key["description"] for part in parts for key in part["properties"].values())
    feather = schema["$defs"]["Region"]["properties"]["feather"]
    assert feather["description"].startswith("over how many pixels")


@pytest.fixture(scope="module")
def is_valid():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema()).is_valid


BOX = {"prompt": "a thing", "box": [0, 0, 128, 128]}


def changed(region: dict | None = None, without: str | None = None, **keys) -> dict:
    """A good layout with other keys, of its region too."""
    region = {key: value for key, value in (BOX | (region or {})).items() if key != without}
    return {"prompt": "a scene", "regions": [region], **keys}


shaped = partial(changed, without="box", map="map.png")
CONTROL = {"model": "a/b", "image": "map.png"}
TAKEN = [
    changed(), {"prompt": "a scene"}, changed({"box": ["0%", "12.5%", "100%", 999.5]}),
    changed({"box": [0, 0, "025%", "100.0%"]}), changed({"mask": None, "color": None, "polygon": None}),
    shaped({"polygon": [[0, 0], ["50%", 0], [64, 64]]}), shaped({"polygon": RING}), shaped({"mask": "map.png"}),
    shaped({"color": 255}), shaped({"color": [255, 255, 255]}), shaped({"color": "#ffFFff"}),
    changed({"mask_inject_steps": 3}, mask_inject_steps="100.0%"),
    changed(double_blocks=[0, 3], single_blocks="every 2"), changed(double_blocks="0-4, 8", single_blocks="3"),
    changed(max_sequence_length=64, region_max_sequence_length="0.5%"),
    changed({"loras": [{"file": "a/b", "plain_steps": True}]}, loras=[{"file": "a/b", "scale": -1}]),
    changed(controlnets=[CONTROL | {"mode": "canny", "region": 0}]),
    shaped({"ellipse": [0, "2.5%", 64, 48.5]}), changed({"order": 0}), changed({"order": -2}, overlap="smallest"),
    changed(style="a sketch"), changed(width=None, height=128),
]  # fmt: skip
REFUSED = [  # keys, shapes and prompts
    {"width": 64}, changed(strenght=1), changed({"weight": 1}), changed(loras=[{"file": "a/b", "weight": 1}]),
    changed(without="box"), changed({"box": None}), changed({"mask": "map.png"}),
    changed({"mask": "map.png", "polygon": RING}), changed(without="prompt"), changed({"prompt": " "}),
    changed(prompt=3), changed(regions=[BOX] * 62),
    # sizes, boxes and points
    changed(width=1032), changed(height=0), changed(width=16384), changed({"box": [0, 0, 9]}),
    changed({"box": [0, 0, 9, 9, 9]}), changed({"box": [-1, 0, 9, 9]}), changed({"box": [0, 0, 9, "101%"]}),
    changed({"box": [0, 0, 9, "9in"]}), shaped({"polygon": [[0, 0], [9, 9]]}), shaped({"polygon": []}),
    shaped({"polygon": [[0, 0, 0], [9, 9, 0], [9, 0, 0]]}), shaped({"polygon": [[0, 0], [9, 9], [9, 0], RING[0]]}),
    # masks and colors
    shaped({"mask": ""}), changed({"color": 255}, without="box"), shaped({"color": "white"}),
    shaped({"color": [255, 255]}), shaped({"color": [255, 255, 256]}), shaped({"color": 2**24}),
    # numbers, fractions, blocks and choices
    changed({"strength": -1}), changed({"feather": 9000}), changed(base_ratio=1.5), changed({"base_ratio": 1.5}),
    changed(mask_inject_steps=-1), changed({"mask_inject_steps": "100.5%"}), changed(mask_inject_steps="half"),
    changed(region_max_sequence_length="0.0%"), changed(max_sequence_length=1), changed(double_blocks="every 0"),
    changed(single_blocks="all"), changed(single_blocks=[-1]), changed(double_inject_interval=0),
    changed({"order": 1}), changed({"order": 1}, overlap="share"), changed({"order": 0.5}, overlap="last"),
    changed({"ellipse": [0, 0, 9, 9]}), shaped({"ellipse": [0, 0, 9]}), changed(style=None),
    changed(overlap="mix"), changed(controlnets=[CONTROL | {"mode": "edges"}]), changed(controlnets=[{"model": "a/b"}]),
]  # fmt: skip


@pytest.mark.parametrize("written, is_taken", [(x, True) for x in TAKEN] + [(x, False) for x in REFUSED])
def test_reader_and_schema_agree(written, is_taken, is_valid, tmp_path):
    """Next to map.png, with white pixels."""
    Image.new("L", (64, 64), 255).save(tmp_path / "map.png")
    (tmp_path / "layout.yaml").write_text(json.dumps(written))
    try:
        is_read = bool(read_layout(tmp_path / "layout.yaml", {}))
    except InputError:
        is_read = False
    assert is_read == is_valid(written) == is_taken
