"""Layouts from, and to, the forms that other programs have.

    python -m tools.convert --from coco annotations.json layout.yaml --image 42
    python -m tools.convert --to forge layout.yaml couple.json

published   the published script's dict: base_prompt, image_width .., "0": {description, mask: [x1, y1, x2, y2]}
coco        instances, with boxes [x, y, w, h] or polygons, or panoptic segments and their picture; --image picks one
forge       Forge Couple's advanced mapping, rows [x1, x2, y1, y2, weight], and its prompt in a .txt beside it
rpg         RPG's or Regional Prompter's split ratio, and prompts joined by BREAK
layoutsam   a row of LayoutSAM, or a list of rows; --image picks one by its index
invokeai    width, height, positive_prompt, and regions: positive_prompt with x_min, x_max, y_min, y_max, or with mask
gradio      what gradio_image_annotation returns: image, and boxes [{xmin, ymin, xmax, ymax, label}]
seg2any     Seg2Any's caption and segments_info, and the picture of their colors in a .png beside it

Sizes become the nearest multiples of 16. What belongs to TARGET, pictures or a prompt, is written beside it. What the
other side has no place for is said on stderr, or refused where the regions would be others.
"""

import argparse
import ast
import json
import math
import os
import re
import sys
import tempfile
from fractions import Fraction
from itertools import accumulate, groupby, product
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Meta
from PIL import Image

from errors import MISSING, InputError, InputErrors
from regional.images import opened, readable
from regional.layout import SHAPES, Layout, Region, count_of
from regional.mask import in_polygons, region_mask
from regional.reader import read_layout, value_at

Args = argparse.Namespace


Data = dict[str, Any]


Files = dict[str, Any]  # name -> content: a text, a picture, or what becomes JSON; the name "" stands for TARGET


Box = tuple[float, float, float, float]


Side = Annotated[int, Meta(ge=1, le=16384)]


Unit = Annotated[float, Meta(ge=0, le=1)]


Byte = Annotated[int, Meta(ge=0, le=255)]


PUBLISHED = {
    "base_prompt": "prompt", "background_prompt": "background_prompt", "image_width": "width",
    "image_height": "height", "num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed",
    "mask_inject_steps": "mask_inject_steps", "double_inject_blocks_interval": "double_inject_interval",
    "single_inject_blocks_interval": "single_inject_interval", "base_ratio": "base_ratio",
}  # fmt: skip


BOUNDS = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), float)


CORNERS = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), float)


YAML = {"sort_keys": False, "allow_unicode": True, "width": 120}


PALETTE = [tuple(product((0, 85, 170, 255), repeat=3))[23 * i % 64] for i in range(64)]  # black, then far apart


def say(text: str) -> None:
    print(f"convert: {text}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ reading with checks


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, MISSING, f"cannot be read as a text file ({error})") from None


def loaded(path: Any, where: str) -> Image.Image:
    return readable(lambda file: opened(file).copy(), str(path), where)


def parsed(text: Any) -> Any:
    """What a text says in JSON or as a Python literal; anything else as it is."""
    if not isinstance(text, str):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
    raise InputError("the text", text, "neither JSON nor a Python literal")


def checked(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except UnicodeEncodeError:
        raise InputError(where, value, "half of a surrogate pair is no text") from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).replace("`", "").partition(" - at $")
    raise InputError(f"{where}{path}", value_at(value, path), f"{message[0].lower()}{message[1:]}")


def take(data: Any, where: str, **kinds: Any) -> list[Any]:
    """The values of these keys of a mapping, each of its kind; what may be None may be missing."""
    data = checked(data, Data, where or "the file")
    for key, kind in kinds.items():
        if key not in data and type(None) not in get_args(kind):
            raise InputError(where or "the file", data, f"{key} is missing")
    return [checked(data.get(key), kind, f"{where}.{key}".lstrip(".")) for key, kind in kinds.items()]


def chosen(entries: list[Any], names: list[tuple[Any, ...]], image: str | None) -> Any:
    """The one that --image names, or the only one."""
    found = [entry for entry, own in zip(entries, names) if image is None or image in map(str, own)]
    if len(found) != 1:
        raise InputError("--image", image, f"{len(found)} of its {len(entries)} pictures are meant, one is needed")
    return found[0]


