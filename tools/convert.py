"""Layouts from and to the forms of other programs.

    python -m tools.convert --from coco annotations.json layout.yaml --image 42
    python -m tools.convert --to forge layout.yaml couple.json

published   the published script's dict: base_prompt, image_width ..., "0": {description, mask}
coco        instances with boxes or polygons, or panoptic segments and their image
forge       Forge Couple's advanced mapping, with its prompts in a .txt of the same name
rpg         RPG's or Regional Prompter's split ratio, and prompts joined by BREAK
layoutsam   a row of LayoutSAM, or a list of rows; --image selects one by its index
invokeai    width, height, positive_prompt, and regions with bounds or a mask
gradio      what gradio_image_annotation returns: image, and boxes with a label
seg2any     Seg2Any's caption and segments_info, with its color map in a .png of the same name

Only --from:
comfyui     a workflow, as it is saved or exported (API), or a PNG that carries one
a1111       a PNG of A1111 or Forge, Forge Couple's parts included, or its parameters as a text
svg         shapes, with a title, label or id of theirs or of their group as the prompt
forge, invokeai   also PNGs that these programs made

Sizes become the nearest multiples of 16. Images and prompts TARGET needs are written next to it.
What the other form cannot hold is reported on stderr, or refused if regions would change.
"""

import argparse
import ast
import json
import math
import os
import re
import sys
import tempfile
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import accumulate, chain, groupby, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Meta
from PIL import Image

from errors import (
    CONFIG,
    LAYOUT,
    MISSING,
    SOURCE,
    InputError,
    info,
    opened_image,
    parsed,
    read_text,
    shown,
    warn,
)  # fmt: skip
from regional.images import readable
from regional.layout import FLUX_DEV, MAX_REGIONS, RGB, SHAPES, Layout, Region
from regional.mask import in_polygons, pixels_inside, topmost_first
from regional.reader import read_layout, value_at
from tools.importers import comfyui, pictures, svg
from tools.importers.common import boxed, percent, record, texts_in
from tools.metadata import check_writable

Data = dict[str, Any]
Files = dict[str, Any]  # by name: a text or an image; "" is TARGET
Box = tuple[float, float, float, float]
Side = Annotated[int, Meta(ge=1, le=16384)]
Unit = Annotated[float, Meta(ge=0, le=1)]
SIZE = {"width": Side | None, "height": Side | None}
BOUNDS = ("x_min", "y_min", "x_max", "y_max")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
COLORS = [tuple(product((0, 85, 170, 255), repeat=3))[23 * i % 64] for i in range(64)]
SAMPLES = 512
OVERLAP = "its polygons overlap; a layout leaves out what two of them cover"
FARTHEST = 10**6  # pixels; NaN is not nearer
PALETTE = COLORS[1:]  # 63 colors far apart


class Source(NamedTuple):
    """The file to convert, and what the flags state about it."""

    path: Path
    image: str | None
    boxes: bool
    beside: Path | None
    size: list[int] | None


def read_image(path: str | Path, key: str) -> Image.Image:
    def read(file: str) -> Image.Image:
        with opened_image(file) as image:
            return image.copy()

    return readable(read, str(path), key)


def data_in(text: Any, source: Source, key: str = "it") -> Any:
    """A text's value: JSON, NaN included, or a Python literal of the same values, if it is not
    too long; anything else as it is."""
    if not isinstance(text, str):
        return text
    about = (source.path, f"{key} is neither JSON nor a Python literal")
    try:
        return parsed(json.loads, text, *about)
    except InputError:
        if len(text) > LAYOUT:
            raise
        with suppress(InputError):
            literal = parsed(ast.literal_eval, text.strip(), *about)
            return parsed(json.loads, parsed(json.dumps, literal, *about), *about)
        raise


