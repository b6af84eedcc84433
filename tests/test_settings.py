"""What a layout has beyond the published method: other shapes, overlaps, feathers, schedules, blocks."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from model.attention import Block
from regional.attention import RegionalAttention, dense_attention, portable_attention
from regional.layout import FLUX_DEV, PRESETS, Layout, Region, blocks_of
from regional.mask import (
    BACKGROUND_BIT,
    feathered,
    in_polygons,
    pixels_inside,
    region_tokens,
    stage_ratios,
)
from regional.reader import read_layout
from tools import colors


def tokens_of(folder: Path, regions: str, more: str = "") -> list[np.ndarray]:
    """Each region's tokens, (rows, columns) bool."""
    file = folder / "layout.yaml"
    file.write_text(f"prompt: x\n{more}\nregions:\n{regions}")
    return list(region_tokens(read_layout(file, {}, 64)).cover.unflatten(1, (4, 4)).numpy() > 0)


def test_percentages_are_pixels(tmp_path):
    regions = "- {prompt: a, box: [0, 25%, 50%, 64]}\n- {prompt: b, box: [0, 16, 32, 100%]}"
    first, second, *_ = tokens_of(tmp_path, regions)
    assert np.array_equal(first, second) and first.sum() == 6
    layout = read_layout(None, {"prompt": "x", "regions": [{"prompt": "a", "box": ["12.5%", 0, "33.3%", 1]}]})
    assert layout.regions[0].box == (128, 0, 340.992, 1)


def test_a_rectangle_as_polygon_is_the_box():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x0, y0 = rng.integers(0, 64, 2).tolist()
        x1, y1 = rng.integers((x0 + 1, y0 + 1), 65).tolist()
        box = Region(prompt="a", box=(x0, y0, x1, y1))
        polygon = Region(prompt="b", polygon=(((x0, y0), (x1, y0), (x1, y1), (x0, y1)),))
        layout = Layout(prompt="x", width=64, height=64, regions=(box, polygon))
        first, second, *_ = region_tokens(layout).cover.numpy() > 0
        assert np.array_equal(first, second) or first.sum() == second.sum() == 1


def test_polygons_are_even_odd():
    """Against Pillow's own at 16 times the resolution: a ring, and a triangle."""
    square = lambda a, b: ((a, a), (b, a), (b, b), (a, b))  # noqa: E731
    centres = np.arange(8, 128, 16)
    ring = in_polygons((square(0, 128), square(32, 96)), centres, centres)
    expected = np.ones((8, 8), bool)
    expected[2:6, 2:6] = False
    assert np.array_equal(ring, expected)
    triangle = ((3.1, 5.3), (119.7, 41.9), (29.3, 125.2))
    image = Image.new("1", (1280, 1280))
    ImageDraw.Draw(image).polygon([(10 * x, 10 * y) for x, y in triangle], fill=1)
    drawn = np.asarray(image)[10 * centres][:, 10 * centres]
    assert np.array_equal(in_polygons((triangle,), centres, centres), drawn) and drawn.any() and not drawn.all()


@pytest.mark.parametrize("box", [(0, 0, 160, 96), (13.5, 7.25, 150.75, 90), (16, 0, 144, 32), (0, 36, 160, 76)])
def test_an_ellipse_is_a_polygon_of_many_corners(box):
    x0, y0, x1, y1 = box
    turn = np.linspace(0, 2 * np.pi, 5000)
    corners = zip((x0 + x1 + (x1 - x0) * np.cos(turn)) / 2, (y0 + y1 + (y1 - y0) * np.sin(turn)) / 2)
    x, y = np.arange(160), np.arange(96)
    layout = Layout(prompt="", width=160, height=96)
    drawn = pixels_inside(Region(prompt="a", ellipse=box), layout, x, y)
    across, down = (x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0)
    is_clear = abs(4 * np.add.outer(down**2, across**2) - 1) > 1e-5
    expected = in_polygons([tuple(corners)], x, y)
    assert np.array_equal(drawn & is_clear, expected & is_clear) and is_clear.mean() > 0.99
    tokens = region_tokens(change(layout, regions=(Region(prompt="a", ellipse=box),))).cover[0].reshape(6, 10)
    assert np.array_equal(tokens > 0, drawn[8::16, 8::16]) and drawn[8::16, 8::16].any()