def size_of(args: Args, *own: int | None) -> Data:
    """The picture's size: the form's own, or --size where it has none."""
    if (None in own) != bool(args.size):
        has = (
            f"has a size of its own, {own[0]} x {own[1]}" if args.size else "has none, --size WIDTH HEIGHT gives it one"
        )
        raise InputError("--size", args.size, f"the file {has}")
    return dict(zip(("width", "height"), checked(list(args.size or own), list[Side], "size")))


def share(value: Fraction) -> str:
    """1/4 -> 25%. Rounded down, so that a border stays on the same side of every pixel."""
    return f"{math.floor(value * 10**11) / 10**9:.9f}".rstrip("0").rstrip(".") + "%"


# ------------------------------------------------------------------------------------------------ from a form


def from_published(text: str, args: Args) -> Data:
    data = checked(parsed(text), Data, "the file")
    pairs = data.pop("regional_prompt_mask_pairs", None) or {key: data.pop(key) for key in [*data] if key.isdigit()}
    hints = get_type_hints(Layout, include_extras=True)
    kinds = {key: hints[ours] for key, ours in PUBLISHED.items() if key in data}
    layout = {"prompt": ""} | dict(zip((PUBLISHED[key] for key in kinds), take(data, "", **kinds)))
    layout |= size_of(args, layout.get("width"), layout.get("height"))
    if lost := sorted(set(data) - set(PUBLISHED)):
        say(f"a layout has no place for {', '.join(lost)}")
    pairs = [take(pair, key, description=str, mask=Box) for key, pair in checked(pairs, Data, "regions").items()]
    return layout | {"regions": [{"prompt": prompt, "box": list(box)} for prompt, box in pairs]}


def from_coco(text: str, args: Args) -> Data:
    kinds = {"images": list[Data], "annotations": list[Data], "categories": list[Data] | None}
    images, annotations, categories = take(parsed(text), "", **kinds)
    image = chosen(images, [(i.get("id"), i.get("file_name")) for i in images], args.image)
    number, prompt, *size = take(image, "images", id=int | str, caption=str | None, width=Side, height=Side)
    names = dict(take(entry, f"categories[{i}]", id=int, name=str) for i, entry in enumerate(categories or ()))
    layout = {"prompt": prompt, **size_of(args, *size), "regions": []}
    for i, entry in enumerate(annotations):
        if entry.get("image_id") != number:
            continue
        where, segments = f"annotations[{i}]", take(entry, f"annotations[{i}]", segments_info=list[Data] | None)[0]
        parts = {where: entry}
        if segments is not None:
            name, folder = take(entry, where, file_name=str)[0], args.source.parent
            found = [path for path in (folder / args.source.stem / name, folder / name) if path.is_file()]
            layout["map"] = str(args.beside or [*found, folder / name][0])
            parts = {f"{where}.segments_info[{j}]": segment for j, segment in enumerate(segments)}
        for where, part in parts.items():
            category = take(part, where, category_id=int)[0]
            if category not in names:
                raise InputError(f"{where}.category_id", category, "there is no such category")
            shape = coco_shape(part, where, layout, args) if part is entry else {"color": take(part, where, id=int)[0]}
            layout["regions"].append({"prompt": names[category], **shape})
    return layout


def coco_shape(part: Data, where: str, layout: Data, args: Args) -> Data:
    outline = take(part, where, segmentation=list[list[float]] | Data | None)[0]
    if args.boxes or not outline:
        x, y, w, h = take(part, where, bbox=Box)[0]
        return {"box": [x, y, x + w, y + h]}
    if isinstance(outline, dict):
        raise InputError(f"{where}.segmentation", MISSING, "run-length encoding is not read; --boxes takes the boxes")
    if not all(len(numbers) >= 6 and len(numbers) % 2 == 0 for numbers in outline):
        raise InputError(f"{where}.segmentation", outline, "expected lists of x1, y1, x2, y2, x3, y3 and so on")
    polygons = [[list(point) for point in zip(numbers[::2], numbers[1::2])] for numbers in outline]
    if overlapping(polygons, layout["width"], layout["height"]):
        say(f"{where}: its polygons overlap; in a layout what two of them cover is outside")
    return {"polygon": polygons}