def checked(value: Any, kind: Any, key: str = "") -> Any:
    """The value as this type. InputError names the culprit's path, which begins with `key`."""
    try:
        return msgspec.convert(value, kind, strict=False)
    except Exception as error:  # ValidationError; a RecursionError, or integers too large
        problem, _, path = str(error).replace("`", "").partition(" - at $")
    name = (key + path).lstrip(".") or "the file"
    raise InputError(name, value_at(value, path), problem[0].lower() + problem[1:])


def chosen(entries: list[Any], names: list[tuple[Any, ...]], source: Source) -> Any:
    """The entry that --image names, or the only one."""
    wanted = source.image
    found = [e for e, own in zip(entries, names) if wanted in (None, *map(str, own))]
    if len(found) != 1:
        problem = f"{len(found)} of the {len(entries)} images match, expected one"
        raise InputError("--image", MISSING if wanted is None else wanted, problem, source.path)
    return found[0]


def boxes_of(layout: Layout, form: str) -> list[list[int]]:
    return [pixel_box(region, i, form) for i, region in enumerate(layout.regions)]


def pixel_box(region: Region, i: int, form: str) -> list[int]:
    """The integer box with the same pixels."""
    key = f"regions[{i}]"
    if region.shape != "box":
        raise InputError(key, MISSING, f"{form} has only boxes, no {region.shape}")
    x0, y0, x1, y1 = map(math.ceil, region.box)
    if x0 == x1 or y0 == y1:
        raise InputError(f"{key}.box", list(region.box), "there is no pixel in it")
    return [x0, y0, x1, y1]


def pixels_of(region: Region, layout: Layout) -> np.ndarray:
    """The region's pixels, (height, width) bool."""
    return pixels_inside(region, layout, np.arange(layout.width), np.arange(layout.height))


def polygons_of(region: Region) -> tuple:
    """A region's polygons; for an ellipse one of 64 corners."""
    if not region.ellipse:
        return region.polygon or ()
    x0, y0, x1, y1 = region.ellipse
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = (x0 + x1 + (x1 - x0) * np.cos(turn)) / 2
    y = (y0 + y1 + (y1 - y0) * np.sin(turn)) / 2
    return (tuple(zip(x.round(3).tolist(), y.round(3).tolist())),)


def color_map(layout: Layout) -> Image.Image:
    """One image of all regions, the i-th in PALETTE[i]."""
    owners = np.zeros((layout.height, layout.width), dtype=np.uint8)  # in COLORS; 0: none
    for i in topmost_first(layout, [0] * len(layout.regions)):
        pixels = pixels_of(layout.regions[i], layout)
        visible = pixels & (owners == 0)
        if (pixels & ~visible).any() and layout.overlap not in ("first", "last"):
            raise InputError(f"regions[{i}]", MISSING, "it overlaps another, a pixel has one color")
        if not visible.any():
            raise InputError(f"regions[{i}]", MISSING, "it has no pixel, or lies under others")
        owners[visible] = i + 1
    image = Image.fromarray(owners)
    image.putpalette(bytes(chain(*COLORS)))
    return image.convert("RGB")