@pytest.mark.parametrize("box, y, x", [([33, 17, 36, 20], 1, 2), ([2, 15, 64, 18], 1, 1), ([62, 62, 64, 64], 3, 3)])
def test_a_tiny_ellipse_gets_the_token_that_its_box_covers_most(tmp_path, box, y, x):
    cell, *_ = tokens_of(tmp_path, f"- {{prompt: a, ellipse: {box}}}")
    assert cell.sum() == 1 and cell[y, x]


def test_a_tiny_polygon_gets_its_token(tmp_path):
    cell, *_ = tokens_of(tmp_path, "- {prompt: a, polygon: [[33, 17], [36, 17], [36, 20]]}")
    assert cell.sum() == 1 and cell[1, 2]


@pytest.mark.parametrize("color", ["[255, 0, 0]", '"#ff0000"', "255"])
@pytest.mark.parametrize("kind", ["RGB", "P"])
def test_colors_of_a_map(tmp_path, color, kind):
    """Left red, right blue; as an index, red is 255 by COCO's rule, and in a palette whatever the palette says."""
    image = Image.new("RGB", (32, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 32))
    if kind == "P":
        image = image.quantize(2)
        color = str(image.getpixel((0, 0))) if color == "255" else color
    image.save(tmp_path / "map.png")
    red, *_ = tokens_of(tmp_path, f"- {{prompt: a, color: {color}}}", "map: map.png")
    assert red[:, :2].all() and not red[:, 2:].any()


def test_a_maps_colors_are_listed_as_regions(tmp_path, monkeypatch, capsys):
    image = Image.new("RGB", (40, 10), (0, 128, 255))
    image.paste((255, 0, 0), (0, 0, 10, 10))
    for kind in (image, image.quantize(2)):
        kind.save(tmp_path / "map.png")
        monkeypatch.setattr("sys.argv", ["colors", str(tmp_path / "map.png")])
        assert colors.main() == 0
        text = capsys.readouterr().out
        assert '{color: "#0080ff", prompt: }  # 75.0%\n- {color: "#ff0000", prompt: }  # 25.0%\n' in text
        keys = yaml.safe_load(text.replace("prompt: ", "prompt: a")) | {"prompt": "b", "width": 64, "height": 16}
        assert region_tokens(read_layout(None, keys)).cover.sum(1).tolist() == [3, 1]
    Image.fromarray(np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)).save(tmp_path / "map.png")
    assert colors.main() == 0 and "# 256 colors\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["colors", "gone.png"])
    assert colors.main() == 2 and "colors: gone.png: there is no such file." in capsys.readouterr().err


NESTED = "- {prompt: a, box: [0, 0, 64, 32]}\n- {prompt: b, box: [0, 0, 32, 64]}\n- {prompt: c, box: [0, 0, 16, 16]}"


@pytest.mark.parametrize(
    "overlap, counts",
    [("share", [8, 8, 1]), ("last", [4, 7, 1]), ("first", [8, 4, 0]), ("smallest", [7, 4, 1])],
)
def test_overlaps(tmp_path, overlap, counts):
    """Of 4 x 4 tokens; equal areas lie as `first` has them."""
    assert [int(t.sum()) for t in tokens_of(tmp_path, NESTED, f"overlap: {overlap}")[:3]] == counts