def overlapping(polygons: Any, width: int, height: int) -> bool:
    """Do polygons cover other pixels as COCO counts, by any of them, than as layouts do, by an odd number of them?"""
    single = [in_polygons([points], np.arange(width), np.arange(height)) for points in polygons if len(polygons) > 1]
    return bool((np.any(single, axis=0) != np.logical_xor.reduce(single)).any())


def from_forge(text: str, args: Args) -> Data:
    rows = checked(parsed(text), list[tuple[Unit, Unit, Unit, Unit, float]], "mapping")
    path = args.beside or args.source.with_suffix(".txt")
    lines = [line.strip() for line in read(path).splitlines() if line.strip()]
    if len(lines) != len(rows):
        raise InputError("mapping", MISSING, f"it has {len(rows)} rows, for {len(lines)} lines of prompts in {path}")
    layout = {"prompt": "", **(size_of(args, None) if args.size else {}), "regions": []}
    if rows and rows[0][:4] == (0, 1, 0, 1):
        layout["prompt"], weight = lines.pop(0), rows.pop(0)[4]
        say(f"mapping[0], the whole picture, is the base prompt; a layout has no place for its weight {weight:g}")
    for line, (*row, weight) in zip(lines, rows):
        x1, x2, y1, y2 = (share(Fraction(str(value))) for value in row)
        strength = {"strength": weight} if weight != 1 else {}
        layout["regions"].append({"prompt": line, "box": [x1, y1, x2, y2], **strength})
    return layout


def from_rpg(text: str, args: Args) -> Data:
    found = re.search(r"Final split ratio:([^\n]*).*?Regional Prompt:(.*)", text, re.DOTALL)
    split, prompts = found.groups() if found else text.strip().partition("\n")[::2]
    parts = [[number.strip() for number in row.split(",")] for row in split.strip("; ").split(";")]
    if not all(re.fullmatch(r"\d+(\.\d+)?", number) and float(number) for row in parts for number in row):
        raise InputError("split ratio", split, "expected numbers above 0, with , and ; between them")
    if command := re.search(r"\bADD(ROW|COL|COMM)\b", prompts):
        raise InputError("Regional Prompt", command[0], "not read, only BREAK and ADDBASE are")
    rows = [[Fraction(number) for number in row] for row in parts]
    rows = [[Fraction(1), *rows[0]]] if len(rows) == 1 else rows  # without ; there are only columns
    boxes, ys = [], borders([row[0] for row in rows])
    for (_, *columns), y0, y1 in zip(rows, ys, ys[1:]):
        xs = borders(columns or [Fraction(1)])
        boxes += [[share(value) for value in (x0, y0, x1, y1)] for x0, x1 in zip(xs, xs[1:])]
    lines = [line.strip() for line in re.split(r"\b(?:BREAK|ADDBASE)\b", prompts)]
    prompt = lines.pop(0) if len(lines) == len(boxes) + 1 else ""
    if len(lines) != len(boxes):
        raise InputError("split ratio", split, f"{len(boxes)} parts, for {len(lines)} prompts")
    regions = [{"prompt": line, "box": box} for line, box in zip(lines, boxes)]
    return {"prompt": prompt, **(size_of(args, None) if args.size else {}), "regions": regions}


def borders(parts: list[Fraction]) -> list[Fraction]:
    """2, 1, 1 -> 0, 1/2, 3/4, 1."""
    return [total / sum(parts) for total in accumulate(parts, initial=Fraction(0))]


def from_layoutsam(text: str, args: Args) -> Data:
    data = parsed(text)
    rows = data if isinstance(data, list) else [data]
    row = chosen(rows, [(i,) for i in range(len(rows))], args.image)
    prompt, *size = take(row, "", global_caption=str, width=Side, height=Side)
    boxes, short, detail = take(row, "", bbox_list=Any, region_captions=Any, detail_region_captions=Any | None)
    boxes = checked(parsed(boxes), list[Box], "bbox_list")
    lines = checked(parsed(detail), list[str] | None, "detail_region_captions")
    lines = lines or checked(parsed(short), list[str], "region_captions")
    if len(lines) != len(boxes):
        raise InputError("bbox_list", MISSING, f"it has {len(boxes)} boxes, for {len(lines)} captions")
    regions = [{"prompt": line, "box": list(box)} for line, box in zip(lines, boxes)]
    return {"prompt": prompt, **size_of(args, *size), "regions": regions}