def overlapping(polygons: Any, width: int, height: int) -> bool:
    """Are pixels inside for COCO, in any polygon, but outside by layouts' even-odd rule?
    Of 1,024 or more in a row or column, some are tried."""
    if len(polygons) < 2:
        return False
    x = np.arange(0, width, max(1, width // SAMPLES))
    y = np.arange(0, height, max(1, height // SAMPLES))
    # Random odd numbers: the XOR of those around is 0 outside, and even inside an even number.
    marks = 2 * np.random.default_rng(0).integers(1, 2**62, len(polygons)) + 1
    around = in_polygons(polygons, x, y, marks)
    return bool(((around != 0) & (around % 2 == 0)).any())


PUBLISHED = {
    "base_prompt": "prompt", "background_prompt": "background_prompt",
    "image_width": "width", "image_height": "height", "num_inference_steps": "steps",
    "guidance_scale": "guidance", "seed": "seed", "mask_inject_steps": "mask_inject_steps",
    "double_inject_blocks_interval": "double_inject_interval",
    "single_inject_blocks_interval": "single_inject_interval", "base_ratio": "base_ratio",
}  # fmt: skip


def from_published(data: Any, source: Source) -> Data:
    """The settings in infer_flux_regional.py, with regions by number or in their own dict."""
    data = checked(data, Data)
    pairs = data.pop("regional_prompt_mask_pairs", None)
    pairs = pairs or {key: data.pop(key) for key in list(data) if key.isdigit()}
    types = get_type_hints(Layout, include_extras=True) | {"width": Side, "height": Side}
    layout = {}
    for theirs, ours in PUBLISHED.items():
        if theirs in data:
            layout[ours] = checked(data.pop(theirs), types[ours], theirs)
    if data:
        warn(f"a layout has no place for {shown(', '.join(sorted(data)))}")
    kind = record(description=str, mask=Box)
    pairs = [checked(pair, kind, key) for key, pair in checked(pairs, Data, "regions").items()]
    prompts = [pair.description for pair in pairs]
    return layout | {"regions": boxed(prompts, [pair.mask for pair in pairs], "regions")}


def to_published(layout: Layout, stem: str) -> Files:
    layout = layout.resolved(FLUX_DEV)
    data = {theirs: getattr(layout, ours) for theirs, ours in PUBLISHED.items()}
    data = {key: value for key, value in data.items() if value is not None}
    for i, box in enumerate(boxes_of(layout, "published")):
        data[str(i)] = {"description": layout.regions[i].prompt, "mask": box}
    return {"": data}


def from_coco(data: Any, source: Source) -> Data:
    """cocodataset.org, "data format": instances, or panoptic segments in an image of their ids."""
    image = record(id=int | str, file_name=str | None, width=Side, height=Side, caption=str | None)
    segments = list[record(id=int, category_id=int)]
    outline = {"bbox": Any | None, "segmentation": Any | None, "category_id": int | None}
    mapped = {"file_name": str | None, "segments_info": segments | None}
    data = checked(data, record(
        images=list[image],
        annotations=list[record(image_id=int | str, **outline, **mapped)],
        categories=list[record(id=int, name=str)],
    ))  # fmt: skip
    image = chosen(data.images, [(each.id, each.file_name) for each in data.images], source)
    names = {category.id: category.name for category in data.categories}
    layout = {"prompt": image.caption, "width": image.width, "height": image.height, "regions": []}
    shapes = {}

    def add(key: str, category: int | None, shape: Data) -> None:
        if category not in names:
            raise InputError(f"{key}.category_id", category, "there is no such category")
        layout["regions"].append({"prompt": names[category], **shape})

    for i, entry in enumerate(data.annotations):
        key = f"annotations[{i}]"
        if entry.image_id != image.id:
            continue
        if entry.segments_info is None:
            shapes[key] = coco_shape(entry, key, source.boxes)
            add(key, entry.category_id, shapes[key])
            continue
        name = entry.file_name or ""
        below = source.path.with_suffix("") / name  # a folder named like the file
        found = below if below.is_file() else source.path.with_name(name)
        layout["map"] = str(source.beside or found)
        for j, part in enumerate(entry.segments_info):
            add(f"{key}.segments_info[{j}]", part.category_id, {"color": part.id})
    check_size(layout, source)
    for key, shape in shapes.items():
        if overlapping(shape.get("polygon", []), image.width, image.height):
            warn(f"{key}.segmentation: {OVERLAP}")
    return layout


def coco_shape(entry: Any, key: str, boxes: bool) -> Data:
    """An annotation's polygons; its box if it has none or boxes are asked for."""
    if boxes or not entry.segmentation:
        x, y, w, h = checked(entry.bbox, Box, f"{key}.bbox")
        return {"box": [x, y, x + w, y + h]}
    key += ".segmentation"
    if isinstance(entry.segmentation, dict):
        raise InputError(key, MISSING, "run-length encoding is not read; --boxes takes the boxes")
    outline = checked(entry.segmentation, list[list[float]], key)
    is_good = all(len(xy) >= 6 and len(xy) % 2 == 0 for xy in outline)
    if not (is_good and all(abs(value) <= FARTHEST for xy in outline for value in xy)):
        raise InputError(key, outline, "expected lists of x1, y1, x2, y2, x3, y3 and so on")
    return {"polygon": [[list(point) for point in zip(xy[::2], xy[1::2])] for xy in outline]}


def to_coco(layout: Layout, stem: str) -> Files:
    size = {"width": layout.width, "height": layout.height}
    image = {"id": 1, "file_name": f"{stem}.jpg", **size, "caption": layout.prompt}
    numbers = {}
    for region in layout.regions:
        numbers.setdefault(region.prompt, len(numbers) + 1)
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    kinds = [{"category_id": numbers[region.prompt], "iscrowd": 0} for region in layout.regions]
    data = {"images": [image], "categories": categories}
    if any(region.shape in ("mask", "color") for region in layout.regions):
        ids = [r + 256 * g + 65536 * b for r, g, b in PALETTE]
        segments = [{"id": number, **kind} for number, kind in zip(ids, kinds)]
        name = f"{stem}.png"
        data["annotations"] = [{"image_id": 1, "file_name": name, "segments_info": segments}]
        return {"": data, name: color_map(layout)}
    data["annotations"] = []
    for i, region in enumerate(layout.regions):
        polygons = polygons_of(region)
        if polygons and overlapping(polygons, layout.width, layout.height):
            raise InputError(f"regions[{i}].polygon", MISSING, "coco fills holes and overlaps")
        x, y = zip(*(sum(polygons, ()) or (region.box[:2], region.box[2:])))
        entry = {"id": i + 1, "image_id": 1, **kinds[i]}
        entry["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
        entry["area"] = int(pixels_of(region, layout).sum())
        if polygons:
            entry["segmentation"] = [list(sum(points, ())) for points in polygons]
        data["annotations"].append(entry)
    return {"": data}


def from_forge(data: Any, source: Source) -> Data:
    """Rows of x0, x1, y0, y1, weight. If the first is the whole image, it is the base prompt's."""
    rows = list[tuple[Unit, Unit, Unit, Unit, float]]
    mapping = checked(data, Annotated[rows, Meta(max_length=MAX_REGIONS + 1)], "mapping")
    path = source.beside or source.path.with_suffix(".txt")
    lines = read_text(path, CONFIG).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    return pictures.coupled(mapping, prompts)


def to_forge(layout: Layout, stem: str) -> Files:
    lines = [" ".join(part.prompt.split()) for part in (layout, *layout.regions)]
    if not lines[0]:
        raise InputError("prompt", layout.prompt, "forge's first line must not be empty")
    w = layout.width
    h = layout.height
    mapping = [[0, 1, 0, 1, 1]]
    for region, (x0, y0, x1, y1) in zip(layout.regions, boxes_of(layout, "forge")):
        mapping.append([x0 / w, x1 / w, y0 / h, y1 / h, region.strength])
    return {"": mapping, f"{stem}.txt": "\n".join(lines) + "\n"}


def from_rpg(data: Any, source: Source) -> Data:
    """RPG's plan, or Regional Prompter's two lines. Rows of the split ratio end with ; and give
    their height, then their columns; without ; there are only columns. With one prompt more than
    parts, the first is the base prompt."""
    _, start, plan = data.partition("Final split ratio:")
    split, end, prompts = plan.partition("Regional Prompt:")
    if not (start and end):
        split, _, prompts = data.strip().partition("\n")
    split = split.partition("\n")[0]
    if len(re.findall("[,;]", split)) > 2 * MAX_REGIONS:
        raise InputError("split ratio", split, f"it has more than {MAX_REGIONS} parts")
    grid = [[number.strip() for number in row.split(",")] for row in split.strip("; ").split(";")]
    for number in chain(*grid):
        if not (re.fullmatch(r"\d{1,20}(\.\d{1,20})?", number) and float(number)):
            raise InputError("split ratio", split, "expected numbers above 0, with , and ; between")
    if command := re.search(r"\bADD(ROW|COL|COMM)\b", prompts):
        raise InputError("Regional Prompt", command[0], "not read, only BREAK and ADDBASE are")
    grid = [["1", *grid[0]]] if len(grid) == 1 else grid
    boxes = []
    ys = borders([row[0] for row in grid])
    for row, y0, y1 in zip(grid, ys, ys[1:]):
        xs = borders(row[1:] or ["1"])
        boxes += [[x0, y0, x1, y1] for x0, x1 in zip(xs, xs[1:])]
    lines = [line.strip() for line in re.split(r"\b(?:BREAK|ADDBASE)\b", prompts)]
    prompt = lines.pop(0) if len(lines) == len(boxes) + 1 else ""
    return {"prompt": prompt, "regions": boxed(lines, boxes, "split ratio")}


def borders(numbers: list[str]) -> list[str]:
    """2, 1, 1 -> 0%, 50%, 75%, 100%."""
    ends = list(accumulate(map(Fraction, numbers), initial=Fraction(0)))
    return [percent(end / ends[-1]) for end in ends]


def to_rpg(layout: Layout, stem: str) -> Files:
    boxes = zip(layout.regions, boxes_of(layout, "rpg"))
    cells = sorted((y0, y1, x0, x1, region.prompt) for region, (x0, y0, x1, y1) in boxes)
    grid = {ys: list(row) for ys, row in groupby(cells, key=lambda cell: cell[:2])}
    columns = [[cell[2:4] for cell in row] for row in grid.values()]
    if not (is_tiling(grid, layout.height) and all(is_tiling(xs, layout.width) for xs in columns)):
        raise InputError("regions", MISSING, "their boxes form no split into rows of columns")
    split = []
    for (y0, y1), row in zip(grid, columns):
        numbers = [str(y1 - y0)] if len(grid) > 1 else []
        if len(row) > 1 or not numbers:
            numbers += [str(x1 - x0) for x0, x1 in row]
        split.append(",".join(numbers))
    prompts = [" ".join(text.split()) for text in (layout.prompt, *(cell[4] for cell in cells))]
    if word := re.search(r"\b(BREAK|ADD(BASE|ROW|COL|COMM))\b", " ".join(prompts)):
        raise InputError("prompt", word[0], "it is a keyword in rpg")
    ratio = f"Final split ratio: {';'.join(split)}"
    return {"": f"{ratio}\nRegional Prompt: {' BREAK '.join(prompts)}\n"}


def is_tiling(spans: Any, end: int) -> bool:
    """Do these (start, end), in order, go from 0 to the end without gaps or overlaps?"""
    return [low for low, _ in spans] + [end] == [0] + [high for _, high in spans]


def from_layoutsam(data: Any, source: Source) -> Data:
    """A row's lists are given as text. Detailed captions are preferred."""
    data = data if isinstance(data, list) else [data]
    row = chosen(data, [(i,) for i in range(len(data))], source)
    captions = {"region_captions": Any | None, "detail_region_captions": Any | None}
    row = checked(row, record(global_caption=str, **SIZE, bbox_list=Any, **captions))
    boxes = checked(data_in(row.bbox_list, source, "bbox_list"), list[Box], "bbox_list")
    texts = row.detail_region_captions or row.region_captions
    prompts = checked(data_in(texts, source, "region_captions"), list[str], "region_captions")
    layout = {"prompt": row.global_caption, "width": row.width, "height": row.height}
    return layout | {"regions": boxed(prompts, boxes, "bbox_list")}


def to_layoutsam(layout: Layout, stem: str) -> Files:
    row = {"global_caption": layout.prompt, "width": layout.width, "height": layout.height}
    row["bbox_list"] = str(boxes_of(layout, "layoutsam"))
    captions = str([region.prompt for region in layout.regions])
    return {"": row | {"region_captions": captions, "detail_region_captions": captions}}


def from_invokeai(data: Any, source: Source) -> Data:
    region = record(positive_prompt=str, mask=str | None, **dict.fromkeys(BOUNDS, float | None))
    data = checked(data, record(positive_prompt=str | None, **SIZE, regions=list[region]))
    layout = {"prompt": data.positive_prompt, "width": data.width, "height": data.height}
    layout["regions"] = []
    for entry in data.regions:
        shape = {"box": [getattr(entry, bound) for bound in BOUNDS]}
        if entry.mask:
            shape = {"mask": str(source.path.parent / entry.mask)}
        layout["regions"].append({"prompt": entry.positive_prompt, **shape})
    return layout


def to_invokeai(layout: Layout, stem: str) -> Files:
    size = {"width": layout.width, "height": layout.height}
    regions = []
    files = {"": {"positive_prompt": layout.prompt, **size, "regions": regions}}
    for i, region in enumerate(layout.regions):
        if region.box:
            shape = dict(zip(BOUNDS, pixel_box(region, i, "invokeai")))
        else:
            shape = {"mask": f"{stem}.{i}.png"}
            files[shape["mask"]] = Image.fromarray(pixels_of(region, layout))
        regions.append({"positive_prompt": region.prompt, **shape})
    return files


def from_gradio(data: Any, source: Source) -> Data:
    box = record(label=str, **dict.fromkeys(CORNERS, float))
    data = checked(data, record(image=Any | None, boxes=list[box]))
    name = data.image if isinstance(data.image, str) else ""
    path = source.beside or source.path.parent / name
    layout = {}
    if source.beside or os.path.isfile(path):
        layout["width"], layout["height"] = read_image(path, "image").size
    boxes = [[getattr(box, corner) for corner in CORNERS] for box in data.boxes]
    return layout | {"regions": boxed([box.label for box in data.boxes], boxes, "boxes")}


def to_gradio(layout: Layout, stem: str) -> Files:
    boxes = []
    for region, box, color in zip(layout.regions, boxes_of(layout, "gradio"), PALETTE):
        boxes.append({**dict(zip(CORNERS, box)), "label": region.prompt, "color": color})
    name = f"{stem}.png"
    blank = Image.new("RGB", (layout.width, layout.height), "white")
    return {"": {"image": name, "boxes": boxes}, name: blank}


def from_seg2any(data: Any, source: Source) -> Data:
    part = record(text=str, color=RGB)
    data = checked(data, record(caption=str, seed=int | None, segments_info=list[part]))
    path = source.beside or source.path.with_suffix(".png")
    width, height = read_image(path, "segments_info").size
    layout = {"prompt": data.caption, "seed": data.seed, "width": width, "height": height}
    regions = [{"prompt": part.text, "color": list(part.color)} for part in data.segments_info]
    return layout | {"map": str(path), "regions": regions}


def to_seg2any(layout: Layout, stem: str) -> Files:
    pairs = zip(PALETTE, layout.regions)
    segments = [{"color": color, "text": region.prompt} for color, region in pairs]
    seed = {} if layout.seed is None else {"seed": layout.seed}
    data = {"caption": layout.prompt, **seed, "segments_info": segments}
    return {"": data, f"{stem}.png": color_map(layout)}


SIZED = {"prompt", "width", "height"}
FORMS = {  # reader, writer, and the keys that the form holds besides shapes
    "published": (from_published, to_published, {*PUBLISHED.values()}),
    "coco": (from_coco, to_coco, SIZED),
    "forge": (from_forge, to_forge, {"prompt", "strength"}),
    "rpg": (from_rpg, to_rpg, {"prompt"}),
    "layoutsam": (from_layoutsam, to_layoutsam, SIZED),
    "invokeai": (from_invokeai, to_invokeai, SIZED),
    "gradio": (from_gradio, to_gradio, {"width", "height"}),
    "seg2any": (from_seg2any, to_seg2any, {*SIZED, "seed", "overlap", "order"}),
}
IMPORTED = {"comfyui": comfyui.read, "a1111": pictures.from_a1111, "svg": svg.read}
PICTURES = {"invokeai": pictures.from_invokeai, "forge": pictures.from_a1111}  # beside FORMS


def read_form(source: Source, form: str) -> Data:
    """A layout's keys, shapes in pixels or percent."""
    if form in IMPORTED or form in PICTURES and texts_in(source.path):
        read = partial(IMPORTED.get(form) or PICTURES[form], size=source.size)
        return parsed(read, source.path, source.path, f"cannot be read as {form} has it")
    text = read_text(source.path, SOURCE if form in ("coco", "layoutsam") else CONFIG)
    return FORMS[form][0](text if form == "rpg" else data_in(text, source), source)


def to_layout(source: Source, form: str, stem: str) -> Files:
    """The layout in YAML and its images."""
    found = read_form(source, form)
    if not found.get("prompt"):
        found["prompt"] = ", ".join(region["prompt"] for region in found["regions"])
        warn("there is no base prompt; the prompts of the regions, joined, stand in for it")
    check_size(found, source)
    size = [found.pop(side, None) for side in ("width", "height")]
    if None in size:
        size = source.size
    elif source.size:
        problem = f"the file's own is {size[0]} x {size[1]}"
        raise InputError("--size", source.size, problem, source.path)
    layout = {"prompt": found.pop("prompt"), "width": None, "height": None, **found}
    files = {}
    if size:
        layout["width"], layout["height"] = checked(size, list[Side], "size")
        for i, region in enumerate(layout["regions"] if form == "svg" else ()):
            if overlapping(region.get("polygon", []), layout["width"], layout["height"]):
                warn(f"regions[{i}].polygon: {OVERLAP}")
        files = fitted(layout, stem)
    elif form not in ("forge", "rpg"):  # whose boxes are in percent
        problem = "needed, because the file does not state the size"
        raise InputError("--size", MISSING, problem, source.path)
    layout = {key: value for key, value in layout.items() if value is not None}
    style = {"default_flow_style": None, "sort_keys": False, "allow_unicode": True, "width": 120}
    return {"": yaml.safe_dump(layout, **style), **files}


def check_size(layout: Data, source: Source) -> None:
    """Refuse too large a layout before it takes long; in YAML it is as long."""
    size = len(json.dumps(layout, ensure_ascii=False, default=str))
    if size > LAYOUT:
        problem = f"{size:,} bytes for a layout, which has {LAYOUT:,} at most"
        raise InputError(source.path, MISSING, problem)


def fitted(layout: Data, stem: str) -> Files:
    """Scale a layout to multiples of 16, cut its shapes at the edges and rename its images, in
    place. Returns the images."""
    old = (layout["width"], layout["height"])
    new = tuple(max(16, (side + 7) // 16 * 16) for side in old)
    layout["width"], layout["height"] = new
    if new != old:
        warn(f"{old[0]} x {old[1]} are not multiples of 16: scaled to {new[0]} x {new[1]}")
    images = [(layout, "map", f"{stem}.map.png")]
    for i, region in enumerate(layout["regions"]):
        images.append((region, "mask", f"{stem}.{i}.png"))
        cut = []
        for numbers in [*sum(region.get("polygon", []), []), region.get("box", [])]:
            for k, value in enumerate(numbers):
                if not isinstance(value, (int, float)):  # in percent, or missing
                    continue
                inside = min(max(value, 0), old[k % 2])
                if inside != value:
                    cut.append(value)
                scaled = round(inside * new[k % 2] / old[k % 2], 6)
                numbers[k] = int(scaled) if scaled.is_integer() else scaled
        if cut:
            warn(f"regions[{i}]: {cut[0]:g} lies outside {old[0]} x {old[1]} and is cut off")
    files = {}
    for holder, key, name in images:
        if key in holder:
            image = holder[key]
            files[name] = image if isinstance(image, Image.Image) else read_image(image, key)
            if new != old:
                files[name] = files[name].resize(new, Image.Resampling.NEAREST)
            holder[key] = name
    return files


def to_form(layout: Layout, form: str, stem: str) -> Files:
    """The files of another form; what it can't hold is reported."""
    _, convert, kept = FORMS[form]
    files = convert(layout.styled(), stem)
    parts = {"": layout} | {f"regions[{i}].": r for i, r in enumerate(layout.regions)}
    lost = []
    held_by_all = {"regions", "map", "preset", "style"}
    for start, part in parts.items():
        held = {*kept, *held_by_all} if part is layout else {*kept, "prompt", *SHAPES}
        default = type(part)(prompt="")
        keys = [key for key in part.__struct_fields__ if key not in held]
        lost += [start + key for key in keys if getattr(part, key) != getattr(default, key)]
    if lost:
        warn(f"{form} has no place for {', '.join(lost)}")
    if form != "rpg":
        files[""] = json.dumps(files[""], ensure_ascii=False) + "\n"
    return files


def write(files: Files, target: Path, overwrite: bool, source: Path | None) -> None:
    """Write all files or none. A layout made from `source` is first checked by reading it."""
    if target.name in files:
        raise InputError(target, MISSING, "a file next to it needs this name, choose another one")
    files = {name or target.name: content for name, content in files.items()}
    for name in files:
        check_writable(target.with_name(name), overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert") as made:
        for name, content in files.items():
            path = Path(made, name)
            if isinstance(content, Image.Image):
                content.save(path, format="PNG")
            else:
                path.write_text(content, encoding="utf-8")
        layout = Path(made, target.name)
        try:
            if source:
                read_layout(layout, {})
        except InputError as error:
            problem = str(error).replace(f"{layout}: ", "").replace(f"{made}{os.sep}", "")
            raise InputError(source, MISSING, problem.rstrip(".")) from None
        for name in files:
            os.replace(Path(made, name), target.with_name(name))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 1 for other failures."""
    parser = argparse.ArgumentParser("python -m tools.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    form = {"metavar": "FORM"}
    known = {"choices": [*FORMS, *IMPORTED], **form}
    add("--from", dest="reads", help="SOURCE has this form, TARGET becomes a layout", **known)
    known = {"choices": FORMS, **form}
    add("--to", dest="writes", help="SOURCE is a layout, TARGET gets this form", **known)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE")
    add("target", type=Path, metavar="TARGET")
    add("--image", metavar="ID", help="coco, layoutsam: which image, by id, file name or index")
    add("--boxes", action="store_true", help="coco: the objects' boxes instead of their outlines")
    elsewhere = "the prompts or the image of SOURCE, if they have another name"
    add("--beside", type=Path, metavar="FILE", help=elsewhere)
    unknown = "the size of the image, if SOURCE does not state it"
    add("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help=unknown)
    add("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    stem = args.target.stem
    try:
        if args.writes:
            files = to_form(read_layout(args.source, {}), args.writes, stem)
        else:
            source = Source(args.source, args.image, args.boxes, args.beside, args.size)
            files = to_layout(source, args.reads, stem)
        write(files, args.target, args.overwrite, args.source if args.reads else None)
    except InputError as error:
        for line in str(error.within(args.source)).split("\n"):
            info(f"convert: {line}")
        return 2
    except OSError as error:
        info(f"convert: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