@pytest.mark.parametrize(
    "overlap, orders, counts",
    [("last", [1, 0, 0], [8, 4, 0]), ("last", [0, 0, -1], [4, 8, 0]), ("first", [0, 0, 7], [7, 4, 1]),
     ("smallest", [5, 5, 0], [8, 4, 0]), ("first", [2, 2, 2], [8, 4, 0])],
)  # fmt: skip
def test_the_highest_order_is_on_top(tmp_path, overlap, orders, counts):
    lines = [line.replace("}", f", order: {order}}}") for line, order in zip(NESTED.splitlines(), orders)]
    assert [int(t.sum()) for t in tokens_of(tmp_path, "\n".join(lines), f"overlap: {overlap}")[:3]] == counts


def test_feathered_neighbours_leave_no_gap_for_the_background():
    boxes = {"l": (0, 0, 128, 64), "r": (128, 0, 256, 64)}
    regions = tuple(Region(prompt=name, box=box, feather=64) for name, box in boxes.items())
    for overlap in ("share", "last", "first", "smallest"):
        tokens = region_tokens(Layout(prompt="", width=256, height=64, regions=regions, overlap=overlap))
        assert tokens.prompts == ["l", "r"]
        assert torch.allclose(tokens.cover.sum(0), torch.ones(64))
        assert tokens.cover[0, :16].tolist() == pytest.approx([1] * 6 + [0.875, 0.625, 0.375, 0.125] + [0] * 6)


def test_a_feather_is_the_mean_over_its_window():
    inside = np.zeros((9, 9), bool)
    inside[3:6, 3:6] = True
    cover = feathered(inside, 48)  # 3 x 3 tokens
    expected = [[inside[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].sum() / 9 for j in range(9)] for i in range(9)]
    assert np.abs(cover - np.array(expected)).max() < 1e-6
    assert np.array_equal(feathered(np.ones((4, 4), bool), 100), np.ones((4, 4)))  # beyond the image it continues


@pytest.mark.parametrize("feather", [17, 40, 161.3, 1000, 8192])
def test_a_feather_has_the_bits_of_a_loop_over_its_window(feather):
    rng = np.random.default_rng(0)
    inside = np.add.outer(rng.random(70), rng.random(50)) < 0.9
    reach = np.ceil(feather / 32 - 0.5).astype(int)
    window = np.clip(feather / 32 + 0.5 - np.abs(np.arange(-reach, reach + 1)), 0, 1) / (feather / 16)
    cover = inside.astype(float)
    for _ in range(2):
        padded = np.pad(cover, ((reach, reach), (0, 0)), mode="edge")
        cover = sum(w * padded[i : i + len(cover)] for i, w in enumerate(window)).T
    expected = np.where(cover > 1e-6, cover.clip(max=1), 0).astype(np.float32)
    assert np.array_equal(feathered(inside, feather), expected)


REGIONS = (Region(prompt="a", box=(0, 0, 32, 64)), Region(prompt="b", box=(16, 0, 48, 64)))
LAYOUT = Layout(prompt="", width=64, height=64, steps=10, base_ratio=0.2, mask_inject_steps=4, regions=REGIONS)
change = msgspec.structs.replace


def stages(layout: Layout) -> list[tuple[int, dict[int, float]]]:
    """Where each stage ends, and the base branch's share by the bits of the tokens."""
    tokens = region_tokens(layout)
    bits = tokens.image_bits.tolist()
    found = stage_ratios(layout.resolved(FLUX_DEV), tokens)
    return [(end, dict(zip(bits, tokens.mean(ratios).tolist()))) for end, ratios in found]


@pytest.mark.published
def test_regions_have_steps_and_ratios_of_their_own():
    background = 1 << BACKGROUND_BIT
    assert stages(LAYOUT) == [(4, {1: 0.2, 3: 0.2, 2: 0.2, background: 0.2})]
    first = change(REGIONS[0], mask_inject_steps="80%", base_ratio=0.1)
    assert stages(change(LAYOUT, regions=(first, REGIONS[1]))) == [
        (4, {1: 0.1, 3: pytest.approx(0.15), 2: 0.2, background: 0.2}),
        (8, {1: 0.1, 3: pytest.approx(0.55), 2: 1.0, background: 1.0}),
    ]
    never = change(REGIONS[0], base_ratio=1)
    assert stages(change(LAYOUT, regions=(never, REGIONS[1])))[0][1][1] == 1.0
    assert stages(change(LAYOUT, base_ratio=1)) == stages(change(LAYOUT, method="plain")) == []
    only = change(REGIONS[0], mask_inject_steps=2)
    alone = change(LAYOUT, base_ratio=1, regions=(change(only, base_ratio=0.5),))
    assert stages(alone) == [(2, {1: 0.5, background: 1.0})]


