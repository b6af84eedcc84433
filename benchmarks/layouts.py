"""The field's layout benchmarks: their layouts as ours, and scores of the images by a detector.

    python benchmarks/layouts.py read overlaybench simple.jsonl layouts/simple
    python generate.py --layout layouts/simple --seed 1 2 3 --output "images/simple/seed_{seed}/{name}.png" --model ...
    python benchmarks/layouts.py score layouts/simple --detections baseline_bbox_predictions.json
    python benchmarks/layouts.py score layouts/simple --images images/simple/seed_1 --detector "python detector.py"

`read` knows the rows of OverLayBench (one split) and LayoutSAM-Eval, exported from their datasets as JSON lines or one
JSON list, and COCO-MIG's mig_bench_anno.yaml. It writes a layout for each row, named as the benchmark wants its image,
and `layouts/simple.truth.json`, what `score` compares with.

Detections are {image: {category: [[x0, y0, x1, y1], ...]}}, as OverLayBench's meter saves them, in pixels of an image
that is --side pixels wide and high. A detector is a command that is given an image and prints such {category: boxes}.
docs/benchmarks.md tells how each score is defined, and what to run on a GPU.
"""

import argparse
import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.intervals import Mean, mean_of  # noqa: E402

SIDE = 1024  # pixels of OverLayBench's images; all boxes of `Truth` are in these
SUCCESS = 0.5  # IoU from which COCO-MIG counts an instance as there
Box = list[float]
Detections = dict[str, list[Box]]  # by category


class Instance(NamedTuple):
    """What an image is to show. label: the category with its attributes, where a detector may tell them."""

    prompt: str
    category: str
    label: str
    box: Box


class Truth(NamedTuple):
    """overlaps: pairs of instances, by their indices, whose boxes' intersections are compared."""

    caption: str
    instances: list[Instance]
    overlaps: list[tuple[int, int]] = []


# ------------------------------------------------------------------------------------------------ their layouts


def literal(value: Any) -> Any:
    """Datasets store lists and mappings as Python literals."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def rows_in(file: Path) -> list[dict]:
    """A JSON list, or one JSON object a line."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def from_overlaybench(file: Path) -> dict[str, Truth]:
    found = {}
    for row in rows_in(file):
        about = literal(row["annotation"])
        instances = []
        for name, entry in about["annotations"].items():
            prompt = entry.get("local_prompt") or entry.get("local_prompts") or name
            instances.append(Instance(prompt, entry["category"], entry["category"], list(entry["bbox"])))
        overlaps = [tuple(pair["overlap_box"]) for pair in about.get("valid_overlap", ())]
        found[row["image_id"]] = Truth(about["caption"], instances, overlaps)
    return found


def from_layoutsam(file: Path) -> dict[str, Truth]:
    found = {}
    for row in rows_in(file):
        captions = literal(row["region_captions"])
        detailed = literal(row.get("detail_region_captions") or captions)
        scale = (SIDE / row["width"], SIDE / row["height"]) * 2
        boxes = [[x * s for x, s in zip(box, scale)] for box in literal(row["bbox_list"])]
        entries = zip(detailed, captions, captions, boxes, strict=True)
        found[Path(row["file_name"]).stem] = Truth(row["global_caption"], [Instance(*entry) for entry in entries])
    return found


def from_coco_mig(file: Path, seed: int = 42) -> dict[str, Truth]:
    """Their image's name is the prompt, the seed with the image's index, and the id in COCO."""
    found = {}
    for prompt, entry in yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader).items():
        instances = []
        for phrase, boxes in entry.items():
            if phrase != "coco_id":
                label = phrase.removeprefix("a ").removeprefix("an ")
                category = label.partition(" ")[2]
                instances += [Instance(phrase, category, label, [SIDE * x for x in box]) for box in boxes]
        found[f"{prompt}_{seed}0_{entry['coco_id']}"] = Truth(prompt, instances)
    return found


FORMS = {"overlaybench": from_overlaybench, "layoutsam": from_layoutsam, "coco-mig": from_coco_mig}


def layout_of(truth: Truth) -> dict[str, Any]:
    """The keys of a layout; boxes are cut at the image's edges, and what is then empty is left out."""
    regions = []
    for instance in truth.instances:
        x0, y0, x1, y1 = (min(max(x, 0), SIDE) for x in instance.box)
        if x0 < x1 and y0 < y1:
            box = [f"{100 * x / SIDE:.9g}%" for x in (x0, y0, x1, y1)]
            regions.append({"prompt": instance.prompt, "box": box})
    return {"prompt": truth.caption, "regions": regions}


def read(form: str, file: Path, folder: Path) -> None:
    truths = FORMS[form](file)
    folder.mkdir(parents=True, exist_ok=True)
    for name, truth in truths.items():
        text = yaml.safe_dump(layout_of(truth), sort_keys=False, allow_unicode=True, width=100)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    truth_file(folder).write_text(json.dumps(truths), encoding="utf-8")
    print(f"{folder}: {len(truths)} layouts, {sum(len(t.instances) for t in truths.values())} instances")


def truth_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.truth.json")


def truths_of(folder: Path) -> dict[str, Truth]:
    stored = json.loads(truth_file(folder).read_text(encoding="utf-8"))
    return {
        name: Truth(caption, [Instance(*entry) for entry in instances], [tuple(pair) for pair in overlaps])
        for name, (caption, instances, overlaps) in stored.items()
    }