def from_invokeai(text: str, args: Args) -> Data:
    kinds = {"positive_prompt": str | None, "regions": list[Data], "width": Side | None, "height": Side | None}
    prompt, entries, *size = take(parsed(text), "", **kinds)
    layout = {"prompt": prompt, **size_of(args, *size), "regions": []}
    for i, entry in enumerate(entries):
        line, mask = take(entry, f"regions[{i}]", positive_prompt=str, mask=str | None)
        shape = {"mask": str(args.source.parent / mask)} if mask else {"box": take(entry, f"regions[{i}]", **BOUNDS)}
        layout["regions"].append({"prompt": line, **shape})
    return layout


def from_gradio(text: str, args: Args) -> Data:
    image, entries = take(parsed(text), "", image=Any | None, boxes=list[Data])
    path = args.beside or (args.source.parent / image if isinstance(image, str) else "")
    size = loaded(path, "image").size if args.beside or os.path.isfile(path) else [None]
    boxes = [take(entry, f"boxes[{i}]", label=str, **CORNERS) for i, entry in enumerate(entries)]
    return {"prompt": "", **size_of(args, *size), "regions": [{"prompt": line, "box": box} for line, *box in boxes]}


def from_seg2any(text: str, args: Args) -> Data:
    prompt, seed, entries = take(parsed(text), "", caption=str, seed=int | None, segments_info=list[Data])
    path = args.beside or args.source.with_suffix(".png")
    size = size_of(args, *loaded(path, "segments_info").size)
    kinds = {"text": str, "color": tuple[Byte, Byte, Byte]}
    segments = [take(entry, f"segments_info[{i}]", **kinds) for i, entry in enumerate(entries)]
    regions = [{"prompt": line, "color": list(color)} for line, color in segments]
    return {"prompt": prompt, "seed": seed, **size, "map": str(path), "regions": regions}