@pytest.mark.parametrize(
    "blocks, chosen",
    [("every 2", [0, 2, 4, 6]), ("1-3", [1, 2, 3]), ("0-1, 5", [0, 1, 5]), ((2, 4), [2, 4]), ("6", [6]), ((), [])],
)
def test_which_blocks_are_masked(blocks, chosen):
    assert [i for i in range(7) if blocks_of(blocks, i)] == chosen
    layout = change(LAYOUT, double_blocks=blocks, single_inject_interval=3)
    layout = layout.resolved(FLUX_DEV._replace(depth=7, depth_single_blocks=7))
    assert layout.double_blocks == set(chosen) and layout.single_blocks == {0, 3, 6}


def test_the_control_preset_is_what_is_not_written():
    written = {"prompt": "x", "preset": "control", "regions": [{"prompt": "y", "box": [0, 0, 9, 9]}]}
    layout = read_layout(None, written)
    found = [getattr(layout, key) for key in PRESETS["control"]]
    assert found == list(PRESETS["control"].values()) == [0.1, "80%", "40%", "25%", "smallest"]
    assert read_layout(None, written | {"base_ratio": 0.3}).base_ratio == 0.3


def test_after_its_steps_the_base_branch_is_gone():
    """Of two regions and a background, whose own steps end at 2, 6 and 8."""
    regions = tuple(change(region, mask_inject_steps=steps) for region, steps in zip(REGIONS, (2, 6)))
    layout = change(LAYOUT, regions=regions, base_ratio=0.3, mask_inject_steps=8, base_steps="40%").resolved(FLUX_DEV)
    tokens = region_tokens(layout)
    found = stage_ratios(layout, tokens)
    assert found == [(2, [0.3, 0.3, 0.3]), (4, [1, 0.3, 0.3]), (6, [1, 0, 0]), (8, [1, 1, 0])]
    assert [end for end, _ in stage_ratios(change(layout, base_steps=10), tokens)] == [2, 6, 8]
    assert stage_ratios(change(layout, base_steps=0), tokens)[0] == (2, [0, 0, 0])


def test_open_images_see_each_other_and_not_others_texts():
    tokens = region_tokens(change(LAYOUT, image_attention="open"))
    texts = 2 * len(tokens.prompts)
    seen, isolated = ((x[:, None] & x) != 0 for x in (tokens.bits(2), region_tokens(LAYOUT).bits(2)))
    assert seen[texts:, texts:].all() and torch.equal(seen[:texts], isolated[:texts])


@pytest.mark.parametrize("masked", [dense_attention, portable_attention])
def test_a_shared_stream_has_the_double_blocks_sequence_throughout(masked):
    """In a single block it is what a double block's attention gives, on the same q, k and v."""
    bits, generator = region_tokens(LAYOUT).bits(3), torch.Generator().manual_seed(0)
    shared = RegionalAttention(masked, bits, 5, 16, 0.3, shared=True)
    q, k, v = torch.randn(3, 1, 2, len(bits) + 5, 8, generator=generator, dtype=torch.float64)
    in_double, in_single = (shared(q, k, v, Block(kind, 0)) for kind in ("double", "single"))
    assert torch.equal(in_double, in_single) and shared.streams == 1
    txt, img = torch.zeros(1, len(bits) - 16 + 5, 4), torch.ones(1, 16, 4)
    assert shared.join(txt, img).shape[1] == len(bits) + 5
    assert RegionalAttention(masked, bits, 5, 16, 0.3).join(txt, img).shape[1] == len(bits) + 5 + 16