# ------------------------------------------------------------------------------------------------ scores


def area(box: Box) -> float:
    """Of a box; an intersection of boxes that do not meet has one, too, as in OverLayBench's scorer."""
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(a: Box, b: Box) -> Box:
    return [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]


def iou(a: Box, b: Box) -> float:
    x0, y0, x1, y1 = intersection(a, b)
    common = max(0, x1 - x0) * max(0, y1 - y0)
    union = area(a) + area(b) - common
    return common / union if union > 0 else 0.0


def matched(wanted: list[Box], found: list[Box]) -> list[tuple[float, Box]]:
    """Each wanted box's IoU and partner, the pairs of the highest IoU first; without one, 0 and an empty box."""
    pairs = [(iou(a, b), i, j) for i, a in enumerate(wanted) for j, b in enumerate(found)]
    result, taken = {}, set()
    for overlap, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i not in result and j not in taken:
            result[i] = (overlap, found[j])
            taken.add(j)
    return [result.get(i, (0.0, [0, 0, 0, 0])) for i in range(len(wanted))]


def overlaybench(truth: Truth, found: Detections) -> dict[str, float]:
    """mIoU and O-mIoU of one image. Boxes are whole pixels, as there."""
    partners: dict[int, tuple[float, Box]] = {}
    for category in dict.fromkeys(instance.category for instance in truth.instances):
        own = [i for i, instance in enumerate(truth.instances) if instance.category == category]
        boxes = [list(map(int, truth.instances[i].box)) for i in own]
        seen = [list(map(int, box)) for box in found.get(category, ())]
        partners |= dict(zip(own, matched(boxes, seen)))
    common = []
    for pair in truth.overlaps:
        wanted = intersection(*(list(map(int, truth.instances[i].box)) for i in pair))
        common.append(iou(wanted, intersection(*(partners[i][1] for i in pair))))
    return {"mIoU": mean([overlap for overlap, _ in partners.values()]), "O-mIoU": mean(common)}


def coco_mig(truth: Truth, found: Detections) -> dict[str, float]:
    """mIoU, and the success of instances and of the image. An instance is there if a box of its category has an IoU of
    at least SUCCESS; its attribute is right if one of its label's boxes has."""
    overlaps, successes = [], []
    for instance in truth.instances:
        best, labeled = (
            max((iou(instance.box, box) for box in found.get(name, ())), default=0.0)
            for name in (instance.category, instance.label)
        )
        is_right = labeled >= SUCCESS
        overlaps.append(best if best < SUCCESS or is_right else 0.0)
        successes.append(best >= SUCCESS and is_right)
    return {"I-mIoU": mean(overlaps), "I-SR": mean(successes), "SR": float(all(successes))}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def scores(truths: dict[str, Truth], detections: dict[str, Detections]) -> dict[str, Mean]:
    """Means and intervals. COCO-MIG's I-SR and I-mIoU are over instances: an image counts as often as it has some."""
    images = []
    for name, truth in truths.items():
        found = detections.get(name, {})
        images.append(overlaybench(truth, found) | coco_mig(truth, found))
    counts = [len(truth.instances) for truth in truths.values()]
    return {
        key: mean_of([image[key] for image in images], weights=counts if key.startswith("I-") else None)
        for key in images[0]
    }


def scaled(found: Detections, side: float) -> Detections:
    """Boxes of an image of this side in those of SIDE; what is no box is left out, as OverLayBench does."""
    result = {}
    for category, boxes in found.items():
        good = [box for box in boxes if isinstance(box, list) and len(box) == 4]
        result[category] = [[float(x) * SIDE / side for x in box] for box in good]
    return result


def detected(command: str, images: Path, names: list[str]) -> dict[str, Detections]:
    """What a detector prints of each image that is there. CalledProcessError if it fails."""
    found = {}
    for name in names:
        files = sorted(images.glob(f"{name}.*"))
        if files:
            output = subprocess.run([*shlex.split(command), str(files[0])], stdout=subprocess.PIPE, check=True).stdout
            found[name] = json.loads(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("form", choices=FORMS)
    reading.add_argument("file", type=Path)
    reading.add_argument("folder", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("folder", type=Path, help="of the layouts, as `read` wrote it")
    scoring.add_argument("--detections", type=Path)
    scoring.add_argument("--images", type=Path, help="the folder of the images, with --detector")
    scoring.add_argument("--detector", help="a command")
    scoring.add_argument("--side", type=float, default=SIDE, help="pixels of the images' sides")
    args = parser.parse_args()
    if args.command == "read":
        read(args.form, args.file, args.folder)
        return
    truths = truths_of(args.folder)
    if args.detections:
        found = json.loads(args.detections.read_text(encoding="utf-8"))
    elif args.images and args.detector:
        found = detected(args.detector, args.images, list(truths))
    else:
        parser.error("score needs --detections, or --images and --detector")
    found = {name: scaled(boxes, args.side) for name, boxes in found.items()}
    print(f"{len(truths)} images, {len(found)} with detections")
    for name, value in scores(truths, found).items():
        print(f"{name:8} {value}")


if __name__ == "__main__":
    main()