def fitted(layout: Data, stem: str) -> Files:
    """Scale a layout to multiples of 16 and cut it at its edges, in place; returns the pictures it needs beside it."""
    if "width" not in layout:  # then all is in shares
        return {}
    old = layout["width"], layout["height"]
    new = tuple(max(16, (side + 7) // 16 * 16) for side in old)
    layout |= dict(zip(("width", "height"), new))
    if new != old:
        say(f"{old[0]} x {old[1]} are not multiples of 16: all is scaled to {new[0]} x {new[1]}")
    files, pictures = {}, [(layout, "map", f"{stem}.map.png")]
    for i, region in enumerate(layout["regions"]):
        pictures.append((region, "mask", f"{stem}.{i}.png"))
        for numbers in [point for points in region.get("polygon", ()) for point in points] + [region.get("box", [])]:
            for k, value in enumerate(numbers):
                if not isinstance(value, str):
                    numbers[k] = tidy(min(max(value, 0), old[k % 2]) * new[k % 2] / old[k % 2])
                    if value < 0 or value > old[k % 2]:
                        say(f"regions[{i}]: {value:g} lies outside of {old[0]} x {old[1]} and is cut off")
    for holder, key, name in pictures:
        if key in holder:
            picture = loaded(holder[key], key)
            files[name] = picture if new == old else picture.resize(new, Image.Resampling.NEAREST)
            holder[key] = name
    return files


def tidy(value: float) -> float:
    """Without rounding errors, and as an integer if it is one."""
    value = round(value, 6)
    return int(value) if float(value).is_integer() else value


# ------------------------------------------------------------------------------------------------ to a form


def pixel_box(region: Region, i: int) -> list[int]:
    """The box of integers that holds the same pixels."""
    x0, y0, x1, y1 = box = [math.ceil(value) for value in region.box]
    if x0 == x1 or y0 == y1:
        raise InputError(f"regions[{i}].box", list(region.box), "there is no pixel in it")
    return box


def boxes_of(layout: Layout, form: str) -> list[tuple[str, list[int]]]:
    """Each region's prompt and box."""
    for i, region in enumerate(layout.regions):
        if region.shape != "box":
            raise InputError(f"regions[{i}]", MISSING, f"it has a {region.shape}, {form} has only boxes")
    return [(region.prompt, pixel_box(region, i)) for i, region in enumerate(layout.regions)]


def inside(region: Region, layout: Layout) -> np.ndarray:
    """Which pixels lie in the region, (height, width) bool: at tokens' centres what regional/mask.py finds there."""
    x, y = np.arange(layout.width), np.arange(layout.height)
    if region.shape in ("box", "polygon"):
        x0, y0, x1, y1 = region.box or (0, 0, 0, 0)
        return in_polygons(region.polygon or [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)]], x, y)
    mask = region_mask(region, layout)
    return mask[y * mask.shape[0] // layout.height][:, x * mask.shape[1] // layout.width]


def painted(layout: Layout) -> Image.Image:
    """One picture of all regions, the i-th in PALETTE[i + 1] and what is in none of them in PALETTE[0]."""
    canvas = np.full((layout.height, layout.width, 3), PALETTE[0], dtype=np.uint8)
    order = list(enumerate(layout.regions))
    for i, region in order if layout.overlap == "first" else order[::-1]:  # the topmost first
        pixels, free = inside(region, layout), (canvas == PALETTE[0]).all(axis=2)
        if (pixels & ~free).any() and layout.overlap not in ("first", "last"):
            raise InputError(f"regions[{i}]", MISSING, "it overlaps another; each pixel can have one region")
        if not (pixels & free).any():
            raise InputError(f"regions[{i}]", MISSING, "it is not visible: it has no pixel, or it lies under others")
        canvas[pixels & free] = PALETTE[i + 1]
    return Image.fromarray(canvas)


def to_published(layout: Layout, stem: str) -> Files:
    steps = layout.steps or 24
    settings = {theirs: getattr(layout, ours) for theirs, ours in PUBLISHED.items()}
    settings |= {"num_inference_steps": steps, "mask_inject_steps": count_of(layout.mask_inject_steps, steps)}
    pairs = [{"description": prompt, "mask": box} for prompt, box in boxes_of(layout, "published")]
    known = {key: value for key, value in settings.items() if value is not None}
    return {"": known | {str(i): pair for i, pair in enumerate(pairs)}}


def to_coco(layout: Layout, stem: str) -> Files:
    categories = list(dict.fromkeys(region.prompt for region in layout.regions))
    image = {"id": 1, "file_name": f"{stem}.jpg", "width": layout.width, "height": layout.height}
    data = {
        "images": [image | {"caption": layout.prompt}],
        "categories": [{"id": i + 1, "name": prompt} for i, prompt in enumerate(categories)],
        "annotations": [],
    }
    kinds = [{"category_id": categories.index(region.prompt) + 1, "iscrowd": 0} for region in layout.regions]
    if any(region.shape in ("mask", "color") for region in layout.regions):
        segments = [{"id": r + 256 * g + 65536 * b} | kind for (r, g, b), kind in zip(PALETTE[1:], kinds)]
        data["annotations"] = [{"image_id": 1, "file_name": f"{stem}.png", "segments_info": segments}]
        return {"": data, f"{stem}.png": painted(layout)}
    for i, region in enumerate(layout.regions):
        if region.polygon and overlapping(region.polygon, layout.width, layout.height):
            raise InputError(f"regions[{i}].polygon", MISSING, "it has a hole, or parts that overlap; coco fills both")
        outline = [[value for point in points for value in point] for points in region.polygon or ()]
        xs, ys = ([v for numbers in outline or [region.box] for v in numbers[axis::2]] for axis in (0, 1))
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        own = {"id": i + 1, "image_id": 1, "bbox": box, "area": int(inside(region, layout).sum())}
        data["annotations"].append(own | kinds[i] | ({"segmentation": outline} if outline else {}))
    return {"": data}


def to_forge(layout: Layout, stem: str) -> Files:
    w, h = layout.width, layout.height
    texts = [" ".join(prompt.split()) for prompt in (layout.prompt, *(r.prompt for r in layout.regions))]
    if not texts[0]:
        raise InputError("prompt", "", "it is forge's first line, and must not be empty")
    boxes = zip(boxes_of(layout, "forge"), layout.regions)
    rows = [[x0 / w, x1 / w, y0 / h, y1 / h, region.strength] for (_, (x0, y0, x1, y1)), region in boxes]
    return {"": [[0, 1, 0, 1, 1], *rows], f"{stem}.txt": "\n".join(texts) + "\n"}


def to_rpg(layout: Layout, stem: str) -> Files:
    cells = sorted((y0, y1, x0, x1, prompt) for prompt, (x0, y0, x1, y1) in boxes_of(layout, "rpg"))
    rows = {span: list(row) for span, row in groupby(cells, key=lambda cell: cell[:2])}
    columns = [[cell[2:4] for cell in row] for row in rows.values()]
    if not tile(rows, layout.height) or not all(tile(row, layout.width) for row in columns):
        raise InputError("regions", MISSING, "their boxes form no split into rows, and these into columns")
    widths = [[str(x1 - x0) for x0, x1 in row] for row in columns]
    split = [",".join([str(y1 - y0), *(row if len(row) > 1 else [])]) for (y0, y1), row in zip(rows, widths)]
    texts = [" ".join(prompt.split()) for prompt in (layout.prompt, *(cell[4] for cell in cells))]
    if word := re.search(r"\b(BREAK|ADD(BASE|ROW|COL|COMM))\b", " ".join(texts)):
        raise InputError("prompt", word[0], "it is a keyword in rpg")
    split = ";".join(split) if len(rows) > 1 else ",".join(widths[0])
    return {"": f"Final split ratio: {split}\nRegional Prompt: {' BREAK '.join(texts)}\n"}


def tile(spans: Any, end: int) -> bool:
    """Do spans, pairs in order, go from 0 to the end without gaps or overlaps?"""
    return [low for low, _ in spans] + [end] == [0] + [high for _, high in spans]


def to_layoutsam(layout: Layout, stem: str) -> Files:
    prompts, boxes = zip(*boxes_of(layout, "layoutsam")) if layout.regions else ((), ())
    row = {"global_caption": layout.prompt, "width": layout.width, "height": layout.height}
    captions = dict.fromkeys(("region_captions", "detail_region_captions"), str(list(prompts)))
    return {"": row | {"bbox_list": str(list(boxes))} | captions}


def to_invokeai(layout: Layout, stem: str) -> Files:
    files, regions = {}, []
    for i, region in enumerate(layout.regions):
        shape = dict(zip(BOUNDS, pixel_box(region, i))) if region.box else {"mask": f"{stem}.{i}.png"}
        if not region.box:
            files[shape["mask"]] = Image.fromarray(inside(region, layout))
        regions.append({"positive_prompt": region.prompt, **shape})
    size = {"width": layout.width, "height": layout.height}
    return {"": {"positive_prompt": layout.prompt, **size, "regions": regions}} | files


def to_gradio(layout: Layout, stem: str) -> Files:
    boxes = [dict(zip(CORNERS, box)) | {"label": prompt} for prompt, box in boxes_of(layout, "gradio")]
    boxes = [box | {"color": color} for box, color in zip(boxes, PALETTE[1:])]
    blank = Image.new("RGB", (layout.width, layout.height), "white")
    return {"": {"image": f"{stem}.png", "boxes": boxes}, f"{stem}.png": blank}


def to_seg2any(layout: Layout, stem: str) -> Files:
    segments = [{"color": color, "text": region.prompt} for color, region in zip(PALETTE[1:], layout.regions)]
    seed = {} if layout.seed is None else {"seed": layout.seed}
    return {"": {"caption": layout.prompt, **seed, "segments_info": segments}, f"{stem}.png": painted(layout)}


# ------------------------------------------------------------------------------------------------ the command

FORMS = {  # reader, writer, and the keys of layouts and regions that the form has a place for, besides shapes
    "published": (from_published, to_published, {*PUBLISHED.values()}),
    "coco": (from_coco, to_coco, {"prompt", "width", "height"}),
    "forge": (from_forge, to_forge, {"prompt", "strength"}),
    "rpg": (from_rpg, to_rpg, {"prompt"}),
    "layoutsam": (from_layoutsam, to_layoutsam, {"prompt", "width", "height"}),
    "invokeai": (from_invokeai, to_invokeai, {"prompt", "width", "height"}),
    "gradio": (from_gradio, to_gradio, {"width", "height"}),
    "seg2any": (from_seg2any, to_seg2any, {"prompt", "width", "height", "seed", "overlap"}),
}


def to_layout(text: str, args: Args) -> Files:
    layout = FORMS[args.reads][0](text, args)
    files = fitted(layout, args.target.stem)
    if not layout["prompt"]:
        layout["prompt"] = ", ".join(region["prompt"] for region in layout["regions"])
        say("there is no base prompt: the prompts of the regions, joined, stand in for it")
    layout = {key: value for key, value in layout.items() if value is not None}
    return {"": yaml.safe_dump(layout, default_flow_style=None, **YAML), **files}


def to_form(layout: Layout, args: Args) -> Files:
    _, writer, carried = FORMS[args.writes]
    files = writer(layout, args.target.stem)
    parts = [("", layout, Layout(prompt=""), {"regions", "map", "preset"})]  # what a preset sets is there besides it
    parts += [(f"regions[{i}].", r, Region(prompt=""), {"prompt", *SHAPES}) for i, r in enumerate(layout.regions)]
    lost = [
        where + key
        for where, part, default, besides in parts
        for key in part.__struct_fields__
        if key not in carried | besides and getattr(part, key) != getattr(default, key)
    ]
    if lost:
        say(f"{args.writes} has no place for {', '.join(lost)}")
    return files


def write(files: Files, args: Args) -> None:
    """All files, or none: they are made in a folder of their own, where a layout is read once, and then moved."""
    target, folder = args.target, args.target.parent
    if target.name in files:
        raise InputError(target, MISSING, "a file that belongs to it is to have this name, choose another one")
    if not folder.is_dir():
        raise InputError(target, MISSING, f"there is no folder {folder}")
    files = {name or target.name: content for name, content in files.items()}
    if taken := [folder / name for name in files if (folder / name).exists() and not args.overwrite]:
        raise InputError(taken[0], MISSING, "exists already; --overwrite replaces it")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".convert") as made:
        made = Path(made)
        for name, content in files.items():
            if isinstance(content, Image.Image):
                content.save(made / name, format="PNG")
            else:
                text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) + "\n"
                (made / name).write_text(text, encoding="utf-8")
        if args.reads:
            try:
                read_layout(made / target.name, {})
            except InputError as error:
                for one in error.errors if isinstance(error, InputErrors) else [error]:
                    one.source = args.source
                    one.problem = one.problem.replace(f"{made}{os.sep}", "")
                raise
        for name in files:
            os.replace(made / name, folder / name)


def parse_args(argv: list[str] | None = None) -> Args:
    parser = argparse.ArgumentParser("python -m tools.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--from", dest="reads", choices=FORMS, metavar="FORM", help="SOURCE has this form, TARGET becomes a layout")
    add("--to", dest="writes", choices=FORMS, metavar="FORM", help="SOURCE is a layout, TARGET gets this form")
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE")
    add("target", type=Path, metavar="TARGET")
    add("--image", metavar="ID", help="coco, layoutsam: which picture, by id, file name or index")
    add("--boxes", action="store_true", help="coco: the objects' boxes in place of their outlines")
    add("--beside", type=Path, metavar="FILE", help="the prompt or picture that belongs to SOURCE, if not beside it")
    add("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="of the picture, if SOURCE does not say it")
    add("--overwrite", action="store_true", help="replace existing files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 for bad input, 1 for what the machine refuses."""
    args = parse_args(argv)
    try:
        source = read_layout(args.source, {}) if args.writes else read(args.source)
        try:
            files = to_form(source, args) if args.writes else to_layout(source, args)
        except InputError as error:
            raise error.within(args.source) from None
        write(files, args)
    except InputError as error:
        for line in str(error).split("\n"):
            say(line)
        return 2
    except OSError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
