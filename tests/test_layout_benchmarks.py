"""The field's benchmarks: their layouts become ours, and detections get the scores that their own scorers give."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks import layouts
from benchmarks.layouts import Instance, Truth, coco_mig, overlaybench, scaled, scores, truths_of
from benchmarks.pocket_mig import INSTANCES, objects_in, random_image
from pocket.judge import SIZE
from pocket.scenes import draw
from regional.reader import read_layout

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "overlaybench.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "layouts"


def read(form: str, text: str, folder: Path) -> dict[str, Truth]:
    Path("rows").write_text(text)
    layouts.read(form, Path("rows"), folder)
    return truths_of(folder)


def test_overlaybench_scores_as_its_own_scorer_does(folder):
    truths = read("overlaybench", "\n".join(map(json.dumps, FIXTURE["rows"])), folder)
    found = {name: scaled(boxes, 512) for name, boxes in FIXTURE["detections"].items()}
    for truth, name, expected in zip(truths.values(), truths, FIXTURE["each"], strict=True):
        own = overlaybench(truth, found.get(name, {}))
        assert [own["mIoU"], own["O-mIoU"]] == pytest.approx(expected, abs=1e-12)
    every = scores(truths, found)
    assert [every["mIoU"].value, every["O-mIoU"].value] == pytest.approx(FIXTURE["mean"], abs=1e-12)


def test_a_benchmarks_layouts_are_ours(folder):
    truths = read("overlaybench", json.dumps(FIXTURE["rows"]), folder)
    for name, truth in truths.items():
        layout = read_layout(folder / f"{name}.yaml", {"width": 1024, "height": 1024})
        assert layout.prompt == truth.caption and len(layout.regions) == len(truth.instances)
        for region, instance in zip(layout.regions, truth.instances):
            assert region.prompt == instance.prompt == f"{instance.prompt.split(',')[0]}, sitting"
            assert region.box == pytest.approx([min(x, 1024) for x in instance.box], abs=1e-4)


MIG = """
a photo of a black airplane and a green apple:
  a black airplane: [[0.5, 0.25, 1.0, 0.75], [0.0, 0.0, 0.25, 0.5]]
  a green apple: [[0.25, 0.25, 0.5, 0.5]]
  coco_id: '6'
"""


def test_coco_mig(folder):
    truths = read("coco-mig", MIG, folder)
    (name,) = truths
    assert name == "a photo of a black airplane and a green apple_420_6"
    written = yaml.safe_load((folder / f"{name}.yaml").read_text())
    assert [region["box"] for region in written["regions"]][0] == ["50%", "25%", "100%", "75%"]
    airplanes = [[512, 256, 1024, 768], [0, 0, 256, 512]]
    apple = [256, 256, 512, 384]  # half of the wanted box
    found = {"airplane": airplanes, "black airplane": airplanes[:1], "apple": [apple], "green apple": [apple]}
    # the second airplane has a wrong color: it counts as 0; the apple is there with IoU .5
    assert coco_mig(truths[name], found) == {"I-mIoU": 0.5, "I-SR": pytest.approx(2 / 3), "SR": 0.0}
    # an object that is missed keeps its IoU, as in COCO-MIG's scorer
    missed = {"apple": [[256, 256, 512, 300]], "green apple": [[256, 256, 512, 300]]}
    assert coco_mig(truths[name], missed) == {"I-mIoU": pytest.approx(44 / 256 / 3), "I-SR": 0.0, "SR": 0.0}


def test_layoutsam(folder):
    row = {
        "global_caption": "a street", "width": 800, "height": 400, "file_name": "a b.jpg",
        "bbox_list": "[[0, 0, 400, 400], [-8, 0, -2, 9]]", "region_captions": "['a car', 'a cat']",
        "detail_region_captions": "['a red car', 'a black cat']",
    }  # fmt: skip
    truths = read("layoutsam", json.dumps([row]), folder)
    assert truths == {"a b": truths["a b"]}
    assert truths["a b"].instances[0] == Instance("a red car", "a car", "a car", [0, 0, 512, 1024])
    regions = read_layout(folder / "a b.yaml", {}).regions  # the second box lies outside
    assert [(region.prompt, region.box) for region in regions] == [("a red car", (0, 0, 512, 1024))]


def test_a_perfect_image_scores_one_and_a_moved_box_its_iou():
    box = [100, 100, 300, 300]
    truth = Truth("", [Instance("", "cat", "cat", box), Instance("", "cat", "cat", [200, 200, 400, 400])], [(0, 1)])
    whole = {"cat": [instance.box for instance in truth.instances]}
    assert overlaybench(truth, whole) == {"mIoU": 1.0, "O-mIoU": 1.0}
    moved = {"cat": [[150, 100, 350, 300], truth.instances[1].box]}
    assert overlaybench(truth, moved)["mIoU"] == pytest.approx((150 / 250 + 1) / 2)
    assert overlaybench(truth, {}) == {"mIoU": 0.0, "O-mIoU": 0.0}


def test_the_pocket_detector_finds_what_is_drawn():
    truths, found = {}, {}
    for count in INSTANCES:
        for seed in range(4):
            truths[f"{count} {seed}"], layout, scene = random_image(count, seed)
            found[f"{count} {seed}"] = scaled(objects_in(draw(scene)), SIZE)
            assert len(layout.regions) == count
    every = scores(truths, found)
    assert every["SR"].value == every["I-SR"].value == 1 and every["I-mIoU"].value > 0.97
    assert scores(truths, {})["I-SR"].value == 0


def test_a_detector_is_a_command(folder, capfd, monkeypatch):
    """The whole chain: layouts, images, a detector's output, a score."""
    truth, _, scene = random_image(3, 7)
    folder.mkdir()
    layouts.truth_file(folder).write_text(json.dumps({"a": truth, "b": truth}))
    Path("images").mkdir()
    Image.fromarray(draw(scene)).save("images/a.png")
    root = Path(__file__).parent.parent
    detector = f"{sys.executable} {root / 'benchmarks/pocket_mig.py'} --detect"
    command = ["layouts.py", "score", str(folder), "--images", "images", "--detector", detector, "--side", str(SIZE)]
    monkeypatch.setattr("sys.argv", command)
    layouts.main()
    lines = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()[1:])
    assert lines["SR"].startswith("0.500") and np.isclose(float(lines["mIoU"].split()[0]), 0.49, atol=0.01)
